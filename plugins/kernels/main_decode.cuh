// `main` of at most 64 tokens. Packed weights are the A operand (16 output columns x 128 rows per pair of 16-byte loads);
// tokens are the 8-wide operand, 8 or 16 to a block. A block has several sets of warps; a set shares the K of 32 columns.
// Where the columns alone do not fill the GPU, blocks split K too. Warps' sums meet once, and blocks' sums in the block that
// comes last; both are added in a fixed order.
#pragma once
#include "../include/qe_edge/args.h"
#include "decode_chunk.cuh"
#include "decode_tokens.cuh"

namespace qe {


// A warp's weights on their way from memory. A lane reads only what it copied itself, so that no barrier is needed; and the
// copies start before the launch in front ends.
template <int Bits>
struct Ring {
  const uint8_t* from;
  unsigned char* slots;
  int left;  // chunks to copy
  QE_DEV void push(unsigned char* slot) {
    if (left > 0) {
      QE_UNROLL
      for (int i = 0; i < Bits; ++i) cp_async16(slot + i * kPieceBytes, from + i * kPieceBytes);
      from += kBlockBytes<Bits>;
      --left;
    }
    cp_async_commit();
  }
  QE_DEV void start(const uint8_t* weights, int count) {
    from = weights, left = count;
    QE_UNROLL
    for (int i = 0; i < kRing; ++i) push(slots + i * kBlockBytes<Bits>);
  }
};

// An accumulator over a slice of K as a float, less the zero point's share when one zero point belongs to the whole column.
// `sum` is what the activations of that slice add up to, in their stored units.
template <int Mode, bool WholeColumn, class Acc>
QE_DEV float without_zero(Acc acc, int zero, float sum) {
  if (!WholeColumn) return static_cast<float>(acc);
  return static_cast<float>(acc) - static_cast<float>(zero) * (Mode == kInt8 ? sum : sum * kCodeUnit);
}

// Steps of 16 ranks whose words of `up` a warp has in registers before it needs them.
template <int Tokens8>
constexpr int kAhead = Tokens8 == 1 ? 2 : 1;

// h @ up, on the tensor cores: 16 ranks at a time, the steps dealt out to the warps of a set.
template <class T, int Tokens8>
QE_DEV void decode_lowrank(const MainArgs& p, int part, const Tokens& tokens, const UpWords (&ahead)[kAhead<Tokens8>][kDecodeTiles], int pair0,
                           const int (&token)[Tokens8], int count, float (&out)[kDecodeTiles][Tokens8][4]) {
  const int lane = thread_id() & 31, pair = (lane & 3) * 2;
  const int rank = 16 * (p.shared_tiles + p.routed_tiles);
  uint32_t hit = 0;
  for (int m = 0; p.E && m < count; ++m) hit |= 1u << tokens.expert[m];
  for (int e = -1;;) {
    const int tiles = e < 0 ? p.shared_tiles : p.routed_tiles;
    const int h0 = e < 0 ? 0 : p.shared_tiles, up0 = e < 0 ? 0 : p.shared_tiles + e * p.routed_tiles;
    for (int step = part; step < tiles; step += p.set_warps) {
      uint32_t b[Tokens8][2];
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t) {
        const bool routed_here = e < 0 || tokens.expert[token[t]] == e;
        const uint16_t* from = tokens.h + token[t] * rank + (h0 + step) * 16 + pair;
        b[t][0] = routed_here ? load4(from) : 0u;
        b[t][1] = routed_here ? load4(from + 8) : 0u;
      }
      QE_UNROLL
      for (int i = 0; i < kDecodeTiles; ++i) {
        uint32_t u[4];
        UpWords words = step == part ? ahead[0][i] : ahead[kAhead<Tokens8> - 1][i];
        if (e >= 0 || step >= part + kAhead<Tokens8> * p.set_warps)
          load_up(p.up, p.up_bits, static_cast<size_t>(up0 + step) * (p.Np / 16) + pair0 + i, lane, words);
        up_fragments<T>(words, p.up_bits, u);
        const uint32_t a[4] = {u[0], u[2], u[1], u[3]};
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t) mma_16<T>(out[i][t], a, b[t][0], b[t][1]);
      }
    }
    if (!hit) return;
    e = popcount((hit & (0u - hit)) - 1u);  // the next expert that a token has
    hit &= hit - 1u;
  }
}

template <bool Integer>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<true> {
  using type = int;
};

// What the warps of one set found for token m and this lane's column, added up in their order.
template <int Tokens8>
QE_DEV float sum_of_warps(const MainArgs& p, const float* results, int set, int m) {
  const int c = thread_id() & 31, j = ((c >> 3) & 1) * 2 + (m & 1), at = (c & 7) * 4 + ((m & 7) >> 1);
  const float* from = results + (((set * p.set_warps * kDecodeTiles + (c >> 4)) * Tokens8 + (m >> 3)) * 4 + j) * 32 + at;
  float v = 0.f;
  QE_UNROLL_BY(4)
  for (int w = 0; w < p.set_warps; ++w) v += from[w * (kDecodeTiles * Tokens8 * 4 * 32)];
  return v;
}

template <class T>
QE_DEV void store_y(const MainArgs& p, int m, int n, float v, float scale, float bias) {
  store2(static_cast<T*>(p.y) + static_cast<size_t>(m) * p.N + n, from_float<T>(v * scale + bias).bits);
}

template <class T, int Bits, int Mode, int Groups, bool Zeros, int Tokens8>
QE_DEV void main_decode(const MainArgs& p) {
  constexpr bool kQuantizes = Tokens8 == 1, kWholeColumn = Zeros && Groups == 0;
  constexpr int kRowBytes = Mode == kInt8 ? 1 : 2;
  QE_DYNAMIC_SHARED(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, blocks = p.Np / kBlockColumns, stride = grid_x();
  const int set = (warp * p.set_factor) >> 8, part = warp - set * p.set_warps;
  const int split = kQuantizes ? block_y() : block_y() / p.token_groups;
  const int m0 = kQuantizes ? 0 : (block_y() - split * p.token_groups) * kGroupTokens;
  const int left = p.M - m0, count = left < kGroupTokens ? left : kGroupTokens;
  const int first = split * p.slice_chunks;  // of this block's slice of K
  const int own = p.chunks - first < p.slice_chunks ? p.chunks - first : p.slice_chunks;
  const int start = part * p.warp_chunks, end = start + p.warp_chunks < own ? start + p.warp_chunks : own;

  // What does not depend on the launch in front is on its way before that one ends.
  int block = block_x() + set * stride;
  Ring<Bits> ring;
  ring.slots = shared + p.ring_at + warp * (kRing * kBlockBytes<Bits>) + lane * 16;
  const auto start_ring = [&]() {
    const uint8_t* weights = p.weight + (static_cast<size_t>(block) * p.chunks + first + start) * kBlockBytes<Bits> + lane * 16;
    ring.start(weights, block < blocks ? end - start : 0);
  };
  const bool corrects = split == 0 && p.shared_tiles + p.routed_tiles > 0;
  float scale[2 * kDecodeTiles], out_scale = 0.f, bias = 0.f;
  UpWords up_ahead[kAhead<Tokens8>][kDecodeTiles];
  // The scales of what this warp multiplies and, of a lone token, of what it stores: 32 columns of set `warp`. Then the
  // words of `up` that it multiplies first.
  const auto load_ahead = [&](int block0) {
    const int n0 = block * kDecodeColumns, stored = (block0 + warp * stride) * kDecodeColumns + lane;
    QE_UNROLL
    for (int i = 0; i < 2 * kDecodeTiles; ++i) scale[i] = block < blocks ? p.columns[n0 + (lane >> 2) + i * 8] : 0.f;
    if (count == 1 && warp < p.sets && stored < p.Np) out_scale = p.columns[p.Np + stored], bias = p.columns[2 * p.Np + stored];
    QE_UNROLL
    for (int n = 0; n < kAhead<Tokens8>; ++n)
      QE_UNROLL
      for (int i = 0; i < kDecodeTiles; ++i)
        if (corrects && part + n * p.set_warps < p.shared_tiles && block < blocks)
          load_up(p.up, p.up_bits, static_cast<size_t>(part + n * p.set_warps) * (p.Np / 16) + n0 / 16 + i, lane, up_ahead[n][i]);
  };
  u32x2 first_scales{};  // before the weights, or they would have to queue behind them
  if constexpr (kQuantizes) load_first_scales<T>(p, first_scales);
  start_ring();
  load_ahead(block_x());
  const Tokens tokens(p, shared);
  const uint8_t* act = static_cast<const uint8_t*>(p.act);
  const uint8_t* group_sums = static_cast<const uint8_t*>(p.sums);
  if constexpr (kQuantizes) {
    act = shared;
    group_sums = shared + p.group_sums_at;
    const int k0 = first * kChunk;
    const Rows rows{p.inv_omega ? static_cast<const T*>(p.inv_omega) + k0 : nullptr, shared,
                    Zeros && Groups != 0 ? reinterpret_cast<uint32_t*>(shared + p.group_sums_at) : nullptr, p.K - k0,
                    own * kChunk, p.M, p.M, Mode == kInt8 ? p.act_max : 0, Groups == 0 ? 0 : kChunk / Groups, p.code_shifts};
    quantize_slice<T, Mode, Groups, Zeros>(p, rows, k0, first_scales, tokens);
  } else {
    const size_t at = static_cast<size_t>(m0) * p.chunks + static_cast<size_t>(first) * kGroupTokens;
    act += at * (kChunk * kRowBytes);
    if (Groups != 0) group_sums += at * (Groups * 4);
    wait_for_previous();
    if (thread_id() < count) {
      tokens.unit[thread_id()] = p.token_scale[m0 + thread_id()];
      // The sums are those of all of K, so the first slice takes the zero points off.
      if (kWholeColumn) tokens.sum[thread_id()] = split == 0 ? static_cast<const float*>(p.sums)[m0 + thread_id()] : 0.f;
      if (p.E) tokens.expert[thread_id()] = p.expert[m0 + thread_id()];
    }
    if (p.E) block_sync();
  }

  float* results = reinterpret_cast<float*>(shared + p.results_at);  // [warps][tiles][Tokens8][4][32]
  // What the launch in front found is collected once. Of a lone token without experts it is on its way while the first
  // columns are multiplied.
  bool collects = corrects;
  const int shared_rank = 16 * p.shared_tiles;
  const bool lone = kQuantizes && corrects && p.M == 1 && p.E == 0 && shared_rank <= block_threads();
  const bool early = lone && thread_id() < shared_rank;
  float parts_of_h[kMaxSplits];
  if (early) load_slices(p.partial + thread_id(), p.splits, shared_rank, parts_of_h);
  for (int block0 = block_x(); block0 < blocks; block0 += stride * p.sets, block += stride * p.sets) {
    const int n0 = block * kDecodeColumns;
    const bool present = block < blocks;  // the last columns may be fewer than the sets
    typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kDecodeTiles][Tokens8][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j) acc[i][t][j] = 0;
    Cursor<Bits, Mode, Groups, Tokens8> at(p, block, first + start, first, act, group_sums, count);
    unsigned char* slot = ring.slots;
    constexpr bool kCrowded = Mode == k16Bit && Groups != 0;
    constexpr int kAtOnce = Tokens8 == 2 && (kCrowded || Groups == 2) ? 1 : 2;
    QE_UNROLL_BY(kAtOnce)
    for (int chunk = start; chunk < (present ? end : 0); ++chunk) {
      cp_async_wait<kRing - 1>();
      BlockWords<Bits> w;
      QE_UNROLL
      for (int i = 0; i < Bits; ++i) w[i] = load16(slot + i * kPieceBytes);
      if constexpr (Mode == kInt8 && Groups == 2) {
        decode_two_groups_s8<Bits, Zeros, Tokens8>(at, w, acc);
      } else if constexpr (Mode == kInt8) {
        decode_chunk_s8<Bits, Groups, Zeros, Tokens8>(at, w, acc);
      } else {
        decode_chunk_16<Bits, Groups, Tokens8>(at, w, acc);
      }
      ring.push(slot);
      slot = slot == ring.slots + (kRing - 1) * kBlockBytes<Bits> ? ring.slots : slot + kBlockBytes<Bits>;
      at.next();
    }
    if (collects) {
      if (early) {
        // Else they would be added up, and so waited for, in front of the loop.
        QE_UNROLL
        for (int s = 0; s < kMaxSplits; ++s) hold(parts_of_h[s]);
        store2(tokens.h + thread_id(), from_float<T>(sum_in_order(parts_of_h)).bits);
      } else if (!lone) {
        collect_correction<T, Tokens8>(p, m0, count, tokens);
      }
      collects = false;
    }
    block_sync();  // h, units and sums of the activations are there

    int token[Tokens8];  // found only now: registers that hold them through the loop make the crowded kernels spill
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) {
      const int m = t * 8 + (lane >> 2);
      token[t] = m < count ? m : count - 1;  // the copy's result is not stored
    }
    constexpr float kUnit = Mode == kInt8 && Groups == 2 && Zeros ? kSmallUnit : 1.f;
    int z[4] = {0, 0, 0, 0};
    if (kWholeColumn && part == 0 && present) unpack_zeros(load4(p.zeros + n0 + (lane >> 2) * 4), z);  // once for all warps
    float out[kDecodeTiles][Tokens8][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int m = t * 8 + (lane & 3) * 2 + (j & 1), at = m < count ? m : count - 1;
          const float v = without_zero<Mode, kWholeColumn>(acc[i][t][j], z[2 * i + j / 2], kWholeColumn ? tokens.sum[at] : 0.f);
          out[i][t][j] = v * (scale[2 * i + (j >> 1)] * tokens.unit[at] * kUnit);
        }
    if (corrects && present) decode_lowrank<T, Tokens8>(p, part, tokens, up_ahead, n0 / 16, token, count, out);
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j) results[(((warp * kDecodeTiles + i) * Tokens8 + t) * 4 + j) * 32 + lane] = out[i][t][j];
    const bool again = block0 + stride * p.sets < blocks;
    const float stored_scale = out_scale, stored_bias = bias;
    if (again) {
      block += stride * p.sets;
      start_ring();
      load_ahead(block0 + stride * p.sets);
      block -= stride * p.sets;
    }
    block_sync();
    // A warp stores 32 columns of one token at a time.
    const int all = p.sets * count, warps = block_threads() >> 5;
    for (int pair = warp; pair < all; pair += warps) {
      const int from_set = count == 1 ? pair : pair / count, m = pair - from_set * count;
      const int n = (block0 + from_set * stride) * kDecodeColumns + lane;
      if (n >= p.Np) continue;
      const float v = sum_of_warps<Tokens8>(p, results, from_set, m);
      if (p.k_splits > 1) {
        p.slices[(static_cast<size_t>(split) * p.M + m0 + m) * p.Np + n] = v;
      } else if (n < p.N) {
        const bool own_set = count == 1 && pair == warp;
        store_y<T>(p, m0 + m, n, v, own_set ? stored_scale : p.columns[p.Np + n], own_set ? stored_bias : p.columns[2 * p.Np + n]);
      }
    }
    if (again) block_sync();  // the results are read before the next columns' are written
  }
  if (p.k_splits == 1 || !last_to_arrive(p.counters + (m0 / kGroupTokens) * blocks + block_x(), p.k_splits, tokens.flag)) return;
  for (int m = warp; m < count; m += block_threads() >> 5) {
    const int n = block_x() * kDecodeColumns + lane;
    if (n >= p.N) continue;
    const float* from = p.slices + static_cast<size_t>(m0 + m) * p.Np + n;
    store_y<T>(p, m0 + m, n, sum_of_slices(from, p.k_splits, p.M * p.Np), p.columns[p.Np + n], p.columns[2 * p.Np + n]);
  }
}

}  // namespace qe
