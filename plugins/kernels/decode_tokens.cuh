// What a block of `main` of few tokens finds out about its tokens: their activations, experts and h.
#pragma once
#include "../include/qe_edge/args.h"
#include "lowrank_down.cuh"
#include "prepare.cuh"

namespace qe {

// Of the tokens of a block, in shared memory from `tokens_at` on.
struct Tokens {
  float* unit;      // [16]: what one unit of a token's activations stands for
  float* sum;       // [16]: sums of the activations of this block's slice of K
  int32_t* expert;  // [16]
  int* flag;
  float* slots;     // [M][kDecodeWarps]: maxima, then sums of rows
  float* scores;    // [M][kMaxExperts]
  uint16_t* h;      // [count][rank]
  QE_DEV Tokens(const MainArgs& p, unsigned char* shared) {
    unit = reinterpret_cast<float*>(shared + p.tokens_at);
    sum = unit + kGroupTokens;
    expert = reinterpret_cast<int32_t*>(sum + kGroupTokens);
    flag = expert + kGroupTokens;
    slots = reinterpret_cast<float*>(flag + 4);
    scores = reinterpret_cast<float*>(shared + p.scores_at);
    h = reinterpret_cast<uint16_t*>(shared + p.h_at);
  }
};

// h of one token, or a part of it: slices of K are summed in their order, then rounded to T.
template <class T>
QE_DEV void collect_h(const MainArgs& p, int m, int row, int column, int columns, uint16_t* h) {
  const float* part = p.partial + static_cast<size_t>(m) * columns + column;
  store2(h + row, from_float<T>(sum_of_slices(part, p.splits, p.M * columns)).bits);
}

// The chosen experts and h of the block's tokens. A barrier must follow.
template <class T, int Tokens8>
QE_DEV void collect_correction(const MainArgs& p, int m0, int count, const Tokens& tokens) {
  const int shared = 16 * p.shared_tiles, routed = 16 * p.routed_tiles, rank = shared + routed;
  const int columns = shared + p.E * routed;
  if constexpr (Tokens8 == 1) {
    // Scores and the shared part at once, by different threads.
    if (p.E)
      for (int o = block_threads() - 1 - thread_id(); o < count * kMaxExperts; o += block_threads())
        if (o % kMaxExperts < p.E) tokens.scores[o] = sum_of_slices(p.scores + o, p.splits, p.M * kMaxExperts);
    for (int m = 0; m < count; ++m)
      for (int r = thread_id(); r < shared; r += block_threads()) collect_h<T>(p, m, r, r, columns, tokens.h + m * rank);
    if (!p.E) return;
    block_sync();
    for (int m = 0; m < count; ++m) {
      const int expert = choose_expert(tokens.scores + m * kMaxExperts, p.E);
      if (thread_id() == 0) tokens.expert[m] = expert;
      for (int r = shared + thread_id(); r < rank; r += block_threads())
        collect_h<T>(p, m, r, r + expert * routed, columns, tokens.h + m * rank);
    }
  } else {
    for (int o = thread_id(); o < count * rank; o += block_threads()) {
      const int m = o / rank, r = o - m * rank, column = r < shared ? r : r + tokens.expert[m] * routed;
      collect_h<T>(p, m0 + m, r, column, columns, tokens.h + m * rank);
    }
  }
}

// The maximum of one token over the block, from each warp's. Places without a warp have zeros.
QE_DEV float largest_of(const float* slots) {
  float largest = 0.f;
  QE_UNROLL
  for (int w = 0; w < kDecodeWarps; w += 4) {
    const u32x4 four = load16(slots + w);
    QE_UNROLL
    for (int i = 0; i < 4; ++i) largest = max_f(largest, int_bits_to_float(static_cast<int>(four.v[i])));
  }
  return largest;
}

// Four values of one token after the channel scale; zero beyond K.
template <class T>
QE_DEV void scale_four(const u32x2& x, const u32x2& omega, bool scales, float (&scaled)[4]) {
  QE_UNROLL
  for (int i = 0; i < 4; ++i) {
    scaled[i] = to_float(T{static_cast<uint16_t>(x.v[i / 2] >> (16 * (i & 1)))});
    if (scales) scaled[i] *= to_float(T{static_cast<uint16_t>(omega.v[i / 2] >> (16 * (i & 1)))});
  }
}

template <class T>
QE_DEV void load_first_x(const MainArgs& p, u32x2 (&value)[kLoneTokens]) {
  const int start = thread_id() * 4;
  QE_UNROLL
  for (int m = 0; m < kLoneTokens; ++m) {
    value[m] = u32x2{};
    if (m < p.M && start < p.K) value[m] = load8(static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + start);
  }
}

// The channel scales of this thread's first four rows. Those of the others start their way from memory.
template <class T>
QE_DEV void load_first_scales(const MainArgs& p, u32x2& factor) {
  const int start = thread_id() * 4;
  const T* omega = static_cast<const T*>(p.inv_omega);
  if (omega && start < p.K) factor = load8(omega + start);
  if (omega && thread_id() % 16 == 0)
    for (int k = start + block_threads() * 4; k < p.K; k += block_threads() * 4) prefetch_line(omega + k);
}
// Four codes of one token in their place, with the sums of their groups; k is a row of the slice.
template <int Groups, bool Zeros, class Args>
QE_DEV float store_four(const Args& p, const Rows& rows, int m, int k, const float (&scaled)[4], float largest) {
  const int lane = thread_id() & 31;
  float sum = 0.f;
  const uint32_t word = int8_codes(p.act_max, scaled, largest, inverse_unit(p.act_max, largest), sum);
  if (k < rows.Kp) store4(rows.act + (k / kChunk * p.M + m) * kChunk + k / 4 % 4 * 32 + k % kChunk / 16 * 4, word);
  if constexpr (Zeros && Groups != 0) {  // a warp has 128 rows
    float group = sum;
    QE_UNROLL
    for (int step = 1; step < (Groups == 1 ? 32 : 16); step <<= 1) group += shuffle_xor(group, step);
    if (k < rows.Kp && lane % (32 / Groups) == 0) store_sum(rows, m, k / (kChunk / Groups), group);
  }
  return sum;
}

// x as the operand of this block's slice of K, in shared memory: every block finds the tokens' maxima and quantizes what it
// multiplies by itself, which takes less time than a launch that does it for all. `rows` start at row k0. The code is short
// on purpose: what runs once is as slow as it is long. So a thread first has four rows of every token, which stay in registers
// between the two steps, and then eight at a time.
template <class T, int Mode, int Groups, bool Zeros>
QE_DEV void quantize_slice(const MainArgs& p, const Rows& rows, int k0, const u32x2& factor, const Tokens& tokens) {
  constexpr bool kWholeColumn = Zeros && Groups == 0;
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int start = thread_id() * 4, stride = block_threads() * 4;
  const T* x = static_cast<const T*>(p.x);
  const T* omega = static_cast<const T*>(p.inv_omega);
  wait_for_previous();
  u32x2 value[kLoneTokens];
  load_first_x<T>(p, value);
  float scaled[kLoneTokens][4];
  QE_UNROLL
  for (int m = 0; m < kLoneTokens; ++m) {
    if (m >= p.M) break;
    scale_four<T>(value[m], factor, omega, scaled[m]);
    float largest = 0.f, raw[8], next[8];
    QE_UNROLL
    for (int i = 0; i < 4; ++i) largest = max_f(largest, abs_f(scaled[m][i]));
    const T* row = x + static_cast<size_t>(m) * p.K;
    QE_UNROLL_BY(2)
    for (int k = stride + 2 * start; k < p.K; k += 2 * stride) {
      load_scaled<T>(omega, p.K, row, k, raw, next);
      QE_UNROLL
      for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(next[i]));
    }
    QE_UNROLL
    for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
    if (lane == 0) tokens.slots[m * kDecodeWarps + warp] = largest;
    if (warp == 0 && lane >= warps && lane < kDecodeWarps) tokens.slots[m * kDecodeWarps + lane] = 0.f;
  }
  block_sync();
  QE_UNROLL
  for (int m = 0; m < kLoneTokens; ++m) {
    if (m >= p.M) break;
    const float largest = largest_of(tokens.slots + m * kDecodeWarps);
    const T* row = x + static_cast<size_t>(m) * p.K + k0;
    float total = 0.f;
    if constexpr (Mode == kInt8) {
      int k = 2 * start;  // of eights, after the first fours
      if (k0 == 0) {
        if (start - lane * 4 < rows.Kp) total = store_four<Groups, Zeros>(p, rows, m, start, scaled[m], largest);
        k += stride;
      }
      for (; k - lane * 8 < rows.Kp; k += 2 * stride) total += quantize_rows<T>(rows, row, m, k, largest);
    } else {
      for (int k = thread_id() * 8; k - lane * 8 < rows.Kp; k += block_threads() * 8)
        total += quantize_rows<T>(rows, row, m, k, largest);
    }
    if constexpr (kWholeColumn) {
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) total += shuffle_xor(total, step);
      if (lane == 0) tokens.slots[(p.M + m) * kDecodeWarps + warp] = total;
    }
    // Read after the barrier in front of the low-rank part, as are the sums. The last warp has least to quantize.
    if (thread_id() == block_threads() - 1) tokens.unit[m] = stored_unit(Mode == kInt8 ? p.act_max : 0, largest);
  }
  block_sync();
  if constexpr (kWholeColumn) {
    if (thread_id() >= p.M) return;
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += tokens.slots[(p.M + thread_id()) * kDecodeWarps + w];
    tokens.sum[thread_id()] = total;
  }
}

}  // namespace qe
