"""What every kernel must keep on every chip. Decode counts 2048 weights, whatever their bits: a KiB of 4-bit ones.

A variant that cannot keep a limit has its own ceiling here, with the reason.
"""

from __future__ import annotations

from gates.cubins import Cubin
from gates.loops import Loop, hot_loop

DECODE_REGISTERS, GEMM_REGISTERS, OTHER_REGISTERS = 128, 184, 128
GEMM_PER_MMA, GEMM_PER_1000_MAC, DECODE_PER_2048 = 8.0, 2.0, 80.0

# Measured on all chips, plus 3 %, for what cannot keep the goals.
#
# s8_g64z: a group of 64 rows joins the float sums with an FADD and an FFMA for 2 IMMA and each of their 4 sums: 256
# instructions for the 64 IMMA of a chunk. Zero points are taken off 32 registers of weights: mask and guard, subtract,
# flip, and turn half of them first, 112. With the IMMA, 16 ldmatrix, 16 conversions of scales and 12 loads that makes
# 476 of the 512 that the goal allows, and the copies of the next chunk need about 50.
GEMM_PER_MMA_EXCEPTIONS = {"s8_g64z": 9.3}
GEMM_PER_1000_MAC_EXCEPTIONS = {"s8_g64z": 2.27}
# sm_120 wants an instruction between two HMMA, and where there is none ptxas puts a NOP: about 70 of them for 128 HMMA.
SM_120_GEMM_PER_1000_MAC_EXCEPTIONS = {"h_g128z": 2.2, "h_g64z": 2.25, "hw3_g128z": 2.21, "hw3_g64z": 2.2}
# 9 to 16 tokens have twice the sums of 1 to 8, and every group costs each of them an FFMA (16-bit activations), or
# FADD, FFMA and IMAD (int8). In 2 KiB of weights with groups of 64: 80 to unpack, 32 HMMA, 32 FFMA, 8 HMMA and 8 PRMT
# for zero points, 20 loads and 8 conversions are 188 of the 160 that the goal allows; 48 to unpack, 16 IMMA and 96 of
# those three, with 28 loads and conversions, are 188 in int8. 2048 weights of 3 bits take 42 (16-bit activations) and
# 34 (int8) instructions to unpack, where 4 bits take 40 and 24, and half a load less; int8 ones in groups of 64 have
# one chunk in flight instead of two, which do not fit 128 registers on sm_110: 2 more.
DECODE_PER_2048_EXCEPTIONS = {
    "h_g128z_t16": 91.0, "h_g64z_t16": 108.0, "s8_g64_t16": 83.0, "s8_g64z_t16": 115.0,
    "hw3_g128z_t16": 91.0, "hw3_g64z_t16": 110.0, "s8w3_g64_t16": 94.0,
}  # fmt: skip


def variant(kernel: str) -> str:
    """``s8_g128z`` of ``qe_prefill_s8_g128z_f16``; decode keeps its token limit."""
    return "_".join(kernel.split("_")[2:-1])


def loop_of(kernel: str, code: list[str]) -> Loop | None:
    """The loop over K of a GEMM or decode kernel."""
    if not kernel.startswith(("qe_prefill", "qe_decode")):
        return None
    return hot_loop(code, weight_bits=3 if "w3" in variant(kernel) else 4)


def broken(code: Cubin, kernel: str, loop: Loop | None) -> list[str]:
    """The limits that one kernel breaks on one chip."""
    usage, kind = code.usage[kernel], variant(kernel)
    gemm, decode = kernel.startswith("qe_prefill"), kernel.startswith("qe_decode")
    registers = GEMM_REGISTERS if gemm else DECODE_REGISTERS if decode else OTHER_REGISTERS
    checks = {
        f"{usage.registers} registers, limit {registers}": usage.registers > registers,
        f"{usage.local_bytes} bytes of local memory": usage.local_bytes > 0,
        f"{usage.stack_bytes} bytes of stack": usage.stack_bytes > 0,
    }
    if loop is not None:
        integer = kind.startswith("s8")
        checks["no IMMA in the loop"] = integer and loop.imma == 0
        checks["no HMMA in the loop"] = not integer and loop.hmma == 0
        if gemm:
            most = GEMM_PER_MMA_EXCEPTIONS.get(kind, GEMM_PER_MMA)
            checks["no asynchronous copies in the loop"] = loop.async_copies == 0
            checks[f"{loop.per_mma:.2f} instructions per MMA, limit {most}"] = loop.per_mma > most
            exceptions = GEMM_PER_1000_MAC_EXCEPTIONS
            if code.chip == "sm_120":
                exceptions = exceptions | SM_120_GEMM_PER_1000_MAC_EXCEPTIONS
            most = exceptions.get(kind, GEMM_PER_1000_MAC)
            checks[f"{loop.per_1000_mac:.2f} instructions per 1000 MAC, limit {most}"] = loop.per_1000_mac > most
            checks["byte-wide shared loads"] = loop.narrow_shared_loads > 0
        else:
            most = DECODE_PER_2048_EXCEPTIONS.get(kind, DECODE_PER_2048)
            checks["no streaming weight loads in the loop"] = loop.weight_loads == 0
            checks[f"{loop.per_2048_weights:.0f} instructions per 2048 weights, limit {most}"] = (
                loop.per_2048_weights > most
            )
    return [f"{code.chip} {kernel}: {what}" for what, is_broken in checks.items() if is_broken]
