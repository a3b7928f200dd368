"""The planted bugs of rung 4. Each is one edit of shipped code; the ladder fails if any of them goes unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.cases import Mode


@dataclass(frozen=True)
class Planted:
    """Replace `before`, which occurs exactly once in `file`, with `after`; `tokens` and `mode` show it.

    Where `slices` are given, blocks share the K of their columns; `shape`, K and N, is not the usual one; `rows` are those
    of a GEMM's block; `clusters` are blocks of a cluster, of which there are two.
    """

    name: str
    file: str
    before: str
    after: str
    tokens: int
    mode: Mode
    rung: Literal["source", "ptx"] = "source"
    slices: int = 0
    shape: tuple[int, int] | None = None
    rows: int = 0
    clusters: int = 0


INT8 = Mode("w4a8", experts=4)
HALF = Mode("w4a16_g128", act_bits=0, group_size=128, zeros=True, experts=4)
HALF_LONE = Mode("w4a16_g128_lone", act_bits=0, group_size=128, zeros=True, experts=0, rank_shared=0)
LONE = Mode("w4a8_shared", experts=0)
ZEROS = Mode("w4a8_g128_asym", group_size=128, zeros=True, experts=0)
ZEROS_64 = Mode("w4a8_g64_asym", group_size=64, zeros=True, experts=0)
ZEROS_64_ROUTED = Mode("w4a8_g64_asym_routed", group_size=64, zeros=True, experts=4)
SIX_BITS = Mode("w4a6", act_bits=6, experts=0)
INT8_W3 = Mode("w3a8", weight_bits=3, experts=0)
HALF_W3 = Mode("w3a16_g128", weight_bits=3, act_bits=0, group_size=128, zeros=True, experts=0)

MANY_RANKS = Mode("w4a8_128", experts=0, rank_shared=128, adapter_bits=4)
PLAIN = Mode("w4a8_plain", experts=0, rank_shared=0)
CHANNEL_ZEROS = Mode("w4a8_asym", zeros=True, experts=0)
ROUTED = Mode("w4a8_routed", experts=4, rank_shared=0)
INT4_FACTORS = Mode("w4a8_int4_factors", adapter_bits=4, experts=4)

PREFILL, DECODE = "kernels/main_prefill.cuh", "kernels/main_decode.cuh"
LOADER, WIDE = "kernels/prefill_loader.cuh", "kernels/main_prefill_wide.cuh"
AT_ONCE, EPILOGUE = "kernels/prepare_prefill.cuh", "kernels/prefill_epilogue.cuh"
CHUNK, TOKENS = "kernels/decode_chunk.cuh", "kernels/decode_tokens.cuh"
PLAN = "host/plan.cpp"
CLUSTER, CORRECTION = "kernels/main_cluster.cuh", "kernels/cluster_correct.cuh"
PTX_PRIMITIVES = "kernels/prim_ptx.cuh"
DOWN, PREPARE, UNPACK = "kernels/lowrank_down.cuh", "kernels/prepare.cuh", "kernels/unpack.cuh"

PLANTED = [
    Planted("missing barrier in the pipeline", PREFILL, "    block_sync();  // the stage", "    // the stage", 72, LONE),
    Planted(
        "missing barrier before the decode sums", DECODE,
        "    block_sync();\n    // A warp stores", "    // A warp stores", 3, LONE,
    ),
    Planted(
        "missing barrier in the token maximum", PREPARE,
        "  block_sync();\n  const int slot", "  const int slot", 65, INT8,
    ),
    Planted(
        "missing barrier in the counting sort", DOWN,
        "  if (lane < 16) counts[warp * 16 + lane] = mine;\n  block_sync();",
        "  if (lane < 16) counts[warp * 16 + lane] = mine;", 72, INT8,
    ),
    Planted("waits for one copy too few", PREFILL, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", 72, LONE),
    Planted("registers of the B fragment swapped", PREFILL,
            "mma_s8(to, a[step], b[j][2 * step], b[j][2 * step + 1], to)",
            "mma_s8(to, a[step], b[j][2 * step + 1], b[j][2 * step], to)", 65, LONE),
    Planted("high nibbles read as low ones", UNPACK,
            "a[3] = half ? high_codes<Zeros>(v1)", "a[3] = half ? low_codes<Zeros>(v1)", 3, LONE),
    Planted("misaligned copy", LOADER, "weight + i * kPieceBytes);", "weight + i * kPieceBytes + (i == 1 ? 8 : 0));", 65, LONE),
    Planted("lost tail of M", LOADER,
            "const int last = m < p.M ? m : p.M - 1;\n  return", "const int last = m;\n  return", 65, LONE),
    Planted("lost tail of N", EPILOGUE, "< p.M && n < p.N)", "< p.M)", 65, LONE),
    Planted("lost tail of K in the down-projection", DOWN, "if (k < p.K) x[t] = load16", "x[t] = load16", 3, LONE),
    Planted("stale expert", EPILOGUE, "p.expert[token_of(p, m0 + wm + i * 16 + h * 8 +", "p.expert[token_of(p, m0 + wm + i * 16 +", 72, INT8),
    Planted("largest score wins", PREPARE, "if (score[e] < score[best]) best = e;", "if (score[e] > score[best]) best = e;", 3, INT8),
    Planted("reads a swizzle that was not written", PREFILL,
            "load_matrix(a[step], s + S::offset(row + (lane & 15), first + step * 2 + (lane >> 4)));",
            "load_matrix(a[step], s + (row + (lane & 15)) * S::kRowBytes + (first + step * 2 + (lane >> 4)) * 16);", 65, ZEROS_64),
    Planted("pieces of the next step", PREFILL, "(first / 2 + step) % 4", "(first / 2 + step + 1) % 4", 65, LONE),
    Planted("16 bits: pieces of the first half twice", PREFILL, "first / 8 * 128", "0 * 128", 65, HALF),
    Planted("writes tokens of another window", DOWN, "if (hit && at >= 0 && at < kDownTokens)", "if (hit && at < kDownTokens)", 150, INT8),
    Planted("scale of the wrong group", LOADER, "group += group_step;", "group += 0;", 65, HALF),
    Planted("zero point added", UNPACK, "sub_f16x2(r[0], zero)", "sub_f16x2(r[0], zero ^ 0x80008000u)", 65, HALF),
    Planted("zero point of the column 8 to the left", UNPACK, "repeat_half<true>(zero)", "repeat_half<false>(zero)", 65, HALF),
    Planted("scale of the column 8 to the left", UNPACK, "repeat_half<true>(scales)", "repeat_half<false>(scales)", 65, HALF),
    Planted("zero point's sum with the wrong sign", PREPARE, ": -0.25f * sum", ": 0.25f * sum", 3, HALF),
    Planted("int8 zero point added", CHUNK, "kMagicBits - (Zeros", "kMagicBits + (Zeros", 3, ZEROS),
    Planted("a borrow crosses bytes", UNPACK, "0x80808080u) - zero) ^", "0x80808000u) - zero) ^", 65, ZEROS),
    Planted("two groups: the start value of one", UNPACK, "fma_f(s0, kStart, s1 * kStart)", "fma_f(s0, kStart, s0 * kStart)", 65, ZEROS_64),
    Planted("two groups: zero point of the first for both", PREFILL,
            "row = wn * 2 + (lane >> 1 & 1) * kBlockColumns", "row = wn * 2", 65, ZEROS_64),
    Planted("two groups: sums of the other row tile", PREFILL, "a[2 * h], a[2 * h + 1], b[j]", "a[2 * h], a[2 * h], b[j]", 65, ZEROS_64),
    Planted("two groups: sums of the other group", PREPARE, "group % 2 * 2;", "(group + 1) % 2 * 2;", 65, ZEROS_64),
    Planted("two groups: the larger part of a GEMM's sum twice", PREPARE,
            "twice_half(word, 0), twice_half(word, 1)", "twice_half(word, 0), twice_half(word, 0)", 65, ZEROS_64),
    Planted("two groups: sums of another token", LOADER, "token_of(p, m0 + past_zeros)",
            "m0 + past_zeros < p.M ? m0 + past_zeros : p.M - 1", 72, ZEROS_64_ROUTED),
    Planted("two groups: sums of the wrong chunk", LOADER, "group_step = p.M * S::kSumBytes", "group_step = S::kSumBytes", 65, ZEROS_64),
    Planted("two groups: sums that nobody copies", LOADER, "(S::kSumBytes ? rows : 0)", "(S::kSumBytes ? rows - 16 : 0)", 65, ZEROS_64),
    Planted("two groups: a GEMM forgets the unit", EPILOGUE, "sx * kUnit", "sx", 65, ZEROS_64),
    Planted("two groups: half of the columns twice", PREFILL, "acc[i][kFirstTile + j]", "acc[i][j]", 65, ZEROS_64),
    Planted("two groups: every lane has the first one's zero point", CHUNK,
            "zeros += (lane >> 1 & 1) * kBlockColumns;", "zeros += 0;", 3, ZEROS_64),
    Planted("two groups: scales of the other", CHUNK,
            "second ? scales[1].v[1] : scales[0].v[1]", "second ? scales[0].v[1] : scales[1].v[1]", 3, ZEROS_64),
    Planted("two groups: a zero point's product twice", UNPACK,
            "pick_bytes<0x5410>(most, rest)", "pick_bytes<0x1010>(most, rest)", 3, ZEROS_64),
    Planted("two groups: a sum's larger part twice", UNPACK, "upper ? 0x3232u : 0x1010u", "upper ? 0x1010u : 0x1010u", 3, ZEROS_64),
    Planted("two groups: the zero point's sum with the wrong sign", PREPARE, "p.act_max ? -sum :", "p.act_max ? sum :", 3, ZEROS_64),
    Planted("6 bits: the unit of 8", PREPARE, "act_max == 31 ? 0.25f * unit_of(act_max, largest) : unit", "unit", 3, SIX_BITS),
    Planted("no sums for absent tokens", PREPARE, "token == p.tokens - 1 ? kGroupTokens", "token == p.tokens ? kGroupTokens", 7, HALF),
    Planted("sums in the order of tokens", PREPARE, "to + m % 8 / beside * (2 * beside) + m / 8 * beside + m % beside", "to + m", 3, HALF),
    Planted("sums of int8 in the order of 16 bits", PREPARE, "p.sum_rows == 128 ? 2 : 1", "p.sum_rows == 128 ? 1 : 1", 3, ZEROS),
    Planted("no x for absent tokens", PREPARE, "token == p.tokens - 1 ? p.slots", "token == p.tokens ? p.slots", 11, HALF_LONE),
    Planted("x of the first eight tokens twice", CHUNK, "x + t * 8 * kRowBytes", "x + 0 * t", 11, HALF_LONE),
    Planted("sums of the first eight tokens twice", CHUNK, "return load8(sums);", "return {{load4(sums), load4(sums)}};", 11, HALF_LONE),
    Planted("two codes, of which one stays in the other's x", PREPARE, "from_float<f16_t>(x[i] - shared)", "from_float<f16_t>(x[i])", 3, HALF),
    Planted("two codes, which zero points do not see", PREPARE, "sum += shared;", "", 3, HALF),
    Planted("two codes: x of the wrong eight", PREPARE, "row, k + 8, raw, next", "row, k, raw, next", 3, HALF),
    Planted("two codes of the lower byte", UNPACK, "pick_bytes<0x4341>", "pick_bytes<0x4240>", 3, HALF),
    Planted("x in the order of the other phase", PREPARE, "places = p.decode_order ? kGroupTokens : 0", "places = p.decode_order ? 0 : kGroupTokens", 65, INT8),
    Planted("units too small for the largest x", PREPARE, "(261u - exponent)", "(277u - exponent)", 65, HALF),
    Planted("codes that stand higher count more", PREPARE, "(127u - shift) << 23", "127u << 23", 65, HALF),
    Planted("3 bits: the second code shifted too little", UNPACK, "c & 1 ? word << 3", "c & 1 ? word << 2", 3, INT8_W3),
    Planted("3 bits: spare bits of two words swapped", UNPACK,
            "select_bits<0xC0C0C0C0u>(a << 6, select_bits<0x30303030u>(b << 4",
            "select_bits<0xC0C0C0C0u>(b << 6, select_bits<0x30303030u>(a << 4", 65, INT8_W3),
    Planted("3 bits: the mask lets a bit of the next code in", UNPACK, "w & 0xE0E0E0E0u", "w & 0xE0E0E0F0u", 65, INT8_W3),
    Planted("3 bits: a word of the next tile", UNPACK, "w[c / 2].v[tile]", "w[c / 2].v[tile ^ (c == 4)]", 3, INT8_W3),
    Planted("3 bits: weights that nobody copies", LOADER, "Bits == 3 ? thread_id() < 128", "Bits == 3 ? thread_id() < 96", 65, INT8_W3),
    Planted("3 bits: a spare bit of the wrong word", UNPACK,
            "select_bits<0x00030003u>(two,", "select_bits<0x00010001u>(two,", 3, HALF_W3),
    Planted("3 bits: upper codes shifted by a bit too many", UNPACK, ">> (9 - word)", ">> (10 - word)", 65, HALF_W3),
    Planted("3 bits: the factor of another register", UNPACK, "unit_pair(first + 1)", "unit_pair(first + 2)", 65, HALF_W3),
    Planted("3 bits: the zero point's sign", UNPACK, "neg_f16x2(both[j].zero)", "both[j].zero", 65, HALF_W3),
    Planted("INT4 factors: the offset of 7", UNPACK, "0x64006400u), 0x64086408u)", "0x64006400u), 0x64076407u)", 3, INT4_FACTORS),
    Planted("INT4 factors: codes that stand higher count 16 times", UNPACK, "0x2C002C00u, 0xD480D480u", "0x3C003C00u, 0xE480E480u", 65, INT4_FACTORS),
    Planted("INT4 factors: the lower registers twice", UNPACK, "codes = w >> (8 * i)", "codes = w >> (8 * 0)", 3, INT4_FACTORS),
    Planted("INT4 factors: words of `down` swapped", UNPACK, "int4_pairs<T>(words.v[step], a)", "int4_pairs<T>(words.v[1 - step], a)", 65, INT4_FACTORS),
    Planted("registers of `up` swapped", DECODE, "{u[0], u[2], u[1], u[3]}", "{u[0], u[1], u[2], u[3]}", 3, INT4_FACTORS),
    Planted("the next column tile's registers of `up`", EPILOGUE,
            "mma_16<T>(out[i][j + 1], x[i], u[2], u[3]);", "mma_16<T>(out[i][j + 1], x[i], u[0], u[1]);", 65, INT4_FACTORS),
    Planted("INT4 factors: `up` read as 16 bits", UNPACK, "if (bits == 4) {", "if (bits == 3) {", 65, INT4_FACTORS),
    Planted("factors of columns beyond N", EPILOGUE,
            "pair = own < last_pair ? own : last_pair;\n      const size_t", "pair = own;\n      const size_t", 65, LONE),
    Planted("a routed expert's factors of columns beyond N", EPILOGUE,
            "pair = own < last_pair ? own : last_pair;\n          load_up", "pair = own;\n          load_up", 65, INT8),
    Planted("asm: halves of a pair swapped", "kernels/prim_ptx.cuh",
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));',
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(lo), "f"(hi));', 65, LONE, "ptx"),
    Planted("asm: waits for one copy too few", "kernels/prim_ptx.cuh", '"n"(Pending)', '"n"(Pending + 1)', 72, LONE, "ptx"),
    Planted("asm: registers of the B fragment swapped", "kernels/prim_ptx.cuh",
            '"r"(a[3]), "r"(b0), "r"(b1), "r"(c[0])', '"r"(a[3]), "r"(b1), "r"(b0), "r"(c[0])', 3, LONE, "ptx"),
    Planted("asm: wrong truth table", "kernels/prim_ptx.cuh", "0xEA;", "0xE8;", 65, ZEROS, "ptx"),
    Planted("asm: nothing is negated", "kernels/prim_ptx.cuh", "neg.f16x2", "mov.b32", 3, ZEROS_64, "ptx"),
    Planted("asm: the difference the wrong way", "kernels/prim_ptx.cuh",
            '"sub.rn.f16x2 %0, %1, %2;"', '"sub.rn.f16x2 %0, %2, %1;"', 65, HALF, "ptx"),
    Planted("asm: the other half repeated", "kernels/prim_ptx.cuh", "Upper ? hi : lo", "Upper ? lo : hi", 65, HALF, "ptx"),
    Planted("asm: rows of the short A fragment swapped", "kernels/prim_ptx.cuh",
            '"r"(a0), "r"(a1), "r"(b)', '"r"(a1), "r"(a0), "r"(b)', 3, HALF, "ptx"),
    Planted("asm: factor and summand swapped", "kernels/prim_ptx.cuh",
            '"fma.rn.f16x2 %0, %1, %2, %3;"', '"fma.rn.f16x2 %0, %1, %3, %2;"', 65, HALF_W3, "ptx"),
    Planted("asm: turned the other way", "kernels/prim_ptx.cuh", "__funnelshift_r(v", "__funnelshift_l(v", 3, ZEROS, "ptx"),
    Planted("asm: words of a load swapped", "kernels/prim_ptx.cuh",
            '"=r"(r.v[0]), "=r"(r.v[1]) : "l"(p)', '"=r"(r.v[1]), "=r"(r.v[0]) : "l"(p)', 3, INT4_FACTORS, "ptx"),
    Planted("asm: the barrier is empty", "kernels/prim_ptx.cuh", "__syncthreads();", "", 3, LONE, "ptx"),
    Planted("slices: added in order of arrival", DECODE,
            "sum_of_slices(from, p.k_splits, p.M * p.Np)",
            "(load_fresh(from + static_cast<size_t>(split) * (p.M * p.Np)) + load_fresh(from + static_cast<size_t>((split + 1) % 3) * (p.M * p.Np))) + load_fresh(from + static_cast<size_t>((split + 2) % 3) * (p.M * p.Np))",
            4, PLAIN, slices=3, shape=(648, 2048)),
    Planted("slices: one left out", DECODE, "sum_of_slices(from, p.k_splits,", "sum_of_slices(from, p.k_splits - 1,", 4, PLAIN, slices=3),
    Planted("slices: every one adds the correction", DECODE, "corrects = split == 0 && ", "corrects = ", 4, LONE, slices=3),
    Planted("slices: x from the start of K", DECODE, "k0 = first * kChunk;", "k0 = 0;", 4, PLAIN, slices=3),
    Planted("slices: where the one of all tokens began", DECODE, "* p.M + m0 + m) * p.Np + n] = v", "* p.M + m) * p.Np + n] = v", 40, HALF_LONE, slices=2),
    Planted("counter that is not zero again", DOWN,
            "count_up(counter, static_cast<uint32_t>(parts - 1))", "count_up(counter, static_cast<uint32_t>(parts))", 4, PLAIN, slices=3),
    Planted("counter: last but one", DOWN,
            "== static_cast<uint32_t>(parts - 1)", "== static_cast<uint32_t>(parts - 2)", 4, PLAIN, slices=3),
    Planted("counter of another column block", DECODE, "* blocks + block_x()", "* blocks + block_x() / 2", 4, PLAIN, slices=3),
    Planted("counter of another token group", DECODE, "(m0 / kGroupTokens) * blocks", "0 * blocks", 40, HALF_LONE, slices=2),
    Planted("no barrier before the correction's operands", EPILOGUE,
            "    block_sync();  // nobody reads the stages any more\n", "", 72, LONE, shape=(840, 72)),
    Planted("no barrier after the correction's operands", EPILOGUE,
            "    cp_async_wait<0>();\n    block_sync();\n    prefill_lowrank", "    cp_async_wait<0>();\n    prefill_lowrank", 72, LONE),
    Planted("columns in the order of the sums", EPILOGUE, "        transpose_four(words);\n", "", 65, PLAIN),
    Planted("half of the columns in the other lane", EPILOGUE, "const bool upper = lane & bit;", "const bool upper = lane & 1;", 65, PLAIN),
    Planted("output scales of the first columns", EPILOGUE, "const int at = column0 + (j + t) * 8, n", "const int at = column0 + j * 8, n", 65, PLAIN),
    Planted("words of `up` of another step", EPILOGUE, "step * to.step_bytes + piece * 16", "piece * 16", 65, LONE),
    Planted("rows of h of another tile", EPILOGUE, "rows + i * 16 * at.row_bytes", "rows + i * 8 * at.row_bytes", 65, LONE),
    Planted("wide tile: no barrier before a stage is filled anew", WIDE,
            "        block_sync();\n        if (chunk", "        if (chunk", 130, PLAIN, rows=128),
    Planted("wide tile: a stage too late", WIDE, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", 130, PLAIN, rows=128),
    Planted("wide tile: rows of this step again", WIDE, "stage + piece[step + 1]", "stage + piece[step]", 130, PLAIN, rows=128),
    Planted("wide tile: the last chunk's codes", WIDE, "          load_wide_words<Bits>(stage + words_at, w);\n", "", 130, PLAIN, rows=128),
    Planted("wide tile: the second 32 columns as the first", WIDE, "w[j / 4], j % 4", "w[0], j % 4", 130, PLAIN, rows=128),
    Planted("at once: a maximum of the first warp alone", AT_ONCE,
            "for (int w = 0; w < warps; ++w) largest[t]", "for (int w = 0; w < 1; ++w) largest[t]", 65, LONE),
    Planted("at once: no barrier before the maxima are read", AT_ONCE,
            "    block_sync();\n    if constexpr (Bits != 0) store_h", "    if constexpr (Bits != 0) store_h", 65, PLAIN),
    Planted("at once: x of the strip before", AT_ONCE, "load_strip<T, Bits>(args, token, strip - 1, next)", "load_strip<T, Bits>(args, token, strip, next)", 65, LONE),
    Planted("at once: h of another tile", AT_ONCE, "p.shared_tiles * 16) + first * 16 + column", "p.shared_tiles * 16) + column", 65, MANY_RANKS),
    Planted("at once: sums of h that are still read", AT_ONCE,
            "      block_sync();  // nobody reads the sums of the columns before any more\n", "", 65, MANY_RANKS),
    Planted("at once: tokens beyond the last one", AT_ONCE, "largest[t], place[t] < count)", "largest[t], true)", 65, LONE),
    Planted("at once: factors beyond K", AT_ONCE, "tile < p.shared_tiles && block < blocks", "tile < p.shared_tiles", 65, LONE),
    Planted("counters of `down` that nobody clears", PREPARE, "store4(p.counters + i, 0u);", "store4(p.counters + i, 1u);", 72, INT8),
    Planted("no fence before the counter", DOWN, "    device_fence();\n    *flag", "    *flag", 4, PLAIN, slices=3),
    Planted("no fence after the counter", DOWN, "(parts - 1);\n    device_fence();", "(parts - 1);", 4, PLAIN, slices=3),
    Planted("no barrier before the counter", DOWN,
            "  block_sync();\n  if (thread_id() == 0) {\n    device_fence", "  if (thread_id() == 0) {\n    device_fence", 4, PLAIN, slices=3),
    Planted("slices that may come from a cache", DOWN,
            "part[s] = load_fresh(from + static_cast<size_t>(s) * step)", "part[s] = from[static_cast<size_t>(s) * step]", 4, PLAIN, slices=3),
    Planted("h of a GEMM that may come from a cache", DOWN,
            "load_fresh(p.partial + column0 + s * step + at, part[s]);", "for (int c = 0; c < 4; ++c) part[s][c] = p.partial[column0 + s * step + at + c];", 72, INT8),
    Planted("a block that waits for the others", DOWN, "    device_fence();\n    *flag",
            "    device_fence();\n    if (block_y() == 0) while (float_to_int_bits(load_fresh(reinterpret_cast<float*>(counter))) != parts - 1) {}\n    *flag",
            4, PLAIN, slices=3),
    Planted("h of another slice", TOKENS, "sum_of_slices(part, p.splits, p.M * columns)", "sum_of_slices(part, p.splits, columns)", 3, INT8),
    Planted("h of a lone token of another slice", DECODE, "p.splits, shared_rank, parts_of_h", "p.splits, 16, parts_of_h", 1, LONE),
    Planted("scores of the first slice alone", TOKENS, "sum_of_slices(p.scores + o, p.splits,", "sum_of_slices(p.scores + o, 1,", 3, INT8),
    Planted("slice of `down` without its last rows", DOWN, "last = first + each < blocks ? first + each : blocks", "last = first + each < blocks ? first + each : blocks - 1", 3, LONE),
    Planted("maxima of the first warps forgotten", TOKENS, "for (int w = 0; w < kDecodeWarps; w += 4)", "for (int w = 4; w < kDecodeWarps; w += 4)", 1, PLAIN),
    Planted("missing barrier after a block's own maxima", TOKENS,
            "  block_sync();\n  QE_UNROLL\n  for (int m = 0; m < kLoneTokens; ++m) {\n    if (m >= p.M) break;\n    const float largest",
            "  QE_UNROLL\n  for (int m = 0; m < kLoneTokens; ++m) {\n    if (m >= p.M) break;\n    const float largest", 1, PLAIN),
    Planted("missing barrier before h is multiplied", DECODE, "    block_sync();  // h, units", "    // h, units", 1, LONE),
    Planted("x before the launch in front has ended", TOKENS, "  wait_for_previous();\n  u32x2 value", "  u32x2 value", 3, PLAIN),
    Planted("x of factors before the launch in front has ended", DOWN,
            "  prefetch_next(p);\n  wait_for_previous();", "  prefetch_next(p);", 3, LONE),
    Planted("units before the launch in front has ended", DECODE,
            "    wait_for_previous();\n    if (thread_id() < count) {", "    if (thread_id() < count) {", 11, HALF_LONE),
    Planted("weights fetched ahead from beyond their end", PLAN, "int64_t{s.Np} * s.Kp * p.weight_bits / 8", "int64_t{s.Np} * s.Kp * p.weight_bits / 4", 3, LONE),
    Planted("ring: waits for one chunk too few", DECODE, "cp_async_wait<kRing - 1>", "cp_async_wait<kRing>", 3, PLAIN),
    Planted("ring: a slot that another chunk still fills", DECODE,
            "slot == ring.slots + (kRing - 1) * kBlockBytes<Bits>", "slot == ring.slots + (kRing - 2) * kBlockBytes<Bits>", 3, PLAIN),
    Planted("ring: of the warp beside", DECODE, "p.ring_at + warp * (kRing", "p.ring_at + (warp / 2) * (kRing", 3, PLAIN),
    Planted("sets: the second one's columns for all", DECODE, "block = block_x() + set * stride", "block = block_x() + (set > 0) * stride", 3, PLAIN),
    Planted("x of another token group", DECODE, "at = static_cast<size_t>(m0) * p.chunks", "at = static_cast<size_t>(0) * p.chunks", 40, HALF_LONE),
    Planted("x where another token group has its own", PREPARE, "token / kGroupTokens : 0", "0 * token : 0", 40, HALF_LONE),
    Planted("units of another token group", DECODE, "p.token_scale[m0 + thread_id()]", "p.token_scale[thread_id()]", 40, HALF_LONE),
    Planted("h of another token group", TOKENS, "collect_h<T>(p, m0 + m, r", "collect_h<T>(p, m, r", 40, HALF),
    Planted("asm: counters that never begin again", "kernels/prim_ptx.cuh", "atom.global.inc.u32 %0, [%1], %2;", "atom.global.inc.u32 %0, [%1], 255;", 4, PLAIN, "ptx", slices=3),
    Planted("asm: a slice that may come from a cache", "kernels/prim_ptx.cuh", "ld.relaxed.gpu.global.f32", "ld.global.f32", 4, PLAIN, "ptx", slices=3),
    Planted("asm: no fence", "kernels/prim_ptx.cuh", "fence.acq_rel.gpu;", "", 72, INT8, "ptx"),
    Planted("PTX: x before the launch in front has ended", TOKENS, "  wait_for_previous();\n  u32x2 value", "  u32x2 value", 3, PLAIN, "ptx"),
    Planted("PTX: x of factors before the launch in front has ended", DOWN,
            "  prefetch_next(p);\n  wait_for_previous();", "  prefetch_next(p);", 3, LONE, "ptx"),
    Planted("PTX: a block that waits for the others", DOWN, "    device_fence();\n    *flag",
            "    device_fence();\n    if (block_y() == 0) while (float_to_int_bits(load_fresh(reinterpret_cast<float*>(counter))) != parts - 1) {}\n    *flag",
            4, PLAIN, "ptx", slices=3),
    Planted("PTX: no fence before the counter", DOWN, "    device_fence();\n    *flag", "    *flag", 4, PLAIN, "ptx", slices=3),
    Planted("PTX: weights fetched ahead from beyond their end", PLAN, "int64_t{s.Np} * s.Kp * p.weight_bits / 8", "int64_t{s.Np} * s.Kp * p.weight_bits / 4", 3, LONE, "ptx"),
    Planted("cluster: nobody waits until all blocks have begun", CLUSTER, "  cluster_wait();  // all blocks have begun\n", "", 1, PLAIN, clusters=2),
    Planted("cluster: boxes that others may not see yet", CLUSTER, "    boxes_are_open();\n  }", "  }", 1, PLAIN, clusters=2),
    Planted("cluster: multiplies x that other warps still quantize", CLUSTER,
            "  group_sync(kMainGroup, p.main_warps * 32);  // the activations are there\n", "", 4, LONE, clusters=2),
    Planted("cluster: a block's own maxima without a barrier", CLUSTER,
            "    group_sync(kMainGroup, p.main_warps * 32);\n  } else {", "  } else {", 1, LONE, clusters=2),
    Planted("cluster: does not wait for the maxima", CLUSTER, "    wait_for_box(s.largest_box);\n", "", 4, LONE, clusters=2),
    Planted("cluster: does not wait for the parts of h", CORRECTION,
            "  wait_for_box(s.part_box);\n  wait_for_box(s.routed_box);", "  wait_for_box(s.routed_box);", 2, LONE, clusters=2),
    Planted("cluster: does not wait for the experts' parts", CORRECTION, "  wait_for_box(s.routed_box);\n", "", 2, ROUTED, clusters=2),
    Planted("cluster: does not wait for the results", CLUSTER, "  wait_for_box(s.result_box);\n", "", 2, PLAIN, clusters=2),
    Planted("cluster: the correction without a barrier", CLUSTER,
            "  block_sync();\n  wait_for_box(s.result_box);", "  wait_for_box(s.result_box);", 2, LONE, clusters=2),
    Planted("cluster: h that other warps still add up", CORRECTION,
            "  group_sync(kCorrectGroup, kCorrectWarps * 32);\n  multiply_up_sets", "  multiply_up_sets", 2, LONE, clusters=2),
    Planted("cluster: x that other warps still copy", CORRECTION,
            "  cp_async_wait<0>();\n  group_sync(kCorrectGroup, kCorrectWarps * 32);\n", "  cp_async_wait<0>();\n", 2, LONE, clusters=2),
    Planted("cluster: experts before they are chosen", CORRECTION,
            "p.E);\n  group_sync(kCorrectGroup, kCorrectWarps * 32);\n}", "p.E);\n}", 2, ROUTED, clusters=2),
    Planted("cluster: a box for results of all sets", CLUSTER, "b.owned * p.parts * kDecodeColumns", "b.sets * p.parts * kDecodeColumns", 2, PLAIN, clusters=2),
    Planted("cluster: a box for results of one part", CLUSTER, "b.owned * p.parts * kDecodeColumns", "b.owned * kDecodeColumns", 2, PLAIN, clusters=2),
    Planted("cluster: columns of another owner", CLUSTER, "owner = set & (p.cluster_blocks - 1)", "owner = (set + 1) & (p.cluster_blocks - 1)", 2, PLAIN,
            shape=(648, 128), clusters=2),
    Planted("cluster: results of all blocks in one place", CLUSTER, "p.cluster_blocks + b.rank) * p.parts + part;", "p.cluster_blocks) * p.parts + part;", 2, PLAIN, clusters=2),
    Planted("cluster: parts of a tile in one place", CORRECTION, "part + ((b.rank * parts + of_k)", "part + ((b.rank * parts)", 2, LONE, clusters=2),
    Planted("cluster: sums of activations of one block", CLUSTER,
            "p.cluster_blocks * divide_small(sums, p.token_factor)", "divide_small(sums, p.token_factor)", 2, CHANNEL_ZEROS, clusters=2),
    Planted("cluster: maxima of one block", CLUSTER, "p.own_maxima ? p.pieces : p.pieces << p.cluster_shift", "p.pieces", 4, PLAIN,
            shape=(1160, 40), clusters=2),
    Planted("cluster: scores of one block", CORRECTION, "p.score_warps << p.cluster_shift", "p.score_warps", 2, ROUTED, clusters=2),
    Planted("cluster: the first token's expert", CORRECTION, "p.shared_tiles + s.expert[m] * tiles", "p.shared_tiles + s.expert[0] * tiles", 4, ROUTED, clusters=2),
    Planted("cluster: copied factors of the first tile", CORRECTION, "s.down + tile * p.slice_chunks * 4 * down_bytes", "s.down", 2, MANY_RANKS,
            shape=(1016, 40), clusters=4),
    Planted("cluster: a part's start rounded down", PLAN, "Divide(1 << 16, c.parts)", "(1 << 16) / c.parts", 2, PLAIN,
            shape=(648, 128), clusters=2),
    Planted("cluster: a slice from the start of K", CORRECTION, "(tile0 + tile) * blocks + from + block", "(tile0 + tile) * blocks + block", 2, LONE, clusters=2),
    Planted("cluster: rows of x beyond the last one", CORRECTION,
            "    if (rows * 2 + thread * 16 < (b.end_of_32(p) - b.first * 4) * 64) store16(row + rows * 2 + thread * 16, u32x4{});\n", "", 2, LONE, clusters=2),
    Planted("cluster: x before the launch in front has ended", CORRECTION, "  wait_for_previous();\n  fetch_x(p", "  fetch_x(p", 2, LONE, clusters=2),
    Planted("cluster: ring: waits for one chunk too few", CLUSTER, "cp_async_wait<kClusterRing - 1>", "cp_async_wait<kClusterRing>", 2, PLAIN, clusters=2),
    Planted("PTX: cluster: boxes that others may not see yet", PTX_PRIMITIVES, "// sm_90: fence.mbarrier_init.release.cluster;", "", 1, PLAIN, "ptx", clusters=2),
    Planted("PTX: cluster: a box in the own block", PTX_PRIMITIVES,
            "\"// sm_90: mapa.shared::cluster.u32 %1, %1, %2;\\n\\t\"\n               \"// sm_90: st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 ",
            "\"// sm_90: st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 ", 4, PLAIN, "ptx", clusters=2),
    Planted("PTX: cluster: the correction without a barrier", CLUSTER,
            "  block_sync();\n  wait_for_box(s.result_box);", "  wait_for_box(s.result_box);", 2, LONE, "ptx", clusters=2),
    Planted("asm: a barrier of too few warps", PTX_PRIMITIVES, '"r"(threads) : "memory"', '"r"(threads - 32) : "memory"', 4, LONE, "ptx", clusters=2),
    Planted("asm: nothing waits", "kernels/prim_ptx.cuh", "// sm_90: griddepcontrol.wait;", "", 3, LONE, "ptx"),
]  # fmt: skip
