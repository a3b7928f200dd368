// Launch 1, once per distinct input: channel scale, per-token absolute maximum, int8 or 6-bit values, router scores in
// fp32 and their argmin (spec QE.md 3, 7 and 8). One block per token; every sum has a fixed order.
#pragma once
#include "../include/qe_edge/args.h"
#include "prim.cuh"

namespace qe {

constexpr int kMaxExperts = 16;
constexpr int kPrepareSlots = kMaxExperts + 1;  // the scores, then the maximum

// Eight activations, and the same after the channel scale: a product of two 16-bit floats, exact in float32.
// Zero beyond K.
template <class T>
QE_DEV void load_scaled(const PrepareArgs& p, const T* row, int k, float (&raw)[8], float (&scaled)[8]) {
  if (k >= p.K) {
    QE_UNROLL
    for (int i = 0; i < 8; ++i) raw[i] = 0.f, scaled[i] = 0.f;
    return;
  }
  const u32x4 x = load16(row + k);
  u32x4 omega{};
  if (p.inv_omega) omega = load16(static_cast<const T*>(p.inv_omega) + k);
  QE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const T value{static_cast<uint16_t>(x.v[i / 2] >> (16 * (i & 1)))};
    const T factor{static_cast<uint16_t>(omega.v[i / 2] >> (16 * (i & 1)))};
    raw[i] = to_float(value);
    scaled[i] = p.inv_omega ? raw[i] * to_float(factor) : raw[i];
  }
}

// Leaves in slot 0..E-1 the score sums and in slot kMaxExperts the maximum, for the whole block.
QE_DEV void reduce_block(float (&score)[kMaxExperts], float largest, float* slots) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  QE_UNROLL
  for (int step = 16; step > 0; step >>= 1) {
    largest = max_f(largest, shuffle_xor(largest, step));
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) score[e] += shuffle_xor(score[e], step);
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

template <class T>
QE_DEV void prepare(const PrepareArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  float* slots = reinterpret_cast<float*>(shared);
  const int token = block_x(), stride = block_threads() * 8;
  const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(token) * p.K;
  const T* router = static_cast<const T*>(p.router);
  float raw[8], scaled[8];

  float score[kMaxExperts], largest = 0.f;
  QE_UNROLL
  for (int e = 0; e < kMaxExperts; ++e) score[e] = 0.f;
  for (int k = thread_id() * 8; k < p.K; k += stride) {
    load_scaled<T>(p, row, k, raw, scaled);
    QE_UNROLL
    for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(scaled[i]));
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) {
      if (e >= p.E) continue;
      const u32x4 weight = load16(router + static_cast<size_t>(e) * p.K + k);
      QE_UNROLL
      for (int i = 0; i < 8; ++i) {
        const T w{static_cast<uint16_t>(weight.v[i / 2] >> (16 * (i & 1)))};
        score[e] += abs_f(raw[i]) * to_float(w);
      }
    }
  }
  reduce_block(score, largest, slots);
  if (thread_id() == 0 && p.expert) p.expert[token] = choose_expert(slots, p.E);
  if (!p.act) return;

  const float scale = p.act_max ? divide_rn(max_f(slots[kMaxExperts], 1e-5f), static_cast<float>(p.act_max)) : 1.f;
  if (thread_id() == 0 && p.act_max) p.token_scale[token] = scale;
  for (int k = thread_id() * 8; k < p.Kp; k += stride) {
    load_scaled<T>(p, row, k, raw, scaled);
    const size_t at = static_cast<size_t>(token) * p.Kp + k;
    if (p.act_max) {
      u32x2 packed{};
      QE_UNROLL
      for (int i = 0; i < 8; ++i) {
        int q = round_to_int(divide_rn(scaled[i], scale));
        q = q > p.act_max ? p.act_max : q < -p.act_max - 1 ? -p.act_max - 1 : q;
        packed.v[i / 4] |= (static_cast<uint32_t>(q) & 0xFFu) << (8 * (i & 3));
      }
      store8(static_cast<int8_t*>(p.act) + at, packed);
    } else {
      u32x4 packed{};
      QE_UNROLL
      for (int i = 0; i < 8; ++i) packed.v[i / 2] |= static_cast<uint32_t>(from_float<T>(scaled[i]).bits) << (16 * (i & 1));
      store16(static_cast<T*>(p.act) + at, packed);
    }
  }
}

}  // namespace qe
