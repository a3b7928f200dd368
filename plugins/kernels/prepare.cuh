// From x to the activations that `main` multiplies: channel scale, per-token absolute maximum, int8 or 6-bit values,
// router scores in fp32 and their argmin (docs/method.md, equation 6). Of few tokens `main` does it itself; of more,
// one block per token does it in a launch before. Every sum has a fixed order. 6-bit values are stored 4 times as large:
// then `main` rounds as little as with 8 bits where it adds two groups (pair_of_sums).
//
// 16-bit activations become fp16, whatever T is, in units of a power of two of their token that puts the largest below
// 2^8: nothing overflows, sums of 128 of them included, and what is rounded is below 2^-26 of the largest, but for every
// fourth eight in decode with 4 bits (x_of_eight): by at most 2^-12 of x less a sixteenth of another x. Eight rows whose
// codes `main` multiplies from higher bits, 16 or up to 64 times too large, are divided by as much (code_shifts).
//
// Zero points leave the loop over K: sum (q - z) x = sum q x - z sum x. `sums` holds sum x of every group: as int32 or,
// for the groups of 16-bit activations and those of 64 rows, as minus the sum in two fp16 (the rest in the upper one),
// which `main` multiplies by z on the tensor cores; for one group over all of K as int32 or float.
#pragma once
#include "../include/qe_edge/args.h"
#include "unpack.cuh"

namespace qe {

constexpr int kPrepareSlots = kMaxExperts + 1;  // the scores, then the maximum

// Where `prepare` or a block of `main` puts what it quantizes, and what of it.
struct Rows {
  const void* inv_omega;
  uint8_t* act;
  uint32_t* sums;
  int K, Kp;          // Kp: rows of `act`
  int tokens, slots;  // tokens that are there, and places for them in decode order; 0: in the order of rows
  int act_max, sum_rows;
  uint64_t code_shifts;
};

// One of eight 16-bit floats.
template <class T>
QE_DEV float half_of(const u32x4& eight, int i) {
  return to_float(T{static_cast<uint16_t>(eight.v[i / 2] >> (16 * (i & 1)))});
}

// Eight activations, and the same after the channel scale: a product of two 16-bit floats, exact in float32.
// Zero beyond K.
template <class T>
QE_DEV void load_scaled(const void* inv_omega, int K, const T* row, int k, float (&raw)[8], float (&scaled)[8]) {
  if (k >= K) {
    QE_UNROLL
    for (int i = 0; i < 8; ++i) raw[i] = 0.f, scaled[i] = 0.f;
    return;
  }
  const u32x4 x = load16(row + k);
  u32x4 omega{};
  if (inv_omega) omega = load16(static_cast<const T*>(inv_omega) + k);
  QE_UNROLL
  for (int i = 0; i < 8; ++i) {
    raw[i] = half_of<T>(x, i);
    scaled[i] = inv_omega ? raw[i] * half_of<T>(omega, i) : raw[i];
  }
}

// Adds the share of eight rows to the scores of every expert.
template <class T>
QE_DEV void add_scores(const T* router, int experts, int K, int k, const float (&raw)[8], float (&score)[kMaxExperts]) {
  QE_UNROLL
  for (int e = 0; e < kMaxExperts; ++e) {
    if (e >= experts) continue;
    const u32x4 weight = load16(router + static_cast<size_t>(e) * K + k);
    QE_UNROLL
    for (int i = 0; i < 8; ++i) score[e] += abs_f(raw[i]) * half_of<T>(weight, i);
  }
}

// Leaves in slot 0..E-1 the score sums and in slot kMaxExperts the maximum, for the whole block.
QE_DEV void reduce_block(int experts, float (&score)[kMaxExperts], float largest, float* slots) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  QE_UNROLL
  for (int step = 16; step > 0; step >>= 1) {
    largest = max_f(largest, shuffle_xor(largest, step));
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e)
      if (e < experts) score[e] += shuffle_xor(score[e], step);
  }
  if (lane == 0) {
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) slots[(1 + warp) * kPrepareSlots + e] = score[e];
    slots[(1 + warp) * kPrepareSlots + kMaxExperts] = largest;
  }
  block_sync();
  const int slot = thread_id();
  if (slot < kPrepareSlots) {
    float v = slots[kPrepareSlots + slot];
    for (int w = 1; w < warps; ++w) {
      const float other = slots[(1 + w) * kPrepareSlots + slot];
      v = slot == kMaxExperts ? max_f(v, other) : v + other;
    }
    slots[slot] = v;
  }
  block_sync();
}

// Lowest score wins, ties go to the lowest index, and a score that is not finite sends the token to expert 0.
QE_DEV int choose_expert(const float* score, int experts) {
  int best = 0;
  bool finite = true;
  for (int e = 0; e < experts; ++e) {
    if (score[e] < score[best]) best = e;
    finite = finite && abs_f(score[e]) <= 3.402823466e38f;
  }
  return finite ? best : 0;
}

// The unit of a token's 16-bit activations, 2^exponent, and its inverse: both normal for every maximum, infinite
// ones and zero included.
QE_DEV void token_unit(float largest, float& unit, float& inverse) {
  uint32_t exponent = (static_cast<uint32_t>(float_to_int_bits(largest)) >> 23) & 255u;
  exponent = exponent < 8u ? 8u : exponent;
  unit = int_bits_to_float(static_cast<int>((exponent - 7u) << 23));
  inverse = int_bits_to_float(static_cast<int>((261u - exponent) << 23));
}

// The step of a token's integer activations, and nearly its inverse.
QE_DEV float unit_of(int act_max, float largest) { return divide_rn(max_f(largest, 1e-5f), static_cast<float>(act_max)); }
QE_DEV float inverse_unit(int act_max, float largest) {
  return reciprocal(max_f(largest, 1e-5f)) * static_cast<float>(act_max);
}

// Eight values from row k on. For main_decode, as the words of its lanes: a lane (of four) has its words of a chunk
// together, and a chunk has a place for each token. Where it has more of them, the last token's stand for the tokens that
// are not there, because lanes read them.
template <int Words>
QE_DEV void store_words(const Rows& p, int token, int k, const uint32_t (&words)[Words]) {
  constexpr int kBytes = Words * 4, kRowBytes = kBytes / 8;  // of the eight, of one
  const int at = k % 128 * kRowBytes;  // in bytes; every 16 belong to four lanes
  if (!p.slots) {
    uint8_t* chunk = p.act + (static_cast<size_t>(token) * p.Kp + k / 128 * 128) * kRowBytes;
    if constexpr (Words == 2) {
      store8(chunk + at, {{words[0], words[1]}});
    } else {
      store16(chunk + at, {{words[0], words[1], words[2], words[3]}});
    }
    return;
  }
  const int last = token == p.tokens - 1 ? p.slots : token + 1;
  uint8_t* chunk = p.act + (static_cast<size_t>(k / 128) * p.slots + token) * (128 * kRowBytes);
  for (int m = token; m < last; ++m, chunk += 128 * kRowBytes) {
    QE_UNROLL
    for (int i = 0; i < Words; ++i) store4(chunk + (at / 4 % 4 + i) * (32 * kRowBytes) + at / 16 * 4, words[i]);
  }
}

// Writes the sum of a group: for main_decode to [group][token % 8][token / 8], or with both
// tokens of a lane first in decode_chunk_s8, where the last token's stand for those that are not there. For main_prefill,
// [chunk][token] has the rows of an A operand: either fp16 of either half of the chunk, twice.
QE_DEV void store_sum(const Rows& p, int token, int group, float sum) {
  uint32_t word;
  if (p.act_max && p.sum_rows == 128) {
    word = static_cast<uint32_t>(round_to_int(sum));
  } else {
    const float share = p.act_max ? -sum : -0.25f * sum;  // of 16-bit ones all four lanes of a token multiply it
    const f16_t most = from_float<f16_t>(share);
    word = most.bits | static_cast<uint32_t>(from_float<f16_t>(share - to_float(most)).bits) << 16;
  }
  uint32_t* to = p.sums;
  if (!p.slots) {
    to += (static_cast<size_t>(group / 2) * p.tokens + token) * (kTokenSums / 4) + group % 2 * 2;
    store8(to, {{twice_half(word, 0), twice_half(word, 1)}});
    return;
  }
  to += static_cast<size_t>(group) * kGroupTokens;
  const int last = token == p.tokens - 1 ? kGroupTokens : token + 1;
  const int beside = p.act_max && p.sum_rows == 128 ? 2 : 1;  // tokens of a lane that stand before those 8 after them
  for (int m = token; m < last; ++m) store4(to + m % 8 / beside * (2 * beside) + m / 8 * beside + m % beside, word);
}

// Eight values of 16-bit activations in their token's unit. Where decode multiplies the upper of two codes together with
// the lower one (unpack_step_decode), `shared` is what the upper one's x does to the lower one's. It is taken off and the
// rest rounded to fp16, one of four eights; `sum` gets what both make together, so that zero points meet the same x.
template <class T>
QE_DEV void x_of_eight(const Rows& p, const T* row, int k, const float (&scaled)[8], float inverse, float (&x)[8],
                       float& sum) {
  float raw[8], next[8];
  const bool joined = p.slots && p.code_shifts == kCodeShifts4 && k / 8 % 4 == 2;
  if (joined) load_scaled<T>(p.inv_omega, p.K, row, k + 8, raw, next);
  QE_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = to_float(from_float<T>(scaled[i])) * inverse;
    if (joined) {
      const float shared = to_float(from_float<f16_t>(to_float(from_float<T>(next[i])) * inverse * 0.0625f));
      x[i] = to_float(from_float<f16_t>(x[i] - shared));
      sum += shared;
    }
    sum += x[i];
  }
}

// Four values in steps of `unit`, rounded to the nearest and even as after an IEEE division: the product with `inverse`,
// which is within 2^-22 of its inverse, is within 4e-5 of the quotient, so that only what lies next to a half is divided, and
// what is not finite. `sum` gets what the stored values add up to.
QE_DEV uint32_t int8_codes(int act_max, const float (&scaled)[4], float largest, float inverse, float& sum) {
  float code[4], codes = 0.f;  // with kMagic added: the lowest byte of the bits is the code
  uint32_t bits[4];
  bool clear = true;
  QE_UNROLL
  for (int i = 0; i < 4; ++i) {
    code[i] = fma_f(scaled[i], inverse, kMagic);
    clear = clear && abs_f(fma_f(scaled[i], inverse, kMagic - code[i])) < 0.4999f;
  }
  if (!clear) {
    const float unit = unit_of(act_max, largest);
    QE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int q = round_to_int(divide_rn(scaled[i], unit));
      code[i] = kMagic + static_cast<float>(q > act_max ? act_max : q < -act_max - 1 ? -act_max - 1 : q);
    }
  }
  QE_UNROLL
  for (int i = 0; i < 4; ++i) {
    codes += code[i] - kMagic;
    bits[i] = static_cast<uint32_t>(float_to_int_bits(code[i]));
  }
  const uint32_t word = pick_bytes<0x5410>(pick_bytes<0x0040>(bits[0], bits[1]), pick_bytes<0x0040>(bits[2], bits[3]));
  const bool six_bits = act_max == 31;
  sum += six_bits ? 4.f * codes : codes;
  return six_bits ? (word << 2) & 0xFCFCFCFCu : word;
}

// The sums of the groups that a warp's 256 rows have, of which this lane has eight from row k on that add up to `sum`.
QE_DEV void store_sums(const Rows& p, int token, int k, float sum) {
  if (!p.sums || !p.sum_rows) return;
  QE_UNROLL
  for (int step = 1; step < 8; step <<= 1) sum += shuffle_xor(sum, step);
  const float neighbour = shuffle_xor(sum, 8);
  if (p.sum_rows == 128) sum += neighbour;
  if (k >= 0 && k < p.Kp && k % p.sum_rows == 0) store_sum(p, token, k / p.sum_rows, sum);
}

// This lane's eight of a warp's 256 rows of one token, from row k of `row` on: in steps of the token's unit, stored, with the
// sums of their groups. Returns what the eight add up to.
template <class T>
QE_DEV float quantize_rows(const Rows& p, const T* row, int token, int k, float largest) {
  float raw[8], scaled[8], sum = 0.f;
  load_scaled<T>(p.inv_omega, p.K, row, k, raw, scaled);
  if (k < p.Kp && p.act_max) {
    const float inverse = inverse_unit(p.act_max, largest);
    uint32_t words[2];
    QE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float four[4] = {scaled[4 * half], scaled[4 * half + 1], scaled[4 * half + 2], scaled[4 * half + 3]};
      words[half] = int8_codes(p.act_max, four, largest, inverse, sum);
    }
    store_words(p, token, k, words);
  } else if (k < p.Kp) {
    float unit, inverse;
    token_unit(largest, unit, inverse);
    const uint32_t shift = static_cast<uint32_t>(p.code_shifts >> (k / 8 % 16 * 4)) & 15u;
    const float share = int_bits_to_float(static_cast<int>((127u - shift) << 23));
    float x[8];
    x_of_eight<T>(p, row, k, scaled, inverse, x, sum);
    uint32_t words[4];
    QE_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = pack2<f16_t>(x[2 * i] * share, x[2 * i + 1] * share);
    store_words(p, token, k, words);
  }
  store_sums(p, token, k, sum);
  return sum;
}

// What one unit of the stored activations stands for: 6-bit ones are stored in steps of 4.
QE_DEV float stored_unit(int act_max, float largest) {
  if (act_max) return act_max == 31 ? 0.25f * unit_of(act_max, largest) : unit_of(act_max, largest);
  float unit, inverse;
  token_unit(largest, unit, inverse);
  return unit;
}

template <class T>
QE_DEV void prepare(const PrepareArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  float* slots = reinterpret_cast<float*>(shared);
  const int token = block_x(), stride = block_threads() * 8, lane = thread_id() & 31, warp = thread_id() >> 5;
  const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(token) * p.K;
  const T* router = static_cast<const T*>(p.router);
  // In decode order 16 tokens lie together, with their sums.
  const int group = p.decode_order ? token / kGroupTokens : 0, first = group * kGroupTokens;
  const int places = p.decode_order ? kGroupTokens : 0, left = p.M - first;
  Rows rows{p.inv_omega, static_cast<uint8_t*>(p.act), static_cast<uint32_t*>(p.sums), p.K, p.Kp,
            places && left > kGroupTokens ? kGroupTokens : left, places, p.act_max, p.sum_rows, p.code_shifts};
  rows.act += static_cast<size_t>(first) * p.Kp * (p.act_max ? 1 : 2);
  if (p.sums && p.sum_rows) rows.sums += static_cast<size_t>(first) * (p.Kp / p.sum_rows);
  wait_for_previous();
  for (int i = token * block_threads() + thread_id(); i < p.counter_count; i += p.M * block_threads())
    store4(p.counters + i, 0u);

  float raw[8], scaled[8], score[kMaxExperts], largest = 0.f;
  QE_UNROLL
  for (int e = 0; e < kMaxExperts; ++e) score[e] = 0.f;
  for (int k = thread_id() * 8; k < p.K; k += stride) {
    load_scaled<T>(rows.inv_omega, p.K, row, k, raw, scaled);
    QE_UNROLL
    for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(scaled[i]));
    add_scores<T>(router, p.E, p.K, k, raw, score);
  }
  reduce_block(p.E, score, largest, slots);
  if (thread_id() == 0 && p.expert) p.expert[token] = choose_expert(slots, p.E);

  largest = slots[kMaxExperts];
  if (thread_id() == 0) p.token_scale[token] = stored_unit(p.act_max, largest);
  float total = 0.f;
  for (int k = thread_id() * 8; k - lane * 8 < p.Kp; k += stride)  // a warp stays together for the sums
    total += quantize_rows<T>(rows, row, token - first, k, largest);
  if (!p.sums || p.sum_rows) return;
  QE_UNROLL
  for (int step = 16; step > 0; step >>= 1) total += shuffle_xor(total, step);
  if (lane == 0) slots[(1 + warp) * kPrepareSlots] = total;
  block_sync();
  if (thread_id() != 0) return;
  total = slots[kPrepareSlots];
  for (int w = 1; w < block_threads() >> 5; ++w) total += slots[(1 + w) * kPrepareSlots];
  store4(static_cast<float*>(p.sums) + token, static_cast<uint32_t>(float_to_int_bits(total)));
}

}  // namespace qe
