// Launch 2: h = x @ down for the shared expert and for each token's routed expert.
//
// Decode (M <= 16): one block per 16 columns of `down` and slice of K; experts that no token chose exit at once, so only
// bytes that are needed are read. The slices are summed in a fixed order by `main`.
// Prefill: one block per 32 tokens. Routed blocks find their tokens by a stable counting sort over `expert`, each on its
// own (no atomics, nothing to clear), and record the order for `main`.
#pragma once
#include "../include/qe_edge/args.h"
#include "unpack.cuh"

namespace qe {

constexpr int kDownTokens = 32;  // tokens of one prefill block
constexpr int kDownColumnTiles = 2;

// Registers of one warp over its share of K: columns of `down` are the rows of the product, tokens its columns.
template <class T, int Bits, int Tokens8, int Tiles>
QE_DEV void down_accumulate(const DownArgs& p, const int (&tile)[Tiles], const int (&token)[Tokens8], int first,
                            int last, float (&acc)[Tiles][Tokens8][4]) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int blocks = (p.K + 31) / 32;
  QE_UNROLL
  for (int c = 0; c < Tiles; ++c)
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int i = 0; i < 4; ++i) acc[c][t][i] = 0.f;
  for (int b = first + warp; b < last; b += warps) {
    u32x4 x[Tokens8];
    const int k = b * 32 + (lane & 3) * 8;
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) {
      x[t] = u32x4{};
      if (k < p.K) x[t] = load16(static_cast<const T*>(p.x) + static_cast<size_t>(token[t]) * p.K + k);
    }
    QE_UNROLL
    for (int c = 0; c < Tiles; ++c) {
      const size_t block = static_cast<size_t>(tile[c]) * blocks + b;
      uint32_t a[2][4];
      load_down<T, Bits>(p.down, block, lane, a);
      QE_UNROLL
      for (int step = 0; step < 2; ++step)
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t) mma_16<T>(acc[c][t], a[step], x[t].v[step * 2], x[t].v[step * 2 + 1]);
    }
  }
}

template <int Tokens8, int Tiles>
QE_DEV void store_partial(const float (&acc)[Tiles][Tokens8][4], float* sums) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5;
  QE_UNROLL
  for (int c = 0; c < Tiles; ++c)
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int i = 0; i < 4; ++i) sums[(((warp * Tiles + c) * Tokens8 + t) * 4 + i) * 32 + lane] = acc[c][t][i];
}

// The sum over warps of one (column of the block, token of the block), where the accumulator layout put it.
template <int Tokens8, int Tiles>
QE_DEV float collect(const float* sums, int column, int token) {
  const int warps = block_threads() >> 5;
  const int i = ((column >> 3) & 1) * 2 + (token & 1), lane = (column & 7) * 4 + ((token & 7) >> 1);
  float v = 0.f;
  for (int w = 0; w < warps; ++w)
    v += sums[(((w * Tiles + (column >> 4)) * Tokens8 + (token >> 3)) * 4 + i) * 32 + lane];
  return v;
}

template <class T, int Bits, int Tokens8>
QE_DEV void lowrank_down_decode(const DownArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = thread_id() & 31, split = block_y();
  const int tile[1] = {block_x()};
  const int expert = tile[0] < p.shared_tiles ? -1 : (tile[0] - p.shared_tiles) / p.routed_tiles;
  if (expert >= 0) {
    bool wanted = false;
    for (int m = 0; m < p.M; ++m) wanted = wanted || p.expert[m] == expert;
    if (!wanted) return;
  }
  int token[Tokens8];
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t) {
    const int m = t * 8 + (lane >> 2);
    token[t] = m < p.M ? m : p.M - 1;  // the copy's result is not stored
  }
  const int blocks = (p.K + 31) / 32, each = (blocks + p.splits - 1) / p.splits;
  const int first = split * each, last = first + each < blocks ? first + each : blocks;
  float acc[1][Tokens8][4];
  down_accumulate<T, Bits, Tokens8, 1>(p, tile, token, first, last, acc);
  store_partial<Tokens8, 1>(acc, sums);
  block_sync();

  const int rank = 16 * (p.shared_tiles + p.routed_tiles);
  const int at = expert < 0 ? tile[0] : p.shared_tiles + (tile[0] - p.shared_tiles) % p.routed_tiles;
  for (int o = thread_id(); o < 16 * p.M; o += block_threads()) {
    const int column = o & 15, m = o >> 4;
    if (expert >= 0 && p.expert[m] != expert) continue;
    const float v = collect<Tokens8, 1>(sums, column, m) * p.down_scale[tile[0] * 16 + column];
    p.partial[(static_cast<size_t>(split) * p.M + m) * rank + at * 16 + column] = v;
  }
}

// Which tokens a prefill block works on.
struct TokenGroup {
  int expert;  // -1: the shared expert
  int count;
};

// Fills list[0..31] with the tokens of this block; `counts` is [warps][16] of scratch. Every warp scans its own stretch
// of tokens, so the order inside an expert is the token order.
QE_DEV TokenGroup pick_tokens(const DownArgs& p, int block, int* list, int* counts) {
  const int shared_blocks = p.shared_tiles ? (p.M + kDownTokens - 1) / kDownTokens : 0;
  if (block < shared_blocks) {
    const int left = p.M - block * kDownTokens, count = left < kDownTokens ? left : kDownTokens;
    if (thread_id() < kDownTokens) list[thread_id()] = block * kDownTokens + (thread_id() < count ? thread_id() : 0);
    block_sync();
    return {-1, count};
  }
  block -= shared_blocks;
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int stretch = ((p.M + warps - 1) / warps + 31) & ~31, begin = warp * stretch;
  const int end = begin + stretch < p.M ? begin + stretch : p.M;
  int mine = 0;  // lane e counts expert e
  for (int m = begin; m < end; m += 32) {
    const int expert = m + lane < end ? p.expert[m + lane] : -1;
    for (int e = 0; e < p.E; ++e) {
      const int seen = popcount(ballot(expert == e));
      if (lane == e) mine += seen;
    }
  }
  if (lane < 16) counts[warp * 16 + lane] = mine;
  block_sync();

  int start = 0, expert = -1, total = 0;
  for (int e = 0; e < p.E; ++e) {
    total = 0;
    for (int w = 0; w < warps; ++w) total += counts[w * 16 + e];
    const int tiles = (total + kDownTokens - 1) / kDownTokens;
    if (block < tiles) {
      expert = e;
      break;
    }
    block -= tiles;
    start += total;
  }
  if (expert < 0) return {-1, 0};

  const int window = block * kDownTokens, left = total - window, count = left < kDownTokens ? left : kDownTokens;
  int base = 0;
  for (int w = 0; w < warp; ++w) base += counts[w * 16 + expert];
  for (int m = begin; m < end; m += 32) {
    const bool hit = m + lane < end && p.expert[m + lane] == expert;
    const uint32_t hits = ballot(hit);
    const int at = base + popcount(hits & ((1u << lane) - 1u)) - window;
    if (hit && at >= 0 && at < kDownTokens) {
      list[at] = m + lane;
      if (block_y() == 0) p.order[start + window + at] = m + lane;
    }
    base += popcount(hits);
  }
  block_sync();
  if (thread_id() >= count && thread_id() < kDownTokens) list[thread_id()] = list[0];
  block_sync();
  return {expert, count};
}

template <class T, int Bits>
QE_DEV void lowrank_down_prefill(const DownArgs& p) {
  constexpr int kTokens8 = kDownTokens / 8;
  QE_DYNAMIC_SHARED(shared);
  int* list = reinterpret_cast<int*>(shared);
  int* counts = list + kDownTokens;
  float* sums = reinterpret_cast<float*>(counts + 16 * (block_threads() >> 5));
  const TokenGroup group = pick_tokens(p, block_x(), list, counts);
  const int tiles = group.expert < 0 ? p.shared_tiles : p.routed_tiles, first_tile = block_y() * kDownColumnTiles;
  if (group.count == 0 || first_tile >= tiles) return;
  const int base = group.expert < 0 ? 0 : p.shared_tiles + group.expert * p.routed_tiles;

  int tile[kDownColumnTiles], token[kTokens8];
  QE_UNROLL
  for (int c = 0; c < kDownColumnTiles; ++c) tile[c] = base + (first_tile + c < tiles ? first_tile + c : first_tile);
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) token[t] = list[t * 8 + ((thread_id() & 31) >> 2)];
  float acc[kDownColumnTiles][kTokens8][4];
  down_accumulate<T, Bits, kTokens8, kDownColumnTiles>(p, tile, token, 0, (p.K + 31) / 32, acc);
  store_partial<kTokens8, kDownColumnTiles>(acc, sums);
  block_sync();

  const int rank = 16 * (p.shared_tiles + p.routed_tiles);
  const int width = 16 * (tiles - first_tile < kDownColumnTiles ? tiles - first_tile : kDownColumnTiles);
  const int column0 = (group.expert < 0 ? 0 : p.shared_tiles * 16) + first_tile * 16;
  T* h = static_cast<T*>(p.h);
  for (int o = thread_id(); o < width * group.count; o += block_threads()) {
    const int column = o % width, i = o / width;
    const float v = collect<kTokens8, kDownColumnTiles>(sums, column, i);
    store2(h + static_cast<size_t>(list[i]) * rank + column0 + column,
           from_float<T>(v * p.down_scale[(base + first_tile) * 16 + column]).bits);
  }
}

}  // namespace qe
