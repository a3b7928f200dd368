"""What every kernel must keep on every chip. Decode counts 2048 weights, whatever their bits: a KiB of 4-bit ones.

A variant that cannot keep a limit has its own ceiling here, with the reason.
"""

from __future__ import annotations

from emulator.ptx_text import CLUSTER_KERNELS
from gates.cubins import Cubin
from gates.loops import Loop, hot_loop

# A multiprocessor has one block of decode, of at most 12 warps, so that its registers are no reason to take fewer; and
# one or two of the down-projection of long prompts, of 8 warps.
DECODE_REGISTERS, GEMM_REGISTERS, PREPARE_REGISTERS, OTHER_REGISTERS = 168, 184, 64, 128
WIDE_REGISTERS = 255  # two blocks of 4 warps, whose 64 x 64 sums take 128
CLUSTER_REGISTERS = 128  # two blocks of 8 warps
GEMM_PER_MMA, GEMM_PER_1000_MAC, DECODE_PER_2048 = 8.0, 2.0, 80.0

# Every GEMM keeps the goals. The dearest are on sm_120, where ptxas puts a NOP between two neighbouring matrix
# instructions, dependent or not: about 67 for the 128 HMMA of a chunk, 44 for 64 IMMA. There h_g64z has 1.95 per 1000
# MAC and s8_g64z 1.91, or 7.8 per IMMA.
#
# Decode measured on all chips, plus 3 %, for what cannot keep its goal. 5 to 64 tokens have twice the sums of 1 to 4,
# and every group costs each of them an FFMA. The ring that brings the weights in, before the launch in front ends and
# without registers, costs every variant 9 to 14 of 2048 weights: of 4096 weights the 8 loads become 8 LDGSTS and 8 LDS,
# and there are 2 groups to close and 2 to wait for, 6 empty LDS that ptxas puts in front of LDGSTS, and about 20 for
# the places of both ends of the ring. What 4096 weights cannot do without besides, of the 160 that the goal allows:
# h_g64z: 64 to unpack, 32 HMMA, 32 FFMA, 8 short HMMA and 8 PRMT for zero points, 8 conversions, 18 loads: 170, and 130
# of at most 4 tokens. Two chunks at once spill.
# h_g128z, 5 tokens and more: 64 to unpack, 32 HMMA, 16 FFMA, 4 short HMMA and 4 PRMT, 4 conversions, 14 loads: 138, one
# chunk at a time.
# hw3_g128z: 84 to unpack and all else as h_g128z: 158. hw3_g64z: 84, and all else as h_g64z but for one load: 189.
# s8_g64z: 48 to unpack, 16 IMMA, 32 FFMA and 16 FADD, 16 for scales, 4 HMMA and 14 for zero points, 12 loads: 158.
# s8_g128z: 48, 16 IMMA, 32 FFMA and FADD, 8 for scales, 16 for zero points, 10 loads: 130.
# s8_g64 and s8w3_g64: 48 or 68 to unpack, 16 IMMA, 48 for sums, 16 for scales, 9 loads: 137 and 157.
# All with two groups for 5 tokens and more take one chunk at a time: two spill on sm_110 and sm_120.
# Kernels of clusters take one chunk at a time, as two of their blocks share the registers: up to 3 per 2048 more.
# Also tried: pointers by IMAD.WIDE, which ptxas splits into a product and a sum of 64 bits; 32-bit offsets, which it
# adds to their base in as many instructions; the short products at other steps of the 16-bit kernels.
DECODE_PER_2048_EXCEPTIONS = {
    "h_g64z_t8": 82.9, "hw3_g64z_t8": 91.9, "h_g128z_t16": 94.8, "h_g64z_t16": 112.3, "hw3_g128z_t16": 103.0,
    "hw3_g64z_t16": 117.4, "s8_g128z_t16": 85.3, "s8_g64_t16": 91.7, "s8_g64z_t16": 106.6, "s8w3_g64_t16": 99.9,
    "h_g64z_cluster": 85.4, "hw3_g64z_cluster": 94.2, "hw3_g128z_cluster": 84.9, "s8_g64z_cluster": 84.9,
}  # fmt: skip


def variant(kernel: str) -> str:
    """``s8_g128z`` of ``qe_prefill_s8_g128z_f16``; decode keeps its token limit, and a wide tile its name.

    Kernels of clusters are ``s8_g128z_cluster``.
    """
    return "_".join(kernel.split("_")[2:-1]) + "_cluster" * kernel.startswith(CLUSTER_KERNELS)


def loop_of(kernel: str, code: list[str]) -> Loop | None:
    """The loop over K of a GEMM or decode kernel, or of one of clusters."""
    if not kernel.startswith(("qe_prefill", "qe_decode", CLUSTER_KERNELS)):
        return None
    return hot_loop(code, weight_bits=3 if "w3" in variant(kernel) else 4)


def register_limit(kernel: str) -> int:
    """The most registers that a kernel may take, by either assembler."""
    if kernel.startswith("qe_prefill"):
        return WIDE_REGISTERS if "_wide_" in kernel else GEMM_REGISTERS
    if kernel.startswith(CLUSTER_KERNELS):
        return CLUSTER_REGISTERS
    if kernel.startswith(("qe_decode", "qe_down_prefill")):
        return DECODE_REGISTERS
    return PREPARE_REGISTERS if kernel in ("qe_prepare_f16", "qe_prepare_bf16") else OTHER_REGISTERS


def broken(code: Cubin, kernel: str, loop: Loop | None) -> list[str]:
    """The limits that one kernel breaks on one chip."""
    usage, kind = code.usage[kernel], variant(kernel)
    registers = register_limit(kernel)
    checks = {
        f"{usage.registers} registers, limit {registers}": usage.registers > registers,
        f"{usage.local_bytes} bytes of local memory": usage.local_bytes > 0,
        f"{usage.stack_bytes} bytes of stack": usage.stack_bytes > 0,
    }
    if loop is not None:
        integer = kind.removeprefix("wide_").startswith("s8")
        checks["no IMMA in the loop"] = integer and loop.imma == 0
        checks["no HMMA in the loop"] = not integer and loop.hmma == 0
        if kernel.startswith("qe_prefill"):
            checks["no asynchronous copies in the loop"] = loop.async_copies == 0
            checks[f"{loop.per_mma:.2f} instructions per MMA, limit {GEMM_PER_MMA}"] = loop.per_mma > GEMM_PER_MMA
            checks[f"{loop.per_1000_mac:.2f} instructions per 1000 MAC, limit {GEMM_PER_1000_MAC}"] = (
                loop.per_1000_mac > GEMM_PER_1000_MAC
            )
            checks["byte-wide shared loads"] = loop.narrow_shared_loads > 0
        else:
            most = DECODE_PER_2048_EXCEPTIONS.get(kind, DECODE_PER_2048)
            products = (8 if integer else 16) * (
                2 if kind.endswith("t16") else 1
            )  # of a warp with a chunk, for all tokens
            checks["copies other than the weights that it multiplies"] = (
                loop.async_copies * products != loop.weight_bits * loop.mma
            )
            checks["weights that do not come from shared memory"] = loop.shared_loads < loop.async_copies
            checks[f"{loop.per_2048_weights:.0f} instructions per 2048 weights, limit {most}"] = (
                loop.per_2048_weights > most
            )
    return [f"{code.chip} {kernel}: {what}" for what, is_broken in checks.items() if is_broken]
