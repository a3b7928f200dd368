"""The Triton kernels: tokens to integers and experts, the down-projection, and the product with its epilogue.

Matrices are row-major. A pointer whose operand a layer lacks is given, but not read: the constants say what is there.
"""

import triton
import triton.language as tl

# Adding and taking away 1.5 * 2^23 rounds a small float32 to an integer, half to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def widen(value):
    """Float32 of a 16-bit value or a byte. bfloat16 goes by its bits: for it the interpreter's own way is very slow."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def narrow(value, kind: tl.constexpr):
    """A float32 as `kind`, to nearest even. The interpreter would cut bfloat16 off where the hardware rounds."""
    if kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(kind)


@triton.jit
def prepare(
    x, inv_omega, router, values, token_scale, expert, M, E,
    K: tl.constexpr, TOP: tl.constexpr, SCALED: tl.constexpr, ROUTED: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Channel scale, integers up to TOP (16-bit values when TOP is 0), and the expert with the smallest score."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.arange(0, BE)
    largest = tl.zeros((BM,), tl.float32)
    score = tl.zeros((BM, BE), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = widen(tl.load(x + m[:, None] * K + k[None, :], mask=inside, other=0.0))
        if ROUTED:
            known = (k < K)[:, None] & (e < E)[None, :]
            weight = widen(tl.load(router + k[:, None] * E + e[None, :], mask=known, other=0.0))
            score = tl.dot(tl.abs(value), weight, score, input_precision="ieee")
        if SCALED:
            value *= widen(tl.load(inv_omega + k, mask=k < K, other=0.0))[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=1))
    if ROUTED:
        infinity = float("inf")
        finite = tl.min(((tl.abs(score) < infinity) | (e >= E)[None, :]).to(tl.int32), axis=1)
        best = tl.argmin(tl.where((e < E)[None, :], score, infinity), axis=1)
        tl.store(expert + m, tl.where(finite == 1, best, 0), mask=m < M)
    scale = tl.maximum(largest, 1e-5) / TOP if TOP else largest
    tl.store(token_scale + m, scale, mask=m < M)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = widen(tl.load(x + m[:, None] * K + k[None, :], mask=inside, other=0.0))
        if SCALED:
            value *= widen(tl.load(inv_omega + k, mask=k < K, other=0.0))[None, :]
        if TOP:
            value = (tl.div_rn(value, scale[:, None] + tl.zeros_like(value)) + ROUND) - ROUND
            value = tl.minimum(tl.maximum(value, -TOP - 1), TOP)
        tl.store(values + m[:, None] * K + k[None, :], narrow(value, values.dtype.element_ty), mask=inside)


@triton.jit
def project_down(
    x, down, down_scale, expert, h, M, R, SHARED_RANK, ROUTED_RANK,
    K: tl.constexpr, INT8: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``h = (x @ down) * mask``: the shared columns and those of each token's expert; zero elsewhere."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        value = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        factor = tl.load(down + k[:, None] * R + r[None, :], mask=(k < K)[:, None] & (r < R)[None, :], other=0)
        total = tl.dot(widen(value), widen(factor), total, input_precision="ieee")
    if INT8:
        total *= widen(tl.load(down_scale + r, mask=r < R, other=0.0))[None, :]
    owner = (r - SHARED_RANK) // ROUTED_RANK
    mine = tl.load(expert + m, mask=m < M, other=0)
    total = tl.where((r < SHARED_RANK)[None, :] | (owner[None, :] == mine[:, None]), total, 0.0)
    tl.store(h + m[:, None] * R + r[None, :], total, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def multiply(
    values, token_scale, weight, scales, zeros, h, up, up_scale, bias, y, M, N,
    K: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr, ZEROS: tl.constexpr,
    LOWRANK: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y = (values @ (q - zero) * scale) * token_scale + h @ up + bias``; a byte of weight holds two rows of K.

    BK divides GROUP, so that a step meets one scale; without groups GROUP is 0.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        known = (k < K)[:, None] & (n < N)[None, :]
        byte = tl.load(weight + (k // 2)[:, None] * N + n[None, :], mask=known, other=0).to(tl.int32)
        q = (((byte >> (k % 2 * 4)[:, None]) & 15) ^ 8) - 8
        group = start // GROUP if GROUP else 0
        if ZEROS:
            q -= tl.load(zeros + group * N + n, mask=n < N, other=0).to(tl.int32)[None, :]
        value = tl.load(values + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        if INTEGER:
            product = tl.dot(value, q.to(tl.int8), out_dtype=tl.int32).to(tl.float32)
        else:
            product = tl.dot(widen(value), q.to(tl.float32), input_precision="ieee")
        total += product * widen(tl.load(scales + group * N + n, mask=n < N, other=0.0))[None, :]
    if INTEGER:
        total *= tl.load(token_scale + m, mask=m < M, other=0.0)[:, None]
    if LOWRANK:
        correction = tl.zeros((BM, BN), tl.float32)
        for start in range(0, R, BR):
            r = start + tl.arange(0, BR)
            hidden = tl.load(h + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
            factor = tl.load(up + r[:, None] * N + n[None, :], mask=(r < R)[:, None] & (n < N)[None, :], other=0)
            correction = tl.dot(hidden, widen(factor), correction, input_precision="ieee")
        if INT8:
            correction *= widen(tl.load(up_scale + n, mask=n < N, other=0.0))[None, :]
        total += correction
    if BIAS:
        total += widen(tl.load(bias + n, mask=n < N, other=0.0))[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], narrow(total, y.dtype.element_ty), mask=inside)
