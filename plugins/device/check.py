"""Numerics and times of the kernels on the GPU of this machine. Not yet run on hardware.

    python -m device.check OUT.json [--quick]

Runs every mode of the emulator tests against the float64 reference, twice (two runs must be bit-identical), then times
the linears of Qwen2-VL-2B and 7B beside a float16 matrix product (torch and cuBLAS) where torch with CUDA is installed,
and beside TensorRT's own INT4 weight-only product where its Python module is.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from device.int4 import times as int4_times
from device.machine import DeviceMachine
from emulator.build import BUILD, source_emulator
from emulator.plan import Buffers, Launch, Planner, Tactic
from emulator.session import WEIGHTS, problem_of, run_linear
from prepack.floats import to_bits
from prepack.linear import CanonicalLinear
from prepack.pack import pack
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import MODES, TOKENS, shape_for

# in_features and out_features of merged linears: q/k/v, o, gate/up, down.
SHAPES = {
    "Qwen2-VL-2B": [(1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)],
    "Qwen2-VL-7B": [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)],
}
TIMED = [
    Mode("w4a8", adapter_bits=8, rank_routed=32),
    Mode("w4a16_g128_asym", act_bits=0, group_size=128, zeros=True),
    Mode("w3a8", weight_bits=3, adapter_bits=8, rank_routed=32),
    Mode("w3a16_g128_asym", act_bits=0, group_size=128, zeros=True, weight_bits=3),
]


def numerics(machine: DeviceMachine, planner: Planner) -> list[dict[str, Any]]:
    """One row per mode and token count."""
    rows = []
    for mode in MODES:
        for tokens in TOKENS:
            k, n = shape_for(mode, tokens)
            layer, x = random_layer(mode, k, n, seed=tokens), random_tokens(mode, tokens, k)
            first, second = (run_linear(machine, planner, layer, x, mode.dtype) for _ in range(2))
            error = relative_error(first.y, qe_linear(layer, x, mode.dtype))
            same = bool(np.array_equal(first.y, second.y))
            passed = same and error <= LIMIT[mode.dtype]
            rows.append({"mode": mode.name, "tokens": tokens, "error": error, "same_bits": same, "passed": passed})
    return rows


def timings(machine: DeviceMachine, planner: Planner) -> list[dict[str, Any]]:
    """Microseconds of one linear per model shape, token count and tactic."""
    rows = []
    for model, shapes in SHAPES.items():
        for k, n in shapes:
            for mode in TIMED:
                layer = random_layer(mode, k, n)
                for tokens in (1, 8, 64, 1024):
                    rows += _time(machine, planner, model, mode, layer, tokens)
    return rows


def _time(
    machine: DeviceMachine,
    planner: Planner,
    model: str,
    mode: Mode,
    layer: CanonicalLinear,
    tokens: int,
) -> list[dict[str, Any]]:
    x = random_tokens(mode, tokens, layer.in_features)
    problem, packed = problem_of(layer, tokens, mode.dtype), pack(layer, mode.dtype)
    machine.clear()
    y = np.zeros((tokens, layer.out_features), np.uint16)
    workspace = np.zeros(max(1, planner.workspace_bytes(problem)), np.uint8)
    weights = {name: getattr(packed, name) for name in WEIGHTS}
    buffers = Buffers(
        x=machine.add(to_bits(x, mode.dtype), "x", writable=False),
        y=machine.add(y, "y", writable=True),
        workspace=machine.add(workspace, "workspace", writable=True),
        **{k: machine.add(v, k, writable=False) for k, v in weights.items() if v is not None},
    )
    tactics = [Tactic(0, warps) for warps in (2, 4, 8)]
    if tokens > 16:
        tactics = [Tactic(rows, 0) for rows in (64, 128) if mode.act_bits or rows < 128]
    plans = [(tactic, planner.launches(problem, buffers, tactic)) for tactic in tactics]
    return [
        {
            "model": model, "mode": mode.name, "k": layer.in_features, "n": layer.out_features, "tokens": tokens,
            "block_rows": tactic.block_rows, "decode_warps": tactic.decode_warps,
            "microseconds": machine.microseconds(partial(_launch_all, machine, launches), 50),
        }
        for tactic, launches in plans
    ]  # fmt: skip


def _launch_all(machine: DeviceMachine, launches: list[Launch]) -> None:
    for launch in launches:
        machine.queue(launch)


def float16_times() -> list[dict[str, Any]]:
    """The same shapes as one float16 product each; empty without torch and CUDA."""
    try:
        torch: Any = import_module("torch")
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    rows = []
    for model, shapes in SHAPES.items():
        for k, n in shapes:
            weight = torch.randn(k, n, device="cuda", dtype=torch.float16)
            for tokens in (1, 8, 64, 1024):
                x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
                times = []
                for _ in range(53):
                    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    x @ weight
                    stop.record()
                    stop.synchronize()
                    times.append(1000 * start.elapsed_time(stop))
                rows.append(
                    {"model": model, "k": k, "n": n, "tokens": tokens, "microseconds": float(np.median(times[3:]))}
                )
    return rows


def main() -> int:
    """Write one JSON file; the exit code is 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description="Check the QELinear kernels on this machine's GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="numerics only, as under compute-sanitizer")
    arguments = parser.parse_args()
    machine, planner = DeviceMachine(BUILD / "plugin"), Planner.load(source_emulator())
    rows = numerics(machine, planner)
    int4, reason = ([], "--quick was given.") if arguments.quick else int4_times(machine, SHAPES)
    report = {
        "kind": "qe_edge.device_check", "device": machine.name, "capability": machine.capability, "cuda": machine.cuda,
        "host": platform.machine(), "numerics": rows,
        "timings": [] if arguments.quick else timings(machine, planner),
        "float16": [] if arguments.quick else float16_times(),
        "tensorrt_int4": int4, "skipped": {"TensorRT's INT4 weight-only product": reason} if reason else {},
    }  # fmt: skip
    part = arguments.out.with_suffix(".tmp")
    part.write_text(json.dumps(report, indent=1))
    part.replace(arguments.out)
    wrong = [row for row in rows if not row["passed"]]
    print(f"{machine.name}: {len(rows) - len(wrong)} of {len(rows)} results right; {arguments.out}")
    for row in wrong:
        print(f"wrong: {row}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
