"""Instructions of every kernel's loop on every chip, as `qe-edge predict` stores them."""

from __future__ import annotations

from typing import Any

from gates.cubins import CHIPS, Cubin, cubin, disassemble
from gates.limits import loop_of, variant

# TensorRT Edge-LLM 0.11, W4A16, disassembled for sm_86: its GEMM, and its decode kernel by its most tokens.
EDGE_LLM: dict[str, Any] = {
    "version": "0.11",
    "chip": "sm_86",
    "prefill_per_1000_mac": 4.04,
    "decode_per_kib": {"1": 198, "4": 316, "6": 404},
}


def instruction_costs() -> dict[str, Any]:
    """Warp instructions per 1000 MAC in prefill and per 2048 weights in decode, by chip and variant, in float16.

    2048 weights of 4 bits are the KiB that names the second; 3-bit kernels count as many.
    """
    costs: dict[str, Any] = {"prefill_per_1000_mac": {}, "decode_per_kib": {}, "edge_llm": EDGE_LLM}
    for chip in CHIPS:
        shipped = cubin(chip)
        for phase, of_chip in chip_costs(shipped, disassemble(shipped)).items():
            costs[phase][chip] = of_chip
    return costs


def chip_costs(shipped: Cubin, code: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """One chip's part of `instruction_costs`."""
    prefill: dict[str, float] = {}
    decode: dict[str, float] = {}
    for kernel in sorted(name for name in shipped.usage if name.endswith("_f16")):
        loop = loop_of(kernel, code[kernel])
        if loop is None:
            continue
        if kernel.startswith("qe_prefill"):
            prefill[variant(kernel)] = round(loop.per_1000_mac, 2)
        else:
            decode[variant(kernel)] = round(loop.per_2048_weights, 2)
    return {"prefill_per_1000_mac": prefill, "decode_per_kib": decode}
