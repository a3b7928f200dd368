// The warps of a cluster's block that have the correction: parts of x @ down, the experts, h, and h @ up; see main_cluster.cuh.
#pragma once
#include "cluster_block.cuh"
#include "decode_chunk.cuh"
#include "lowrank_down.cuh"

namespace qe {

// Lines of memory, from all threads of the correction.
QE_DEV void prefetch_bytes(const void* from, size_t bytes, int thread) {
  QE_UNROLL_BY(1)
  for (size_t at = static_cast<size_t>(thread) * 128; at < bytes; at += kCorrectWarps * 32 * 128)
    prefetch_line(static_cast<const uint8_t*>(from) + at);
}

// Steps of 16 ranks of `up` in the columns that this block owns.
QE_DEV void prefetch_up(const ClusterArgs& p, const ClusterBlock& b, int first, int steps, int thread) {
  const int lines = p.factor_bits / 2;  // of a step, in one set of columns
  QE_UNROLL_BY(1)
  for (int slot = 0; slot < b.owned; ++slot)
    QE_UNROLL_BY(1)
    for (int o = thread; o < steps * lines; o += kCorrectWarps * 32) {
      const int step = o / lines;
      const size_t pair = static_cast<size_t>(first + step) * (p.Np / 16) + b.owned_columns(p, slot) * 2;
      prefetch_line(static_cast<const uint8_t*>(p.up) + pair * p.factor_bits * 32 + (o - step * lines) * 128);
    }
}

// Sixteen bytes at a time to shared memory, by all threads of the correction.
QE_DEV void copy_bytes(void* to, const void* from, int bytes, int thread) {
  QE_UNROLL_BY(1)
  for (int at = thread * 16; at < bytes; at += kCorrectWarps * 32 * 16)
    cp_async16(static_cast<uint8_t*>(to) + at, static_cast<const uint8_t*>(from) + at);
}

// The factors of this block's slice and columns, except those of experts, and the router: integer factors of the slice, where they
// fit, and the router to shared memory, the rest on its way from memory.
QE_DEV void fetch_factors(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int thread) {
  const int blocks = (p.K + 31) / 32, from = b.first * 4, mine = b.end_of_32(p) - from, down_bytes = p.factor_bits * 64;  // of 32 rows
  QE_UNROLL_BY(1)
  for (int tile = 0; tile < p.shared_tiles; ++tile) {
    const uint8_t* down = static_cast<const uint8_t*>(p.down) + (static_cast<size_t>(tile) * blocks + from) * down_bytes;
    if (p.copies_down) {
      copy_bytes(s.down + tile * p.slice_chunks * 4 * down_bytes, down, mine * down_bytes, thread);
    } else {
      prefetch_bytes(down, static_cast<size_t>(mine) * down_bytes, thread);
    }
  }
  prefetch_up(p, b, 0, p.shared_tiles, thread);
  const int k0 = b.first * kChunk, rows = p.K - k0 < b.own * kChunk ? p.K - k0 : b.own * kChunk;
  QE_UNROLL_BY(1)
  for (int e = 0; e < p.E; ++e)
    copy_bytes(s.router + e * p.row_bytes, static_cast<const uint8_t*>(p.router) + (static_cast<size_t>(e) * p.K + k0) * 2, rows * 2, thread);
}

// This block's slice of x in shared memory, with zeros up to a whole block of 32 rows.
QE_DEV void fetch_x(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int thread) {
  const int k0 = b.first * kChunk, left = p.K - k0, rows = left < b.own * kChunk ? left : b.own * kChunk;
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m) {
    uint8_t* row = s.x + m * p.row_bytes;
    copy_bytes(row, static_cast<const uint8_t*>(p.x) + (static_cast<size_t>(m) * p.K + k0) * 2, rows * 2, thread);
    if (rows * 2 + thread * 16 < (b.end_of_32(p) - b.first * 4) * 64) store16(row + rows * 2 + thread * 16, u32x4{});
  }
  cp_async_commit();
  cp_async_wait<0>();
  group_sync(kCorrectGroup, kCorrectWarps * 32);
}

// Where a column of 16 of `down` lies in a part of h.
QE_DEV int down_place(int column) { return (column & ~15) + (column & 7) * 2 + (column >> 3 & 1); }

QE_DEV int first_tile(int warp, int tiles) {  // that a warp multiplies
  while (warp >= tiles) warp -= tiles;
  return warp;
}
QE_DEV void load_down_scales(const ClusterArgs& p, int tile, float (&scales)[2]) {  // of a lane's columns
  const float* from = p.down_scale + tile * 16 + ((thread_id() & 31) >> 2);
  scales[0] = from[0], scales[1] = from[8];
}
// Words of `down` in shared memory, of block `block` of the slice.
template <int Bits>
QE_DEV void load_own_down(const ClusterArgs& p, const ClusterShared& s, int tile, int block, DownWords<Bits>& words) {
  const uint8_t* at = s.down + (tile * p.slice_chunks * 4 + block) * DownWords<Bits>::kBytes;
  const int lane = thread_id() & 31;
  if constexpr (Bits == 4) {
    const u32x2 w = load8(at + lane * 8);
    words.v[0] = w.v[0], words.v[1] = w.v[1];
  } else {
    const u32x4 w = load16(at + lane * 16);
    QE_UNROLL
    for (int i = 0; i < Bits / 2; ++i) words.v[i] = w.v[i & 3];
  }
}

// Parts of x @ down of this slice in `tiles` of 16 columns from `tile0` on, each cut into `parts` of K for different warps, of
// all tokens or of one: all blocks are told. `scales` has those of the first task. Shared integer factors are in shared memory.
constexpr int kDownBlocks = 4;  // of 32 rows, at once
template <class T, int Bits, bool Own>
QE_DEV void multiply_down_slice(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int warp, int tile0, int tiles,
                                int parts, int only, float (&scales)[2], float* part, uint64_t* box) {
  const int lane = thread_id() & 31, from = b.first * 4, count = b.end_of_32(p) - from, blocks = (p.K + 31) / 32;
  const uint8_t* row = s.x + ((lane >> 2) < p.M ? lane >> 2 : p.M - 1) * p.row_bytes + (lane & 3) * 16;  // a copy's result is not sent
  QE_UNROLL_BY(1)
  for (int task = warp; task < tiles * parts; task += kCorrectWarps) {
    int tile = task, of_k = 0;
    while (tile >= tiles) tile -= tiles, ++of_k;
    if (task != warp) load_down_scales(p, tile0 + tile, scales);
    float acc[kDownBlocks][1][4];
    QE_UNROLL
    for (int i = 0; i < kDownBlocks; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][0][j] = 0.f;
    const auto load = [&](int block, DownWords<Bits>& words) {
      if constexpr (Own) {
        load_own_down<Bits>(p, s, tile, block, words);
      } else {
        load_down<Bits>(p.down, static_cast<size_t>(tile0 + tile) * blocks + from + block, lane, words);
      }
    };
    int block = of_k;
    QE_UNROLL_BY(1)
    for (; block + (kDownBlocks - 1) * parts < count; block += parts * kDownBlocks) {  // no branch inside
      DownWords<Bits> words[kDownBlocks];
      u32x4 x[kDownBlocks][1];
      QE_UNROLL
      for (int i = 0; i < kDownBlocks; ++i) load(block + i * parts, words[i]);
      QE_UNROLL
      for (int i = 0; i < kDownBlocks; ++i) x[i][0] = load16(row + (block + i * parts) * 64);
      QE_UNROLL
      for (int i = 0; i < kDownBlocks; ++i) multiply_down<T, Bits>(words[i], x[i], acc[i]);
    }
    QE_UNROLL_BY(1)
    for (; block < count; block += parts) {
      DownWords<Bits> words;
      load(block, words);
      const u32x4 x[1] = {load16(row + block * 64)};
      multiply_down<T, Bits>(words, x, acc[0]);
    }
    float sum[4];
    QE_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] = (acc[0][0][j] + acc[1][0][j]) + (acc[2][0][j] + acc[3][0][j]);
    // Four lanes have the tokens of one column. All of them get a token's sums, and each tells other blocks.
    QE_UNROLL
    for (int m = 0; m < kClusterTokens; ++m) {
      if (m >= p.M || (only >= 0 && m != only)) continue;
      float v[2];
      QE_UNROLL
      for (int half = 0; half < 2; ++half) {
        v[half] = (lane & 3) == m / 2 ? sum[2 * half + m % 2] * scales[half] : 0.f;
        v[half] += shuffle_xor(v[half], 1);
        v[half] += shuffle_xor(v[half], 2);
      }
      float* to = part + ((b.rank * parts + of_k) * p.M + m) * 16 * tiles + tile * 16 + (lane >> 2) * 2;
      for (int r = lane & 3; r < p.cluster_blocks; r += 4) {
        send(to, box, r, v[0]);
        send(to + 1, box, r, v[1]);
      }
    }
  }
}

// Parts of the tokens' scores, of as many warps as there are pieces: all blocks are told. Four experts at once; what becomes of
// those that are not there nobody reads.
template <class T>
QE_DEV void score_slice(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int warp) {
  if (warp >= p.score_warps) return;
  const int lane = thread_id() & 31, left = p.K - b.first * kChunk, end = left < b.own * kChunk ? left : b.own * kChunk;
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m)
    QE_UNROLL_BY(1)
    for (int e0 = 0; e0 < p.E; e0 += 4) {
      float score[4] = {0.f, 0.f, 0.f, 0.f}, own = 0.f;  // own: of one of them, for one block
      QE_UNROLL_BY(1)
      for (int k = warp * kPiece + lane * 8; k < end; k += p.score_warps * kPiece) {
        const u32x4 x = load16(s.x + m * p.row_bytes + 2 * k);
        QE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const u32x4 weight = load16(s.router + (e0 + e < p.E ? e0 + e : e0) * p.row_bytes + 2 * k);
          QE_UNROLL
          for (int i = 0; i < 8; ++i) score[e] += abs_f(half_of<T>(x, i)) * half_of<T>(weight, i);
        }
      }
      QE_UNROLL
      for (int e = 0; e < 4; ++e) {
        QE_UNROLL
        for (int step = 16; step > 0; step >>= 1) score[e] += shuffle_xor(score[e], step);
        own = (lane & 3) == e ? score[e] : own;
      }
      float* to = s.score_part + ((b.rank * p.score_warps + warp) * p.M + m) * kMaxExperts + e0 + (lane & 3);
      if ((lane >> 2) < p.cluster_blocks) send(to, s.part_box, lane >> 2, own);
    }
}

// What all blocks sent about one value, in their order.
QE_DEV float sum_of_parts(const float* part, int count, int step) {
  float v = 0.f;
  QE_UNROLL_BY(4)
  for (int i = 0; i < count; ++i) v += part[i * step];
  return v;
}

// The experts that the tokens chose. Every block knows the scores.
QE_DEV void choose_experts(const ClusterArgs& p, const ClusterShared& s, int thread) {
  QE_UNROLL_BY(1)
  for (int o = thread; o < p.M * kMaxExperts; o += kCorrectWarps * 32)
    if (o % kMaxExperts < p.E) s.scores[o] = sum_of_parts(s.score_part + o, p.score_warps << p.cluster_shift, p.M * kMaxExperts);
  group_sync(kCorrectGroup, kCorrectWarps * 32);
  if (thread < p.M) s.expert[thread] = choose_expert(s.scores + thread * kMaxExperts, p.E);
  group_sync(kCorrectGroup, kCorrectWarps * 32);
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

// Some steps of the shared expert; those beyond its last one are the last one.
constexpr int kUpAhead = 4;
QE_DEV void load_up_steps(const ClusterArgs& p, int step0, int columns, UpWords (&words)[kUpAhead][kDecodeTiles]) {
  QE_UNROLL
  for (int i = 0; i < kUpAhead; ++i) load_up_set(p, step0 + i < p.shared_tiles ? step0 + i : p.shared_tiles - 1, columns, words[i]);
}

// h @ up of the sets that this block owns, a warp a set. `ahead` has the first words of the first one.
template <class T>
QE_DEV void multiply_up_sets(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int warp,
                             UpWords (&ahead)[kUpAhead][kDecodeTiles]) {
  const int lane = thread_id() & 31, rank = 16 * (p.shared_tiles + p.routed_tiles), token = (lane >> 2) < p.M ? lane >> 2 : p.M - 1;
  const uint16_t* h = s.h + token * rank;
  QE_UNROLL_BY(1)
  for (int slot = warp; slot < b.owned; slot += kCorrectWarps) {
    const int columns = b.owned_columns(p, slot);
    float out[kDecodeTiles][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) out[i][j] = 0.f;
    QE_UNROLL_BY(1)
    for (int step0 = 0; step0 < p.shared_tiles; step0 += kUpAhead) {
      if (slot != warp || step0 > 0) load_up_steps(p, step0, columns, ahead);
      QE_UNROLL
      for (int i = 0; i < kUpAhead; ++i) {
        const bool present = step0 + i < p.shared_tiles;
        multiply_up<T>(p, ahead[i], h + (present ? step0 + i : 0) * 16, present, out);
      }
    }
    QE_UNROLL_BY(1)
    for (int m = 0; m < (p.E ? p.M : 0); ++m)
      QE_UNROLL_BY(2)
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

// The same by the bits of the factors and where they are.
template <class T>
QE_DEV void multiply_any_down(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, int warp, int tile0, int tiles,
                              int parts, int only, float (&scales)[2], float* part, uint64_t* box) {
  const bool own = only < 0 && p.copies_down;
  if (own && p.factor_bits == 4) {
    multiply_down_slice<T, 4, true>(p, b, s, warp, tile0, tiles, parts, only, scales, part, box);
  } else if (own) {
    multiply_down_slice<T, 8, true>(p, b, s, warp, tile0, tiles, parts, only, scales, part, box);
  } else if (p.factor_bits == 4) {
    multiply_down_slice<T, 4, false>(p, b, s, warp, tile0, tiles, parts, only, scales, part, box);
  } else if (p.factor_bits == 8) {
    multiply_down_slice<T, 8, false>(p, b, s, warp, tile0, tiles, parts, only, scales, part, box);
  } else {
    multiply_down_slice<T, 16, false>(p, b, s, warp, tile0, tiles, parts, only, scales, part, box);
  }
}

// The warps of the correction.
template <class T>
QE_DEV void correct(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s) {
  const int warp = (thread_id() >> 5) - p.main_warps, thread = thread_id() - p.main_warps * 32;
  const int shared = 16 * p.shared_tiles, routed = 16 * p.routed_tiles, rank = shared + routed;
  float scales[2] = {0.f, 0.f};
  if (p.shared_tiles) load_down_scales(p, first_tile(warp, p.shared_tiles), scales);
  wait_for_previous();
  fetch_x(p, b, s, thread);
  QE_UNROLL_BY(1)
  for (int m = -1; m < (p.E ? p.M : 0); ++m) {  // the shared expert, then each token's
    if (m == 0) {
      score_slice<T>(p, b, s, warp);
      wait_for_box(s.part_box);
      choose_experts(p, s, thread);
    }
    const bool routes = m >= 0;
    const int tiles = routes ? p.routed_tiles : p.shared_tiles, tile0 = routes ? p.shared_tiles + s.expert[m] * tiles : 0;
    if (routes) {
      prefetch_up(p, b, tile0, tiles, thread);
      load_down_scales(p, tile0 + first_tile(warp, tiles), scales);
    }
    multiply_any_down<T>(p, b, s, warp, tile0, tiles, routes ? p.routed_parts : p.tile_parts, m, scales,
                         routes ? s.routed_part : s.part, routes ? s.routed_box : s.part_box);
  }
  UpWords ahead[kUpAhead][kDecodeTiles];
  if (p.shared_tiles && warp < b.owned) load_up_steps(p, 0, b.owned_columns(p, warp), ahead);
  wait_for_box(s.part_box);
  wait_for_box(s.routed_box);
  QE_UNROLL_BY(1)
  for (int o = thread; o < p.M * rank; o += kCorrectWarps * 32) {
    const int m = p.M == 1 ? 0 : o / rank, r = o - m * rank;
    const float v = r < shared ? sum_of_parts(s.part + m * shared + down_place(r), p.cluster_blocks * p.tile_parts, p.M * shared)
                               : sum_of_parts(s.routed_part + m * routed + down_place(r - shared), p.cluster_blocks * p.routed_parts, p.M * routed);
    store2(s.h + o, from_float<T>(v).bits);
  }
  group_sync(kCorrectGroup, kCorrectWarps * 32);
  multiply_up_sets<T>(p, b, s, warp, ahead);
}

}  // namespace qe
