"""What every kernel must keep on every chip. A variant that cannot has its own ceiling here, with the reason."""

from __future__ import annotations

from gates.cubins import Cubin
from gates.loops import Loop, hot_loop

DECODE_REGISTERS, GEMM_REGISTERS, OTHER_REGISTERS = 128, 184, 128
GEMM_PER_MMA = 8.0
INT8_GEMM_PER_1000_MAC, DECODE_PER_KIB = 2.0, 80.0

# Group scales join the float sums once per group: 8 float operations for 4 IMMA (128) or for 2 (64), and zero points
# are taken off every weight first. Measured on all chips, plus 3 %.
GEMM_PER_MMA_EXCEPTIONS = {"s8_g64": 10.4, "s8_g128z": 10.6, "s8_g64z": 13.2, "h_gz": 8.9}
GEMM_REGISTER_EXCEPTIONS = {"s8_g128": 216, "s8_g128z": 216}
DECODE_PER_KIB_EXCEPTIONS = {
    "s8_cz_t16": 90.0, "s8_g128z_t8": 105.0, "s8_g128z_t16": 125.0, "s8_g64_t8": 88.0, "s8_g64_t16": 120.0,
    "s8_g64z_t8": 130.0, "s8_g64z_t16": 160.0, "s8_g128_t16": 88.0,
    # 16-bit activations: an HMMA eats half the weights of an IMMA and each must be made a float first.
    "h_cz_t8": 123.0, "h_cz_t16": 143.0, "h_gz_t8": 160.0, "h_gz_t16": 185.0,
}  # fmt: skip


def variant(kernel: str) -> str:
    """``s8_g128z`` of ``qe_prefill_s8_g128z_f16``; decode keeps its token limit."""
    return "_".join(kernel.split("_")[2:-1])


def loop_of(kernel: str, code: list[str]) -> Loop | None:
    """The loop over K of a GEMM or decode kernel; the 16-bit GEMM passes twice through its inner loop per chunk."""
    if not kernel.startswith(("qe_prefill", "qe_decode")):
        return None
    return hot_loop(code, inner_passes=2 if kernel.startswith("qe_prefill_h") else 1)


def broken(code: Cubin, kernel: str, loop: Loop | None) -> list[str]:
    """The limits that one kernel breaks on one chip."""
    usage, kind = code.usage[kernel], variant(kernel)
    gemm, decode = kernel.startswith("qe_prefill"), kernel.startswith("qe_decode")
    registers = OTHER_REGISTERS
    if gemm:
        registers = GEMM_REGISTER_EXCEPTIONS.get(kind, GEMM_REGISTERS)
    elif decode:
        registers = DECODE_REGISTERS
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
            zero_rows = loop.mma // 64 * (2 if kind == "s8_g64z" else 1) * 8  # the zero points are bytes by design
            checks["byte-wide shared loads"] = loop.narrow_shared_loads > (zero_rows if kind.endswith("z") else 0)
        else:
            most = DECODE_PER_KIB_EXCEPTIONS.get(kind, DECODE_PER_KIB)
            checks["no streaming weight loads in the loop"] = loop.weight_loads == 0
            checks[f"{loop.per_kib:.0f} instructions per KiB of weights, limit {most}"] = loop.per_kib > most
    return [f"{code.chip} {kernel}: {what}" for what, is_broken in checks.items() if is_broken]
