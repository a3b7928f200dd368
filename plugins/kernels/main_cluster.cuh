// The whole operator for 1 to 8 tokens in one launch, on chips with clusters (prim.cuh): a cluster of blocks has some columns,
// and each of its blocks has a slice of their K. Blocks tell each other what all of them need, through shared memory:
//
//   1. the tokens' maxima, each of its slice of x; then a block quantizes its slice;
//   2. parts of x @ down of the shared expert and of the router's scores; then, with experts, parts of the chosen ones';
//   3. what its slice adds to y, to the block that owns the columns: 32 of them in turn, which also adds h @ up and stores y.
//
// Weights and factors are on their way before the launch in front ends. All sums have a fixed order. Code that runs once is
// as slow as it is long, so its loops are not unrolled.
#pragma once
#include "../include/qe_edge/args.h"
#include "main_decode.cuh"

namespace qe {

// Places in shared memory, of all blocks alike. "From" counts the blocks of the cluster.
struct ClusterShared {
  float* largest;      // [from][warps][M], or of this block alone
  float* slice_sum;    // [from][warps][M]: sums of the activations
  float* part;         // [from][M][columns]: parts of the shared h, and of scores behind them
  float* routed_part;  // [from][M][routed]: of the chosen experts' h
  float* results;      // [sets that this block owns][from][parts][M][32], columns in the order of place_of
  float* sums;         // [warps][M][columns]: of this block, before they become a part
  float* scales;       // of all columns of `down`
  float* unit;         // [M]: what one unit of the activations stands for
  float* scores;       // [M][kMaxExperts]
  int32_t* expert;     // [M]
  float* low;          // [sets that this block owns][M][32]: h @ up
  uint16_t* h;         // [M][rank]
  // What comes from all blocks, in this order: maxima, parts, routed parts; results and sums of activations.
  uint64_t *largest_box, *part_box, *routed_box, *result_box;
  QE_DEV ClusterShared(const ClusterArgs& p, unsigned char* shared) {
    const auto at = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
    largest = at(p.largest_at), slice_sum = at(p.slice_sum_at), part = at(p.part_at), routed_part = at(p.routed_part_at);
    results = at(p.results_at), sums = at(p.sums_at), unit = at(p.unit_at), scores = at(p.scores_at), scales = at(p.scales_at), low = at(p.low_at);
    largest_box = reinterpret_cast<uint64_t*>(shared + p.boxes_at);
    part_box = largest_box + 1, routed_box = largest_box + 2, result_box = largest_box + 3;
    expert = reinterpret_cast<int32_t*>(shared + p.expert_at), h = reinterpret_cast<uint16_t*>(shared + p.h_at);
  }
};

// What one block is: its slice of K, and the 32-column sets of its cluster.
struct ClusterBlock {
  int rank, cluster, clusters, first, own, sets, owned;
  QE_DEV explicit ClusterBlock(const ClusterArgs& p) {
    rank = cluster_rank(), cluster = block_x() >> p.cluster_shift, clusters = grid_x() >> p.cluster_shift;
    first = rank * p.slice_chunks;
    own = p.chunks - first < p.slice_chunks ? p.chunks - first : p.slice_chunks;
    sets = p.cluster_sets + (cluster < p.longer_clusters ? 1 : 0);
    owned = (sets - rank + p.cluster_blocks - 1) >> p.cluster_shift;
  }
  QE_DEV int end_of_32(const ClusterArgs& p) const {  // of the slice, in blocks of 32 rows
    const int all = (p.K + 31) / 32, end = (first + own) * 4;
    return all < end ? all : end;
  }
  QE_DEV int columns_of(int set) const { return cluster + set * clusters; }  // in blocks of 32
  QE_DEV int owned_columns(const ClusterArgs& p, int slot) const { return columns_of((slot << p.cluster_shift) + rank); }
};

// A warp's weights on their way from memory, of one task after the other. A task is a part of the slice of one set of columns.
template <int Bits>
struct Feed {
  Ring<Bits> ring;
  int next;  // task
  QE_DEV void begin(const ClusterArgs& p, const ClusterBlock& b) {
    const int tasks = b.sets * p.parts, warps = block_threads() >> 5, lane = thread_id() & 31;
    for (; ring.left <= 0 && next < tasks; next += warps) {
      const int set = (next * p.parts_factor) >> 16, start = (next - set * p.parts) * p.part_chunks;
      const int left = b.own - start;
      ring.left = left < p.part_chunks ? left : p.part_chunks;
      ring.from = p.weight + (static_cast<size_t>(b.columns_of(set)) * p.chunks + b.first + start) * kBlockBytes<Bits> + lane * 16;
    }
  }
  QE_DEV void push(const ClusterArgs& p, const ClusterBlock& b, unsigned char* slot) {
    if (ring.left <= 0) begin(p, b);
    ring.push(slot);
  }
};

// Lines of memory, from all threads of a block.
QE_DEV void prefetch_bytes(const void* from, size_t bytes) {
  for (size_t at = static_cast<size_t>(thread_id()) * 128; at < bytes; at += static_cast<size_t>(block_threads()) * 128)
    prefetch_line(static_cast<const uint8_t*>(from) + at);
}

// The factors of this block's slice and columns, except those of experts, and what belongs to its columns.
QE_DEV void prefetch_factors(const ClusterArgs& p, const ClusterBlock& b) {
  const int blocks = (p.K + 31) / 32, from = b.first * 4, mine = b.end_of_32(p) - from;
  const size_t down_bytes = static_cast<size_t>(p.factor_bits) * 64;  // of 32 rows
  for (int tile = 0; tile < p.shared_tiles; ++tile)
    prefetch_bytes(static_cast<const uint8_t*>(p.down) + (static_cast<size_t>(tile) * blocks + from) * down_bytes, mine * down_bytes);
  const int of_step = p.factor_bits / 2, lines = of_step * p.shared_tiles;  // of `up`, in one set of columns
  for (int o = thread_id(); o < b.owned * lines; o += block_threads()) {
    const int slot = o / lines, line = o - slot * lines, step = line / of_step, of = line - step * of_step;
    const size_t pair = static_cast<size_t>(step) * (p.Np / 16) + b.owned_columns(p, slot) * 2;
    prefetch_line(static_cast<const uint8_t*>(p.up) + pair * p.factor_bits * 32 + of * 128);
  }
  if (p.E)
    for (int e = 0; e < p.E; ++e)
      prefetch_bytes(static_cast<const uint8_t*>(p.router) + (static_cast<size_t>(e) * p.K + b.first * kChunk) * 2,
                     static_cast<size_t>(p.K - b.first * kChunk < b.own * kChunk ? p.K - b.first * kChunk : b.own * kChunk) * 2);
}

// The tokens' maxima, of this warp: of all of x where that is short, or of this block's slice, which all blocks are told.
template <class T>
QE_DEV void find_maxima(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int k0 = p.own_maxima ? 0 : b.first * kChunk, end = p.own_maxima ? p.chunks * kChunk : b.own * kChunk;
  const T* omega = p.inv_omega ? static_cast<const T*>(p.inv_omega) + k0 : nullptr;
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m) {
    const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + k0;
    float largest = 0.f, raw[8], scaled[8];
    QE_UNROLL_BY(1)
    for (int k = thread_id() * 8; k < end; k += block_threads() * 8) {
      load_scaled<T>(omega, p.K - k0, row, k, raw, scaled);
      QE_UNROLL
      for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(scaled[i]));
    }
    QE_UNROLL
    for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
    if (!p.own_maxima) {
      if (lane < p.cluster_blocks) send(s.largest + (b.rank * warps + warp) * p.M + m, s.largest_box, lane, largest);
    } else if (lane == 0) {
      s.largest[warp * p.M + m] = largest;
    }
  }
}

// Parts of the tokens' scores, of this warp and slice. `sums` is [M][columns].
template <class T>
QE_DEV void score_slice(const ClusterArgs& p, const ClusterBlock& b, int columns, float* sums) {
  const int lane = thread_id() & 31, k0 = b.first * kChunk, left = p.K - k0, end = left < b.own * kChunk ? left : b.own * kChunk;
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m) {
    const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + k0;
    float score[kMaxExperts], own = 0.f, raw[8];
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) score[e] = 0.f;
    QE_UNROLL_BY(1)
    for (int k = thread_id() * 8; k < end; k += block_threads() * 8) {
      const u32x4 x = load16(row + k);
      QE_UNROLL
      for (int i = 0; i < 8; ++i) raw[i] = half_of<T>(x, i);
      add_scores<T>(static_cast<const T*>(p.router) + k0, p.E, p.K, k, raw, score);
    }
    QE_UNROLL
    for (int e = 0; e < kMaxExperts; ++e) {
      if (e >= p.E) continue;
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) score[e] += shuffle_xor(score[e], step);
      own = lane == e ? score[e] : own;
    }
    if (lane < kMaxExperts) sums[m * columns + lane] = own;
  }
}

constexpr int kDownAtOnce = 4;  // tiles of 16 columns
template <int Bits>
QE_DEV void load_down_tiles(const ClusterArgs& p, int tile0, int tiles, int block, DownWords<Bits> (&words)[kDownAtOnce]) {
  QE_UNROLL
  for (int c = 0; c < kDownAtOnce; ++c)
    load_down<Bits>(p.down, static_cast<size_t>(tile0 + (c < tiles ? c : 0)) * ((p.K + 31) / 32) + block, thread_id() & 31, words[c]);
}

// The first words are loaded before they can be used where that takes few registers.
template <int Bits>
constexpr bool kDownEarly = Bits == 4;
template <int Bits>
QE_DEV void load_early(const ClusterArgs& p, const ClusterBlock& b, int tile0, int tiles, DownWords<Bits> (&words)[kDownAtOnce]) {
  const int from = b.first * 4 + (thread_id() >> 5);
  if (kDownEarly<Bits> && from < b.end_of_32(p)) load_down_tiles<Bits>(p, tile0, tiles, from, words);
}

// Parts of x @ down of this warp and slice, in `tiles` of 16 columns from `tile0` on: of all tokens, or of one. `words` has
// the early ones. `sums` is [M][columns].
template <class T, int Bits>
QE_DEV void multiply_slice(const ClusterArgs& p, const ClusterBlock& b, int tile0, int tiles, int only, int columns,
                           DownWords<Bits> (&words)[kDownAtOnce], float* sums) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int from = b.first * 4 + warp, end = b.end_of_32(p);
  const int token = (lane >> 2) < p.M ? lane >> 2 : p.M - 1;  // the copy's result is not stored
  const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(token) * p.K;
  QE_UNROLL_BY(1)
  for (int t0 = 0; t0 < tiles; t0 += kDownAtOnce) {
    float acc[kDownAtOnce][1][4];
    QE_UNROLL
    for (int c = 0; c < kDownAtOnce; ++c)
      QE_UNROLL
      for (int i = 0; i < 4; ++i) acc[c][0][i] = 0.f;
    QE_UNROLL_BY(1)
    for (int block = from; block < end; block += warps) {
      DownWords<Bits> now[kDownAtOnce];
      if (kDownEarly<Bits> && t0 == 0 && block == from) {
        QE_UNROLL
        for (int c = 0; c < kDownAtOnce; ++c) now[c] = words[c];
      } else {
        load_down_tiles<Bits>(p, tile0 + t0, tiles - t0, block, now);
      }
      const int k = block * 32 + (lane & 3) * 8;
      u32x4 x[1] = {};
      if (k < p.K) x[0] = load16(row + k);
      QE_UNROLL
      for (int c = 0; c < kDownAtOnce; ++c) multiply_down<T, Bits>(now[c], x, acc[c]);
    }
    QE_UNROLL
    for (int c = 0; c < kDownAtOnce; ++c)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int m = (lane & 3) * 2 + (j & 1), column = (t0 + c) * 16 + (lane >> 2) + 8 * (j >> 1);
        if (t0 + c < tiles && m < p.M && (only < 0 || m == only)) sums[m * columns + column] = acc[c][0][j];
      }
  }
}
template <class T, int Bits>
QE_DEV void multiply_slice(const ClusterArgs& p, const ClusterBlock& b, int tile0, int tiles, int only, int columns, float* sums) {
  DownWords<Bits> words[kDownAtOnce];
  load_early<Bits>(p, b, tile0, tiles, words);
  multiply_slice<T, Bits>(p, b, tile0, tiles, only, columns, words, sums);
}
template <class T>
QE_DEV void multiply_slice(const ClusterArgs& p, const ClusterBlock& b, int tile0, int tiles, int only, int columns, float* sums) {
  if (p.factor_bits == 4) return multiply_slice<T, 4>(p, b, tile0, tiles, only, columns, sums);
  if (p.factor_bits == 8) return multiply_slice<T, 8>(p, b, tile0, tiles, only, columns, sums);
  multiply_slice<T, 16>(p, b, tile0, tiles, only, columns, sums);
}

// Maxima and parts of the shared h. Early words of `down` are on their way before the launch in front ends.
template <class T, int Bits>
QE_DEV void begin_slice(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int columns) {
  const int warp = thread_id() >> 5;
  DownWords<Bits> words[kDownAtOnce];
  load_early<Bits>(p, b, 0, p.shared_tiles, words);
  wait_for_previous();
  find_maxima<T>(p, b, s);
  multiply_slice<T, Bits>(p, b, 0, p.shared_tiles, -1, columns, words, s.sums + warp * p.M * columns);
}

// Adds up what the warps found of M rows of `columns` and tells all blocks. The first `scaled` are of h, the rest are scores.
template <class ScalesOf>
QE_DEV void tell_sums(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int columns, int scaled,
                      const ScalesOf& scales_of, float* part, uint64_t* box) {
  const float* sums = s.sums;
  const int warps = block_threads() >> 5, all = p.M * columns;
  QE_UNROLL_BY(1)
  for (int o = thread_id() * 4; o < all; o += block_threads() * 4) {
    const int m = o / columns, column = o - m * columns;
    float v[4] = {0.f, 0.f, 0.f, 0.f};
    QE_UNROLL_BY(2)
    for (int w = 0; w < warps; ++w) {
      const u32x4 four = load16(sums + w * all + o);
      QE_UNROLL
      for (int i = 0; i < 4; ++i) v[i] += int_bits_to_float(static_cast<int>(four.v[i]));
    }
    if (column < scaled)
      QE_UNROLL
      for (int i = 0; i < 4; ++i) v[i] *= s.scales[scales_of(m) + column + i];
    QE_UNROLL_BY(1)
    for (int r = 0; r < p.cluster_blocks; ++r) send(part + b.rank * all + o, box, r, v);
  }
}

// What all blocks told about one value, in their order.
QE_DEV float sum_of_parts(const ClusterArgs& p, const float* part, int step) {
  float v = 0.f;
  for (int r = 0; r < p.cluster_blocks; ++r) v += part[r * step];
  return v;
}

// The experts that the tokens chose: parts of their h for all blocks. Every block knows the scores.
template <class T>
QE_DEV void routed_slice(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int columns) {
  const int shared = 16 * p.shared_tiles, routed = 16 * p.routed_tiles, warp = thread_id() >> 5;
  for (int o = thread_id(); o < p.M * kMaxExperts; o += block_threads()) {
    const int m = o / kMaxExperts, e = o - m * kMaxExperts;
    if (e < p.E) s.scores[o] = sum_of_parts(p, s.part + m * columns + shared + e, p.M * columns);
  }
  block_sync();
  if (thread_id() < p.M) s.expert[thread_id()] = choose_expert(s.scores + thread_id() * kMaxExperts, p.E);
  block_sync();
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m)
    multiply_slice<T>(p, b, p.shared_tiles + s.expert[m] * p.routed_tiles, p.routed_tiles, m, routed, s.sums + warp * p.M * routed);
  block_sync();
  const auto scales_of = [&](int m) { return shared + s.expert[m] * routed; };
  tell_sums(p, b, s, routed, routed, scales_of, s.routed_part, s.routed_box);
}

// One step of 16 ranks: h of one expert times `up`, for 32 columns.
template <class T>
QE_DEV void multiply_up(const ClusterArgs& p, const UpWords (&words)[kDecodeTiles], const uint16_t* h, bool present, float (&out)[kDecodeTiles][4]) {
  const int pair = (thread_id() & 3) * 2;
  const uint32_t b0 = present ? load4(h + pair) : 0u, b1 = present ? load4(h + pair + 8) : 0u;
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i) {
    uint32_t u[4];
    up_fragments<T>(words[i], p.factor_bits, u);
    const uint32_t a[4] = {u[0], u[2], u[1], u[3]};
    mma_16<T>(out[i], a, b0, b1);
  }
}
QE_DEV void load_up_set(const ClusterArgs& p, int step, int columns, UpWords (&words)[kDecodeTiles]) {
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i)
    load_up(p.up, p.factor_bits, static_cast<size_t>(step) * (p.Np / 16) + columns * 2 + i, thread_id() & 31, words[i]);
}

// h @ up of the sets that this block owns, a warp a set. `ahead` has the first words of the first one.
constexpr int kUpAhead = 4;
template <class T>
QE_DEV void correct(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s,
                    const UpWords (&ahead)[kUpAhead][kDecodeTiles]) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int rank = 16 * (p.shared_tiles + p.routed_tiles), token = (lane >> 2) < p.M ? lane >> 2 : p.M - 1;
  const uint16_t* h = s.h + token * rank;
  for (int slot = warp; slot < b.owned; slot += warps) {
    const int columns = b.owned_columns(p, slot);
    float out[kDecodeTiles][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) out[i][j] = 0.f;
    QE_UNROLL
    for (int step = 0; step < kUpAhead; ++step) {
      if (step >= p.shared_tiles) continue;
      if (slot == warp) {
        multiply_up<T>(p, ahead[step], h + step * 16, true, out);
      } else {
        UpWords words[kDecodeTiles];
        load_up_set(p, step, columns, words);
        multiply_up<T>(p, words, h + step * 16, true, out);
      }
    }
    for (int step = kUpAhead; step < p.shared_tiles; ++step) {
      UpWords words[kDecodeTiles];
      load_up_set(p, step, columns, words);
      multiply_up<T>(p, words, h + step * 16, true, out);
    }
    QE_UNROLL_BY(1)
    for (int m = 0; m < (p.E ? p.M : 0); ++m)
      for (int step = 0; step < p.routed_tiles; ++step) {
        UpWords words[kDecodeTiles];
        load_up_set(p, p.shared_tiles + s.expert[m] * p.routed_tiles + step, columns, words);
        multiply_up<T>(p, words, h + (p.shared_tiles + step) * 16, (lane >> 2) == m, out);
      }
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int m = (lane & 3) * 2 + (j & 1);
        if (m < p.M) s.low[(slot * p.M + m) * kDecodeColumns + i * 16 + (lane >> 2) + 8 * (j >> 1)] = out[i][j];
      }
  }
}

// Quantizes this block's slice; every warp knows all maxima.
template <class T, int Mode, int Groups, bool Zeros>
QE_DEV void quantize_cluster(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, unsigned char* shared) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, k0 = b.first * kChunk;
  const Rows rows{p.inv_omega ? static_cast<const T*>(p.inv_omega) + k0 : nullptr, shared,
                  Zeros && Groups != 0 ? reinterpret_cast<uint32_t*>(shared + p.group_sums_at) : nullptr, p.K - k0,
                  b.own * kChunk, p.M, p.M, Mode == kInt8 ? p.act_max : 0, Groups == 0 ? 0 : kChunk / Groups, p.code_shifts};
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m) {
    float largest = 0.f;
    QE_UNROLL_BY(1)
    for (int i = lane; i < (p.own_maxima ? 1 : p.cluster_blocks) * warps; i += 32) largest = max_f(largest, s.largest[i * p.M + m]);
    QE_UNROLL
    for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
    const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + k0;
    float total = 0.f;
    QE_UNROLL_BY(1)
    for (int k = thread_id() * 8; k - lane * 8 < rows.Kp; k += block_threads() * 8) total += quantize_rows<T>(rows, row, m, k, largest);
    if constexpr (Zeros && Groups == 0) {
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) total += shuffle_xor(total, step);
      if (lane < p.cluster_blocks) send(s.slice_sum + (b.rank * warps + warp) * p.M + m, s.result_box, lane, total);
    }
    if (thread_id() == block_threads() - 1) s.unit[m] = stored_unit(Mode == kInt8 ? p.act_max : 0, largest);
  }
}

// Where a column of 32 lies in the results: a lane has four of them, eight apart.
QE_DEV int place_of(int column) { return (column & 7) * 4 + (column >> 3); }

// Scale, output scale, bias and zero point of one column.
struct ColumnScales {
  float scale, out, bias;
  int zero;
};
template <bool WholeColumn>
QE_DEV ColumnScales load_columns(const ClusterArgs& p, int columns) {
  const int lane = thread_id() & 31, n = columns * kDecodeColumns + lane;
  ColumnScales c{p.columns[n], p.columns[p.Np + n], p.columns[2 * p.Np + n], 0};
  if (WholeColumn) c.zero = zero_of<0>(load4(p.zeros + columns * kDecodeColumns + (lane & 7) * 4) >> (8 * (lane >> 3)));
  return c;
}

template <class T, int Bits, int Mode, int Groups, bool Zeros>
QE_DEV void main_cluster(const ClusterArgs& p) {
  constexpr bool kWholeColumn = Zeros && Groups == 0;
  constexpr float kUnit = Mode == kInt8 && Groups == 2 && Zeros ? kSmallUnit : 1.f;
  QE_DYNAMIC_SHARED(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const ClusterBlock b(p);
  const ClusterShared s(p, shared);
  const bool corrects = p.shared_tiles + p.routed_tiles > 0;
  const int shared_rank = 16 * p.shared_tiles, routed = 16 * p.routed_tiles, columns = shared_rank + (p.E ? kMaxExperts : 0);
  if (thread_id() == 0) {
    const int of_token = p.cluster_blocks * p.M * 4;  // bytes, of one float from each block
    open_box(s.largest_box, p.own_maxima ? 0 : warps * of_token);
    open_box(s.part_box, columns * of_token);
    open_box(s.routed_box, (p.E ? routed : 0) * of_token);
    open_box(s.result_box, (b.owned * p.parts * kDecodeColumns + (kWholeColumn ? warps : 0)) * of_token);
    boxes_are_open();
  }
  cluster_arrive();
  Feed<Bits> feed;
  feed.ring.slots = shared + p.ring_at + warp * (kRing * kBlockBytes<Bits>) + lane * 16;
  feed.ring.left = 0, feed.next = warp;
  QE_UNROLL_BY(1)
  for (int i = 0; i < kRing; ++i) feed.push(p, b, feed.ring.slots + i * kBlockBytes<Bits>);
  ColumnScales first{};
  if (warp < b.owned * p.M) first = load_columns<kWholeColumn>(p, b.owned_columns(p, p.M == 1 ? warp : warp / p.M));
  if (corrects) {
    QE_UNROLL_BY(1)
    for (int c = thread_id(); c < shared_rank + p.E * routed; c += block_threads()) s.scales[c] = p.down_scale[c];
    prefetch_factors(p, b);
  }
  cluster_wait();  // all blocks have begun
  if (p.shared_tiles == 0) {
    wait_for_previous();
    find_maxima<T>(p, b, s);
  } else if (p.factor_bits == 4) {
    begin_slice<T, 4>(p, b, s, columns);
  } else if (p.factor_bits == 8) {
    begin_slice<T, 8>(p, b, s, columns);
  } else {
    begin_slice<T, 16>(p, b, s, columns);
  }
  if (p.E) score_slice<T>(p, b, columns, s.sums + warp * p.M * columns + shared_rank);
  if (p.own_maxima) {
    block_sync();
  } else {
    wait_for_box(s.largest_box);
  }
  quantize_cluster<T, Mode, Groups, Zeros>(p, b, s, shared);
  block_sync();  // the activations and what the warps found are there
  if (corrects) {
    const auto scales_of = [](int) { return 0; };
    tell_sums(p, b, s, columns, shared_rank, scales_of, s.part, s.part_box);
  }
  if (p.E) {
    wait_for_box(s.part_box);
    block_sync();  // nobody reads the sums any more
    routed_slice<T>(p, b, s, columns);
  }

  const int tasks = b.sets * p.parts;
  unsigned char* slot = feed.ring.slots;
  for (int task = warp; task < tasks; task += warps) {
    const int set = (task * p.parts_factor) >> 16, part = task - set * p.parts, start = part * p.part_chunks;
    const int end = start + p.part_chunks < b.own ? start + p.part_chunks : b.own;
    typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kDecodeTiles][1][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][0][j] = 0;
    Cursor<Bits, Mode, Groups, 1> at(p, b.columns_of(set), b.first + start, b.first, shared, shared + p.group_sums_at, p.M);
    QE_UNROLL_BY(1)
    for (int chunk = start; chunk < end; ++chunk) {
      cp_async_wait<kRing - 1>();
      BlockWords<Bits> w;
      QE_UNROLL
      for (int i = 0; i < Bits; ++i) w[i] = load16(slot + i * kPieceBytes);
      if constexpr (Mode == kInt8 && Groups == 2) {
        decode_two_groups_s8<Bits, Zeros, 1>(at, w, acc);
      } else if constexpr (Mode == kInt8) {
        decode_chunk_s8<Bits, Groups, Zeros, 1>(at, w, acc);
      } else {
        decode_chunk_16<Bits, Groups, 1>(at, w, acc);
      }
      feed.push(p, b, slot);
      slot = slot == feed.ring.slots + (kRing - 1) * kBlockBytes<Bits> ? feed.ring.slots : slot + kBlockBytes<Bits>;
      at.next();
    }
    const int owner = set & (p.cluster_blocks - 1), place = ((set >> p.cluster_shift) * p.cluster_blocks + b.rank) * p.parts + part;
    QE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int m = (lane & 3) * 2 + j;
      const float v[4] = {static_cast<float>(acc[0][0][j]), static_cast<float>(acc[0][0][j + 2]), static_cast<float>(acc[1][0][j]),
                          static_cast<float>(acc[1][0][j + 2])};
      if (m < p.M) send(s.results + (place * p.M + m) * kDecodeColumns + (lane >> 2) * 4, s.result_box, owner, v);
    }
  }

  if (corrects) {
    UpWords ahead[kUpAhead][kDecodeTiles];
    QE_UNROLL
    for (int step = 0; step < kUpAhead; ++step)
      if (step < p.shared_tiles && warp < b.owned) load_up_set(p, step, b.owned_columns(p, warp), ahead[step]);
    wait_for_box(s.part_box);
    wait_for_box(s.routed_box);
    const int rank = shared_rank + routed;
    QE_UNROLL_BY(1)
    for (int o = thread_id(); o < p.M * rank; o += block_threads()) {
      const int m = o / rank, r = o - m * rank;
      const float v = r < shared_rank ? sum_of_parts(p, s.part + m * columns + r, p.M * columns)
                                      : sum_of_parts(p, s.routed_part + m * routed + r - shared_rank, p.M * routed);
      store2(s.h + o, from_float<T>(v).bits);
    }
    block_sync();
    correct<T>(p, b, s, ahead);
    block_sync();
  }
  wait_for_box(s.result_box);

  const int sources = p.cluster_blocks * p.parts;
  QE_UNROLL_BY(1)
  for (int pair = warp; pair < b.owned * p.M; pair += warps) {
    const int own = p.M == 1 ? pair : pair / p.M, m = pair - own * p.M, block = b.owned_columns(p, own);
    const int n = block * kDecodeColumns + lane;
    const ColumnScales c = pair == warp ? first : load_columns<kWholeColumn>(p, block);
    const float* from = s.results + (own * sources * p.M + m) * kDecodeColumns + place_of(lane);
    float v = 0.f;
    QE_UNROLL_BY(4)
    for (int i = 0; i < sources; ++i) v += from[i * p.M * kDecodeColumns];
    if constexpr (kWholeColumn) {
      float sum = 0.f;
      for (int i = 0; i < p.cluster_blocks * warps; ++i) sum += s.slice_sum[i * p.M + m];
      v = without_zero<Mode, true>(v, c.zero, sum);
    }
    v *= c.scale * s.unit[m] * kUnit;
    if (corrects) v += s.low[pair * kDecodeColumns + lane];
    if (n < p.N) store2(static_cast<T*>(p.y) + static_cast<size_t>(m) * p.N + n, from_float<T>(v * c.out + c.bias).bits);
  }
}

}  // namespace qe
