// h = x @ down for the shared expert and for each token's routed expert. One block per 16 columns of `down` (of more than 64
// tokens: 64) and slice of K.
//
// Decode: all experts' columns at once, because the scores are known only when the launch ends; reading them costs less than
// a launch of its own. `main` adds the slices up in their order, for the experts that the tokens chose.
// Prefill: 32 tokens a block. Routed blocks find their tokens by a stable counting sort over `expert`, each on its own, and
// record the order for `main`. Whoever finishes the last slice adds all of them up, in their order.
#pragma once
#include "../include/qe_edge/args.h"
#include "prepare.cuh"
#include "unpack.cuh"

namespace qe {

// What a lane multiplies of 32 rows of x: eight values of each of its tokens.
template <class T, int Tokens8>
QE_DEV void load_x_rows(const DownArgs& p, const int (&token)[Tokens8], int block, u32x4 (&x)[Tokens8]) {
  const int k = block * 32 + (thread_id() & 3) * 8;
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t) {
    x[t] = u32x4{};
    if (k < p.K) x[t] = load16(static_cast<const T*>(p.x) + static_cast<size_t>(token[t]) * p.K + k);
  }
}

// Columns of `down` are the rows of the product, tokens its columns.
template <class T, int Bits, int Tokens8>
QE_DEV void multiply_down(const DownWords<Bits>& words, const u32x4 (&x)[Tokens8], float (&acc)[Tokens8][4]) {
  QE_UNROLL
  for (int step = 0; step < 2; ++step) {
    uint32_t a[4];
    down_fragment<T, Bits>(words, step, a);
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) mma_16<T>(acc[t], a, x[t].v[step * 2], x[t].v[step * 2 + 1]);
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

// The stretch of K of one slice, in blocks of 32 rows.
struct Slice {
  int first, last;
  QE_DEV Slice(const DownArgs& p, int split) {
    const int blocks = (p.K + 31) / 32, each = (blocks + p.splits - 1) / p.splits;
    first = split * each;
    last = first + each < blocks ? first + each : blocks;
  }
};

// Starts the way of the next launch's weights from memory; every block has a part of them.
QE_DEV void prefetch_next(const DownArgs& p) {
  const int64_t threads = static_cast<int64_t>(grid_x()) * p.splits * block_threads();
  const int64_t thread = (static_cast<int64_t>(block_y()) * grid_x() + block_x()) * block_threads() + thread_id();
  for (int64_t at = thread * 128; at < p.next_bytes; at += threads * 128)
    prefetch_line(static_cast<const uint8_t*>(p.next) + at);
}

// Tokens from m0 on, `count` of them, in one slice of K and 16 columns of `down`. Weights are on their way before the launch
// in front ends: of most layers they are all in registers then.
template <class T, int Bits, int Tokens8>
QE_DEV void down_decode(const DownArgs& p, int tile, int m0, int count, int split) {
  constexpr int kHeld = 4;
  QE_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const Slice slice(p, split);
  const size_t block0 = static_cast<size_t>(tile) * ((p.K + 31) / 32);
  DownWords<Bits> held[kHeld];
  QE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const int block = slice.first + warp + i * warps;
    if (block < slice.last) load_down<Bits>(p.down, block0 + block, lane, held[i]);
  }
  const float scale = p.down_scale[tile * 16 + (thread_id() & 15)];  // of this thread's column below
  prefetch_next(p);
  wait_for_previous();
  int token[Tokens8];
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t) {
    const int m = t * 8 + (lane >> 2);
    token[t] = m0 + (m < count ? m : count - 1);  // the copy's result is not stored
  }
  float acc[1][Tokens8][4];
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t)
    QE_UNROLL
    for (int i = 0; i < 4; ++i) acc[0][t][i] = 0.f;
  u32x4 x[kHeld][Tokens8];
  QE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    if (slice.first + warp + i * warps < slice.last) load_x_rows<T>(p, token, slice.first + warp + i * warps, x[i]);
  QE_UNROLL
  for (int i = 0; i < kHeld; ++i)
    if (slice.first + warp + i * warps < slice.last) multiply_down<T, Bits>(held[i], x[i], acc[0]);
  for (int block = slice.first + warp + kHeld * warps; block < slice.last; block += warps) {
    load_down<Bits>(p.down, block0 + block, lane, held[0]);
    load_x_rows<T>(p, token, block, x[0]);
    multiply_down<T, Bits>(held[0], x[0], acc[0]);
  }
  store_partial<Tokens8, 1>(acc, sums);
  block_sync();
  const int columns = 16 * (p.shared_tiles + p.E * p.routed_tiles);
  for (int o = thread_id(); o < 16 * count; o += block_threads()) {
    const int column = o & 15, m = o >> 4;
    const float v = collect<Tokens8, 1>(sums, column, m) * scale;
    p.partial[(static_cast<size_t>(split) * p.M + m0 + m) * columns + tile * 16 + column] = v;
  }
}

// What a slice of K adds to every token's scores.
template <class T>
QE_DEV void scores_decode(const DownArgs& p, int split) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const Slice slice(p, split);
  const int end = slice.last * 32 < p.K ? slice.last * 32 : p.K;
  wait_for_previous();
  for (int m = warp; m < p.M; m += warps) {
    float score[kMaxExperts];
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) score[e] = 0.f;
    for (int k = slice.first * 32 + lane * 8; k < end; k += 256) {
      const u32x4 x = load16(static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + k);
      float raw[8];
      QE_UNROLL
      for (int i = 0; i < 8; ++i) raw[i] = half_of<T>(x, i);
      add_scores<T>(static_cast<const T*>(p.router), p.E, p.K, k, raw, score);
    }
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) {
      if (e >= p.E) continue;
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) score[e] += shuffle_xor(score[e], step);
      if (lane == 0) p.scores[(static_cast<size_t>(split) * p.M + m) * kMaxExperts + e] = score[e];
    }
  }
}

// One block for every slice and tile of `down`, and one for every slice's scores.
template <class T, int Bits>
QE_DEV void lowrank_down_decode(const DownArgs& p) {
  const int tiles = p.shared_tiles + p.E * p.routed_tiles;
  if (block_x() == tiles) return scores_decode<T>(p, block_y());
  down_decode<T, Bits, 1>(p, block_x(), 0, p.M, block_y());
}

// The first M blocks prepare a token each. The others have a slice, a tile and 16 tokens.
template <class T, int Bits>
QE_DEV void prepare_and_down(const PrepareDownArgs& p) {
  if (block_x() < p.down.M) return prepare<T>(p.prepare);
  const int tiles = p.down.shared_tiles + p.down.E * p.down.routed_tiles, groups = (p.down.M + 15) / 16;
  const int at = block_x() - p.down.M, m0 = at % groups * 16, left = p.down.M - m0;
  down_decode<T, Bits, 2>(p.down, at / groups % tiles, m0, left < 16 ? left : 16, at / groups / tiles);
}

// Which tokens a prefill block works on.
struct TokenGroup {
  int expert;  // -1: the shared expert
  int count;
};

// Fills list[0..31] with the tokens of this block; `counts` is [warps][16] of scratch. Every warp scans its own stretch
// of tokens, so the order inside an expert is the token order.
QE_DEV TokenGroup pick_tokens(const DownArgs& p, int block, bool records, int* list, int* counts) {
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
      if (records) p.order[start + window + at] = m + lane;
    }
    base += popcount(hits);
  }
  block_sync();
  if (thread_id() >= count && thread_id() < kDownTokens) list[thread_id()] = list[0];
  block_sync();
  return {expert, count};
}

// Whether this block is the last of `parts` that come here, after all of them wrote what they have to add. What the
// others wrote is read with load_fresh.
QE_DEV bool last_to_arrive(uint32_t* counter, int parts, int* flag) {
  block_sync();
  if (thread_id() == 0) {
    device_fence();
    *flag = count_up(counter, static_cast<uint32_t>(parts - 1)) == static_cast<uint32_t>(parts - 1);
    device_fence();
  }
  block_sync();
  return *flag;
}

// Values that lie `step` apart, one of each slice: all of them are on their way at once, from here on.
QE_DEV void load_slices(const float* from, int slices, int step, float (&part)[kMaxSplits]) {
  QE_UNROLL
  for (int s = 0; s < kMaxSplits; ++s) {
    part[s] = 0.f;
    if (s < slices) part[s] = load_fresh(from + static_cast<size_t>(s) * step);
  }
}
QE_DEV float sum_in_order(const float (&part)[kMaxSplits]) {
  float sum = 0.f;
  QE_UNROLL
  for (int s = 0; s < kMaxSplits; ++s) sum += part[s];
  return sum;
}
QE_DEV float sum_of_slices(const float* from, int slices, int step) {
  float part[kMaxSplits];
  load_slices(from, slices, step, part);
  return sum_in_order(part);
}

template <class T, int Bits>
QE_DEV void lowrank_down_prefill(const DownArgs& p) {
  constexpr int kTokens8 = kDownTokens / 8;
  QE_DYNAMIC_SHARED(shared);
  int* list = reinterpret_cast<int*>(shared);
  int* counts = list + kDownTokens;
  int* flag = counts + 16 * (block_threads() >> 5);
  float* sums = reinterpret_cast<float*>(flag + 4);
  const int most = p.shared_tiles > p.routed_tiles ? p.shared_tiles : p.routed_tiles;
  const int strips = (most + kDownColumnTiles - 1) / kDownColumnTiles, strip = block_y() % strips, split = block_y() / strips;
  wait_for_previous();
  const TokenGroup group = pick_tokens(p, block_x(), block_y() == 0, list, counts);
  const int tiles = group.expert < 0 ? p.shared_tiles : p.routed_tiles, first_tile = strip * kDownColumnTiles;
  if (group.count == 0 || first_tile >= tiles) return;
  const int base = group.expert < 0 ? 0 : p.shared_tiles + group.expert * p.routed_tiles;

  int tile[kDownColumnTiles], token[kTokens8];
  QE_UNROLL
  for (int c = 0; c < kDownColumnTiles; ++c) tile[c] = base + (first_tile + c < tiles ? first_tile + c : first_tile);
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) token[t] = list[t * 8 + ((thread_id() & 31) >> 2)];
  const Slice slice(p, split);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, blocks = (p.K + 31) / 32;
  float acc[kDownColumnTiles][kTokens8][4];
  QE_UNROLL
  for (int c = 0; c < kDownColumnTiles; ++c)
    QE_UNROLL
    for (int t = 0; t < kTokens8; ++t)
      QE_UNROLL
      for (int i = 0; i < 4; ++i) acc[c][t][i] = 0.f;
  QE_UNROLL_BY(2)
  for (int block = slice.first + warp; block < slice.last; block += warps) {
    u32x4 x[kTokens8];
    DownWords<Bits> words[kDownColumnTiles];
    QE_UNROLL
    for (int c = 0; c < kDownColumnTiles; ++c) load_down<Bits>(p.down, static_cast<size_t>(tile[c]) * blocks + block, lane, words[c]);
    load_x_rows<T>(p, token, block, x);
    QE_UNROLL
    for (int c = 0; c < kDownColumnTiles; ++c) multiply_down<T, Bits>(words[c], x, acc[c]);
  }
  release_next();  // as in main_prefill
  store_partial<kTokens8, kDownColumnTiles>(acc, sums);
  block_sync();

  const int rank = 16 * (p.shared_tiles + p.routed_tiles);
  const int width = 16 * (tiles - first_tile < kDownColumnTiles ? tiles - first_tile : kDownColumnTiles);
  const int column0 = (group.expert < 0 ? 0 : p.shared_tiles * 16) + first_tile * 16;
  const float* scale = p.down_scale + (base + first_tile) * 16;
  T* h = static_cast<T*>(p.h) + column0;
  float* partial = p.partial + column0;
  constexpr int kColumns = kDownColumnTiles * 16;
  for (int o = thread_id(); o < kColumns * group.count; o += block_threads()) {
    const int column = o % kColumns, i = o / kColumns;
    if (column >= width) continue;
    const float v = collect<kTokens8, kDownColumnTiles>(sums, column, i) * scale[column];
    if (p.splits == 1) {
      store2(h + static_cast<size_t>(list[i]) * rank + column, from_float<T>(v).bits);
    } else {
      partial[(static_cast<size_t>(split) * p.M + list[i]) * rank + column] = v;
    }
  }
  if (p.splits == 1 || !last_to_arrive(p.counters + block_x() * strips + strip, p.splits, flag)) return;
  QE_UNROLL_BY(2)
  for (int o = thread_id() * 4; o < kColumns * group.count; o += block_threads() * 4) {
    const int column = o % kColumns, i = o / kColumns;
    if (column >= width) continue;
    const size_t at = static_cast<size_t>(list[i]) * rank + column, step = static_cast<size_t>(p.M) * rank;
    float part[kMaxPrefillSplits][4], v[4] = {0.f, 0.f, 0.f, 0.f};
    QE_UNROLL
    for (int s = 0; s < kMaxPrefillSplits; ++s)
      if (s < p.splits) load_fresh(p.partial + column0 + s * step + at, part[s]);
    QE_UNROLL
    for (int s = 0; s < kMaxPrefillSplits; ++s)
      QE_UNROLL
      for (int c = 0; c < 4; ++c) v[c] += s < p.splits ? part[s][c] : 0.f;
    store8(h + at, {{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])}});
  }
}

}  // namespace qe
