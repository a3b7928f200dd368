"""What the plugin's kernels cost, read from their compiled code, beside the figures of TensorRT Edge-LLM's kernels.

    python benchmarks/kernel_static.py [--chip sm_87]
    python benchmarks/kernel_static.py --write qe_edge/predict/instructions.json

Needs the plugin built (plugins/ladder.sh) and cuobjdump and nvdisasm on PATH. Instructions are those that one warp
issues in the loop over K: per 1000 multiply-accumulates in prefill, per 2048 weights in decode: a KiB of 4-bit ones;
3-bit kernels (w3) count as many weights. Of the down-projection they are those of one pass of its loop. These are
static counts of what the assembler emitted; nothing here was run on hardware. `--write` stores the counts of all chips
for `qe-edge predict`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "plugins"))

from gates.costs import EDGE_LLM, instruction_costs
from gates.cubins import CHIPS, cubin, disassemble
from gates.limits import loop_of, variant
from gates.loops import down_loop

EDGE_LLM_PER_1000_MAC, EDGE_LLM_PER_KIB = EDGE_LLM["prefill_per_1000_mac"], EDGE_LLM["decode_per_kib"]["1"]
GOAL_PER_1000_MAC, GOAL_PER_KIB = 2.0, 80


def main() -> int:
    """Print one row per kernel and one JSON line."""
    parser = argparse.ArgumentParser(description="Static cost of the QELinear kernels.")
    parser.add_argument("--chip", choices=CHIPS, default="sm_87")
    parser.add_argument("--write", type=Path, metavar="FILE", help="store the counts of all chips")
    arguments = parser.parse_args()
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(instruction_costs(), indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {arguments.write}.")
        return 0
    chip = arguments.chip
    shipped = cubin(chip)
    code = disassemble(shipped)
    rows = []
    for kernel in sorted(shipped.usage):
        loop = loop_of(kernel, code[kernel])
        if loop is None:
            continue
        prefill = kernel.startswith("qe_prefill")
        cost = loop.per_1000_mac if prefill else loop.per_2048_weights
        rows.append(
            {
                "kernel": kernel,
                "variant": variant(kernel),
                "phase": "prefill" if prefill else "decode",
                "registers": shipped.usage[kernel].registers,
                "local_bytes": shipped.usage[kernel].local_bytes,
                "per_mma": round(loop.per_mma, 2),
                "cost": round(cost, 2),
                "ratio_to_edge_llm": round(cost / (EDGE_LLM_PER_1000_MAC if prefill else EDGE_LLM_PER_KIB), 2),
                "meets_goal": cost <= (GOAL_PER_1000_MAC if prefill else GOAL_PER_KIB),
            }
        )
    print(
        f"{chip}; prefill: instructions per 1000 MAC (Edge-LLM {EDGE_LLM_PER_1000_MAC}, goal {GOAL_PER_1000_MAC}); ",
        end="",
    )
    print(f"decode: per 2048 weights, a KiB of 4-bit ones (Edge-LLM {EDGE_LLM_PER_KIB}, goal {GOAL_PER_KIB})")
    print(f"{'kernel':34} {'registers':>9} {'spilled':>7} {'per MMA':>8} {'cost':>8} {'/ Edge-LLM':>10} goal")
    for row in rows:
        print(
            f"{row['kernel']:34} {row['registers']:9} {row['local_bytes']:7} {row['per_mma']:8} {row['cost']:8} "
            f"{row['ratio_to_edge_llm']:10} {'met' if row['meets_goal'] else 'not met'}"
        )
    down = {
        kernel: down_loop(code[kernel]).instructions for kernel in sorted(shipped.usage) if kernel.startswith("qe_down")
    }
    print("Instructions of one pass of lowrank_down over 32 rows: 16 columns in decode, 32 for 32 tokens in prefill")
    for kernel, instructions in down.items():
        print(f"{kernel:34} {shipped.usage[kernel].registers:9} {instructions:7}")
    print(json.dumps({"benchmark": "kernel_static", "chip": chip, "rows": rows, "down": down}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
