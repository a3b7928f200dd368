"""The planted bugs of rung 4. Each is one edit of shipped code; the ladder fails if any of them goes unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.cases import Mode


@dataclass(frozen=True)
class Planted:
    """Replace `before`, which occurs exactly once in `file`, with `after`; `tokens` and `mode` show it."""

    name: str
    file: str
    before: str
    after: str
    tokens: int
    mode: Mode
    rung: Literal["source", "ptx"] = "source"


INT8 = Mode("w4a8", experts=4)
HALF = Mode("w4a16_g128", act_bits=0, group_size=128, zeros=True, experts=4)
LONE = Mode("w4a8_shared", experts=0)
ZEROS = Mode("w4a8_g128_asym", group_size=128, zeros=True, experts=0)
INT8_W3 = Mode("w3a8", weight_bits=3, experts=0)
HALF_W3 = Mode("w3a16_g128", weight_bits=3, act_bits=0, group_size=128, zeros=True, experts=0)

PREFILL, DECODE = "kernels/main_prefill.cuh", "kernels/main_decode.cuh"
DOWN, PREPARE, UNPACK = "kernels/lowrank_down.cuh", "kernels/prepare.cuh", "kernels/unpack.cuh"

PLANTED = [
    Planted("missing barrier in the pipeline", PREFILL, "    block_sync();  // the stage", "    // the stage", 40, LONE),
    Planted(
        "missing barrier before the decode sums", DECODE,
        "  block_sync();\n  for (int o = thread_id(); o < kDecodeColumns", "  for (int o = thread_id(); o < kDecodeColumns", 3, LONE,
    ),
    Planted(
        "missing barrier in the token maximum", PREPARE,
        "  block_sync();\n  const int slot", "  const int slot", 2, LONE,
    ),
    Planted(
        "missing barrier in the counting sort", DOWN,
        "  if (lane < 16) counts[warp * 16 + lane] = mine;\n  block_sync();",
        "  if (lane < 16) counts[warp * 16 + lane] = mine;", 40, INT8,
    ),
    Planted("waits for one copy too few", PREFILL, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", 40, LONE),
    Planted("registers of the B fragment swapped", PREFILL,
            "mma_s8(acc[i][j], a[step], of_sum[2 * step], of_sum[2 * step + 1], acc",
            "mma_s8(acc[i][j], a[step], of_sum[2 * step + 1], of_sum[2 * step], acc", 17, LONE),
    Planted("high nibbles read as low ones", UNPACK,
            "a[3] = half ? high_codes<Zeros>(v1)", "a[3] = half ? low_codes<Zeros>(v1)", 3, LONE),
    Planted("misaligned copy", PREFILL, "weight + i * kPieceBytes);", "weight + i * kPieceBytes + (i == 1 ? 8 : 0));", 17, LONE),
    Planted("lost tail of M", PREFILL,
            "const int last = m < p.M ? m : p.M - 1;\n    return", "const int last = m;\n    return", 17, LONE),
    Planted("lost tail of N", PREFILL, "        if (n >= p.N) continue;\n        const float* scale", "        const float* scale", 17, LONE),
    Planted("lost tail of K in the down-projection", DOWN, "if (k < p.K) x[t] = load16", "x[t] = load16", 3, LONE),
    Planted("stale expert", PREFILL, "expert[i][h] = p.expert[token[i][h]];", "expert[i][h] = p.expert[token[i][0]];", 40, INT8),
    Planted("largest score wins", PREPARE, "if (score[e] < score[best]) best = e;", "if (score[e] > score[best]) best = e;", 3, INT8),
    Planted("reads a swizzle that was not written", PREFILL,
            "load_matrix(a[step], s + S::offset(row + (lane & 15), first + step * 2 + (lane >> 4)));",
            "load_matrix(a[step], s + (row + (lane & 15)) * S::kRowBytes + (first + step * 2 + (lane >> 4)) * 16);", 17, LONE),
    Planted("writes tokens of another window", DOWN, "if (hit && at >= 0 && at < kDownTokens)", "if (hit && at < kDownTokens)", 150, INT8),
    Planted("scale of the wrong group", PREFILL, "scales += S::kScales / 4;", "scales += 0;", 17, HALF),
    Planted("zero point added", UNPACK, "sub_f16x2(r[0], zero)", "sub_f16x2(r[0], zero ^ 0x80008000u)", 17, HALF),
    Planted("zero point's sum with the wrong sign", PREPARE, "-0.25f * sum", "0.25f * sum", 3, HALF),
    Planted("int8 zero point added", DECODE, "kMagicBits - (Zeros", "kMagicBits + (Zeros", 3, ZEROS),
    Planted("a borrow crosses bytes", UNPACK, "0x80808080u) - zero) ^", "0x80808000u) - zero) ^", 17, ZEROS),
    Planted("no sums for absent tokens", PREPARE, "token == p.M - 1 ? kSumTokens", "token == p.M ? kSumTokens", 3, HALF),
    Planted("x in the order of the other phase", PREPARE, "if (!p.decode_order) {", "if (p.decode_order) {", 3, LONE),
    Planted("units too small for the largest x", PREPARE, "(261u - exponent)", "(277u - exponent)", 17, HALF),
    Planted("codes that stand higher count more", PREPARE, "(127u - shift) << 23", "127u << 23", 17, HALF),
    Planted("3 bits: the second code shifted too little", UNPACK, "c & 1 ? word << 3", "c & 1 ? word << 2", 3, INT8_W3),
    Planted("3 bits: spare bits of two words swapped", UNPACK,
            "select_bits<0xC0C0C0C0u>(a << 6, select_bits<0x30303030u>(b << 4",
            "select_bits<0xC0C0C0C0u>(b << 6, select_bits<0x30303030u>(a << 4", 17, INT8_W3),
    Planted("3 bits: the mask lets a bit of the next code in", UNPACK, "w & 0xE0E0E0E0u", "w & 0xE0E0E0F0u", 17, INT8_W3),
    Planted("3 bits: a word of the next tile", UNPACK, "w[c / 2].v[tile]", "w[c / 2].v[tile ^ (c == 4)]", 3, INT8_W3),
    Planted("3 bits: weights that nobody copies", PREFILL, "Bits == 3 ? thread_id() < 128", "Bits == 3 ? thread_id() < 96", 17, INT8_W3),
    Planted("3 bits: a spare bit of the wrong word", UNPACK,
            "select_bits<0x00030003u>(two,", "select_bits<0x00010001u>(two,", 3, HALF_W3),
    Planted("3 bits: upper codes shifted by a bit too many", UNPACK, ">> (9 - word)", ">> (10 - word)", 17, HALF_W3),
    Planted("3 bits: the factor of another register", UNPACK, "unit_pair(first + 1)", "unit_pair(first + 2)", 17, HALF_W3),
    Planted("3 bits: the zero point's sign", UNPACK, ".zero ^ 0x80008000u", ".zero ^ 0x00008000u", 17, HALF_W3),
    Planted("asm: halves of a pair swapped", "kernels/prim_ptx.cuh",
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));',
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(lo), "f"(hi));', 17, LONE, "ptx"),
    Planted("asm: waits for one copy too few", "kernels/prim_ptx.cuh", '"n"(Pending)', '"n"(Pending + 1)', 40, LONE, "ptx"),
    Planted("asm: registers of the B fragment swapped", "kernels/prim_ptx.cuh",
            '"r"(a[3]), "r"(b0), "r"(b1), "r"(c[0])', '"r"(a[3]), "r"(b1), "r"(b0), "r"(c[0])', 3, LONE, "ptx"),
    Planted("asm: wrong truth table", "kernels/prim_ptx.cuh", "0xEA;", "0xE8;", 17, ZEROS, "ptx"),
    Planted("asm: the difference the wrong way", "kernels/prim_ptx.cuh",
            '"sub.rn.f16x2 %0, %1, %2;"', '"sub.rn.f16x2 %0, %2, %1;"', 17, HALF, "ptx"),
    Planted("asm: rows of the short A fragment swapped", "kernels/prim_ptx.cuh",
            '"r"(a0), "r"(a1), "r"(b)', '"r"(a1), "r"(a0), "r"(b)', 3, HALF, "ptx"),
    Planted("asm: factor and summand swapped", "kernels/prim_ptx.cuh",
            '"fma.rn.f16x2 %0, %1, %2, %3;"', '"fma.rn.f16x2 %0, %1, %3, %2;"', 17, HALF_W3, "ptx"),
    Planted("asm: turned the other way", "kernels/prim_ptx.cuh", "__funnelshift_r(v", "__funnelshift_l(v", 3, ZEROS, "ptx"),
    Planted("asm: the barrier is empty", "kernels/prim_ptx.cuh", "__syncthreads();", "", 3, LONE, "ptx"),
]  # fmt: skip
