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
  float* slots;     // [M][warps, rounded up to 4]: maxima, then sums of rows
  float* scores;    // [M][kMaxExperts]
  uint16_t* h;      // [count][rank]
  QE_DEV Tokens(const MainArgs& p, unsigned char* shared) {
    unit = reinterpret_cast<float*>(shared + p.tokens_at);
    sum = unit + kSumTokens;
    expert = reinterpret_cast<int32_t*>(sum + kSumTokens);
    flag = expert + kSumTokens;
    slots = reinterpret_cast<float*>(flag + 4);
    scores = reinterpret_cast<float*>(shared + p.scores_at);
    h = reinterpret_cast<uint16_t*>(shared + p.h_at);
  }
};

// The chosen experts and h of the block's tokens: slices of K are summed in their order, then rounded to T. A barrier must
// follow.
template <class T, int Tokens8>
QE_DEV void collect_correction(const MainArgs& p, int m0, int count, const Tokens& tokens) {
  if (Tokens8 == 1 && p.E) {
    for (int o = thread_id(); o < count * kMaxExperts; o += block_threads())
      if (o % kMaxExperts < p.E) tokens.scores[o] = sum_of_slices<false>(p.scores + o, p.splits, p.M * kMaxExperts);
    block_sync();
    if (thread_id() < count) tokens.expert[thread_id()] = choose_expert(tokens.scores + thread_id() * kMaxExperts, p.E);
    block_sync();
  }
  const int shared = 16 * p.shared_tiles, routed = 16 * p.routed_tiles, rank = shared + routed;
  const int columns = shared + p.E * routed;
  for (int m = 0; m < count; ++m) {
    const float* part = p.partial + static_cast<size_t>(m0 + m) * columns;
    for (int r = thread_id(); r < rank; r += block_threads()) {
      const int column = r < shared ? r : r + tokens.expert[m] * routed;
      store2(tokens.h + m * rank + r, from_float<T>(sum_of_slices<false>(part + column, p.splits, p.M * columns)).bits);
    }
  }
}

// The maximum of one token over the block, from each warp's.
QE_DEV float largest_of(const float* slots, int warps) {
  float largest = 0.f;
  for (int w = 0; w < warps; w += 4) {  // four are read at once; places without a warp have zeros
    const u32x4 four = load16(slots + w);
    QE_UNROLL
    for (int i = 0; i < 4; ++i) largest = max_f(largest, int_bits_to_float(static_cast<int>(four.v[i])));
  }
  return largest;
}

// x as the operand of this block's slice of K, in shared memory: every block finds the tokens' maxima and quantizes what it
// multiplies by itself, which takes less time than a launch that does it for all. `rows` start at row k0. The code is short
// on purpose: what runs once is as slow as it is long.
template <class T, bool WholeColumn>
QE_DEV void quantize_slice(const MainArgs& p, const Rows& rows, int k0, const Tokens& tokens) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, stride = block_threads() * 8;
  const int start = thread_id() * 8, places = (warps + 3) & ~3;
  const T* x = static_cast<const T*>(p.x);
  float raw[8], scaled[8];
  for (int m = 0; m < p.M; ++m) {
    float largest = 0.f;
    QE_UNROLL_BY(2)
    for (int k = start; k < p.K; k += stride) {
      load_scaled<T>(p.inv_omega, p.K, x + static_cast<size_t>(m) * p.K, k, raw, scaled);
      QE_UNROLL
      for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(scaled[i]));
    }
    QE_UNROLL
    for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
    if (lane == 0) tokens.slots[m * places + warp] = largest;
    if (warp == 0 && lane >= warps && lane < places) tokens.slots[m * places + lane] = 0.f;
  }
  block_sync();
  for (int m = 0; m < p.M; ++m) {
    float unit, inverse, total = 0.f;
    step_of_token(rows.act_max, largest_of(tokens.slots + m * places, warps), unit, inverse);
    if (thread_id() == 0) tokens.unit[m] = stored_unit(rows.act_max, unit);
    const T* row = x + static_cast<size_t>(m) * p.K + k0;
    for (int k = start; k - lane * 8 < rows.Kp; k += stride) total += quantize_rows<T>(rows, row, m, k, unit, inverse);
    if constexpr (WholeColumn) {
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) total += shuffle_xor(total, step);
      if (lane == 0) tokens.slots[(p.M + m) * places + warp] = total;
    }
  }
  block_sync();
  if constexpr (WholeColumn) {
    if (thread_id() >= p.M) return;
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += tokens.slots[(p.M + thread_id()) * places + w];
    tokens.sum[thread_id()] = total;  // read after the barrier in front of the low-rank part
  }
}

}  // namespace qe
