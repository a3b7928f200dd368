r"""Everything worth knowing of a quantizing run on a GPU, in one go, for a machine that is there for minutes.

    python benchmarks/device_profile.py --device cuda --seconds 140

Parts, each of which goes on after a failure and is left out when the time is over: time per layer by phase
(`quantizer_speed.py`), GPU and CPU on the demo (`device_agreement.py`), torch's profile of one layer, the eigenproblems
and factorizations alone, and the CPU's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_agreement
import numpy as np
import quantizer_speed
import torch

LARGE = 1000  # sides of eigenproblems that numpy is not asked
EIGENPROBLEMS = ((1, 384), (1, 512), (1, 1536), (8, 240), (8, 160), (8, 128))


def show_machine(device: str) -> None:
    """Versions and the GPU."""
    print(sys.version.split()[0], "torch", torch.__version__, "threads", torch.get_num_threads())
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        print(torch.cuda.get_device_name(), f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free", torch.version.cuda)


def phases(name: str, folder: Path, device: str, layers: int) -> None:
    """Time per layer by phase."""
    quantizer_speed.make_model(folder, layers, 128, 512)
    found = quantizer_speed.quantize_phased(folder, name, device)
    print(f"{name}, {device}: {found['seconds'] / layers:.2f} s a layer, GPU memory {found['gib']} GiB")
    for phase, seconds in found["phases"].items():
        print(f"    {phase:36} {seconds / layers:7.3f} s a layer")


def agreement(name: str, device: str, limit: int) -> None:
    """GPU and CPU on the demo."""
    original = device_agreement.in_float32(device_agreement.load_model("demo"))
    samples = device_agreement.load_evaluation("demo")[:limit]
    keys = device_agreement.RECIPES[name]
    there, here = (device_agreement.measure(original, samples, keys, each) for each in (device, "cpu"))
    word = "agree" if device_agreement.agree(there, here) else "DO NOT AGREE"
    print(
        f"{name}: {word}: KL {there.kl:.4e} / {here.kl:.4e} = {there.kl / here.kl:.3f}, text {there.kl_text:.3e} / "
        f"{here.kl_text:.3e}, layers' error {there.error / here.error:.4f}, "
        f"{there.seconds:.1f} s / {here.seconds:.1f} s"
    )
    for layer, error in there.layers.items():
        if abs(error / here.layers[layer] - 1) > device_agreement.WITHIN:
            print(f"    {layer}: {error:.4e} / {here.layers[layer]:.4e}")


def profile(name: str, folder: Path, device: str, rows: int) -> None:
    """The profile of one layer."""
    quantizer_speed.make_model(folder, 1, 128, 512)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.startswith("cuda") else []
    with torch.profiler.profile(activities=activities) as made:
        quantizer_speed.quantize_phased(folder, name, device)
    averages = made.key_averages()
    for key in ("self_device_time_total", "self_cpu_time_total") if len(activities) > 1 else ("self_cpu_time_total",):
        table = averages.table(sort_by=key, row_limit=rows, max_name_column_width=60)
        lines = [line for line in table.splitlines() if line.strip() and not line.startswith("-")]
        print(f"by {key}")
        for line in lines:
            print(" ".join(line.split()))


def alone(device: str) -> None:
    """Milliseconds of eigenproblems and factorizations alone."""
    for count, size in EIGENPROBLEMS:
        rows = torch.randn(count, size, size, dtype=torch.float64)
        here = rows @ rows.mT / size
        there = here.to(device)
        times = [milliseconds(torch.linalg.eigh, matrix, device) for matrix in (there, there.float())]
        times += [milliseconds(np.linalg.eigh, here.numpy(), device)] if size < LARGE else []
        print(f"eigh {count} x {size}: float64, float32, numpy:", *(f"{each:.1f} ms" for each in times))
    for size in (1536, 8960):
        rows = torch.randn(size, size, device=device)
        matrix = rows @ rows.T / size + torch.eye(size, device=device)
        print(f"cholesky {size} float32: {milliseconds(torch.linalg.cholesky, matrix, device):.1f} ms")


def milliseconds(work: Callable[[Any], object], matrix: object, device: str) -> float:
    """The best of two runs, after one that does not count."""
    best = float("inf")
    for run in range(3):
        started = time.perf_counter()
        work(matrix)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started) if run else best
    return 1000 * best


def main() -> int:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which no further part starts")
    parser.add_argument("--limit", type=int, default=200, help="questions")
    options = parser.parse_args()
    device, limit = options.device, options.limit
    started = time.perf_counter()
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts: dict[str, Callable[[], None]] = {
            "machine": lambda: show_machine(device),
            "first use": lambda: phases("RTN W4A8", folder / "rtn", device, 2),
            "QE, with what starts once": lambda: phases("QE W4A8", folder / "first", device, 1),
            "QE": lambda: phases("QE W4A8", folder / "qe", device, 2),
            "GPTQ": lambda: phases("GPTQ W3A16", folder / "gptq", device, 2),
            "QE in a budget": lambda: phases("QE W4A8, --bits 4.25", folder / "bits", device, 2),
            "demo, gptq": lambda: agreement("gptq w3a16", device, limit),
            "demo, qe": lambda: agreement("qe w4a8", device, limit),
            "alone": lambda: alone(device),
            "profile": lambda: profile("QE W4A8", folder / "profile", device, 25),
            "demo, budget": lambda: agreement("qe w4a8, 4.5 bits", device, limit),
            "CPU": lambda: phases("QE W4A8", folder / "cpu", "cpu", 1),
        }
        for name, part in parts.items():
            spent = time.perf_counter() - started
            print(f"== {name} (after {spent:.0f} s)", flush=True)
            if spent > options.seconds:
                print("left out: the time is over")
                continue
            try:
                part()
            except Exception:  # noqa: BLE001 - whatever fails, the other parts are still worth their time
                traceback.print_exc(file=sys.stdout)
                failed += 1
    print(f"== {failed} parts failed, {time.perf_counter() - started:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
