// The whole operator for 1 to 4 tokens in one launch, on chips with clusters (prim.cuh): a cluster of blocks has some columns,
// and each of its blocks has a slice of their K. Some warps of a block multiply the weights, others the factors of the
// correction. Blocks send each other what all of them need:
//
//   1. the tokens' maxima, each of its slice of x, unless x is short; then a block quantizes its slice;
//   2. parts of x @ down of the shared expert and of the router's scores; then, with experts, parts of the chosen ones';
//   3. what its slice adds to y, to the block that owns the columns: 32 of them in turn, which also adds h @ up and stores y.
//
// Weights and factors are on their way before the launch in front ends. All sums have a fixed order. What happens once takes
// as long as its longest chain of instructions, so everything is spread over as many warps as there are.
#pragma once
#include "../include/qe_edge/args.h"
#include "main_decode.cuh"

namespace qe {

constexpr int kMainGroup = 1, kCorrectGroup = 2;  // of warps, for group_sync
constexpr int kPiece = 256;                       // rows of x that a warp reads at once, eight a lane

// Places in shared memory, of all blocks alike. "From" counts the blocks of the cluster.
struct ClusterShared {
  float* largest;      // [from][pieces of the slice][M], or [pieces of x][M] of this block alone
  float* slice_sum;    // [from][pieces][M]: sums of the activations
  float* part;         // [from][tile parts][M][16 * shared tiles]: parts of the shared h, columns in the order of down_place
  float* score_part;   // [from][score warps][M][kMaxExperts]
  float* routed_part;  // [from][routed parts][M][16 * routed tiles]: of the chosen experts' h, in that order
  float* results;      // [sets that this block owns][from][parts][M][32], columns in the order of place_of
  float* unit;         // [M]: what one unit of the activations stands for
  float* scores;       // [M][kMaxExperts]
  int32_t* expert;     // [M]
  uint8_t* x;          // [M][row_bytes]: this block's slice, as it is
  uint8_t* router;     // [E][row_bytes]: of this block's slice
  uint8_t* down;       // [shared tiles][blocks of 32 rows of the slice]: of integer factors
  float* low;          // [sets that this block owns][M][32]: h @ up
  uint16_t* h;         // [M][rank]
  // What comes from all blocks: maxima, parts and scores, routed parts, results and sums of activations.
  uint64_t *largest_box, *part_box, *routed_box, *result_box;
  QE_DEV ClusterShared(const ClusterArgs& p, unsigned char* shared) {
    const auto at = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
    largest = at(p.largest_at), slice_sum = at(p.slice_sum_at), part = at(p.part_at), score_part = at(p.score_part_at);
    routed_part = at(p.routed_part_at), results = at(p.results_at), unit = at(p.unit_at), scores = at(p.scores_at);
    low = at(p.low_at), expert = reinterpret_cast<int32_t*>(shared + p.expert_at);
    x = shared + p.x_at, router = shared + p.router_at, down = shared + p.down_at;
    h = reinterpret_cast<uint16_t*>(shared + p.h_at);
    largest_box = reinterpret_cast<uint64_t*>(shared + p.boxes_at);
    part_box = largest_box + 1, routed_box = largest_box + 2, result_box = largest_box + 3;
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

// Quotient by M or by another small number, whose `factor` is 65536 divided by it and rounded up; of less than 4096.
QE_DEV int divide_small(int value, int factor) { return (value * factor) >> 16; }

// A warp's weights on their way from memory, of one task after the other. A task is a part of the slice of one set of columns.
template <int Bits>
struct Feed {
  const uint8_t* from;
  unsigned char* slots;
  int left, next;  // chunks of this task, next task
  QE_DEV void begin(const ClusterArgs& p, const ClusterBlock& b) {
    const int tasks = b.sets * p.parts;
    for (; left <= 0 && next < tasks; next += p.main_warps) {
      const int set = divide_small(next, p.parts_factor), start = (next - set * p.parts) * p.part_chunks, rest = b.own - start;
      left = rest < p.part_chunks ? rest : p.part_chunks;
      from = p.weight + (static_cast<size_t>(b.columns_of(set)) * p.chunks + b.first + start) * kBlockBytes<Bits> + (thread_id() & 31) * 16;
    }
  }
  QE_DEV void push(const ClusterArgs& p, const ClusterBlock& b, unsigned char* slot) {
    if (left <= 0) begin(p, b);
    if (left > 0) {
      QE_UNROLL
      for (int i = 0; i < Bits; ++i) cp_async16(slot + i * kPieceBytes, from + i * kPieceBytes);
      from += kBlockBytes<Bits>;
      --left;
    }
    cp_async_commit();
  }
};

// What a warp reads for the tokens' maxima: pieces of all of x where it is short, or of this block's slice.
struct Pieces {
  int k0, end, items;
  QE_DEV Pieces(const ClusterArgs& p, const ClusterBlock& b) {
    k0 = p.own_maxima ? 0 : b.first * kChunk, end = p.own_maxima ? p.chunks * kChunk : (b.first + b.own) * kChunk, items = p.pieces * p.M;
    if (end > p.K) end = p.K;
  }
  QE_DEV int token(const ClusterArgs& p, int item) const { return item - divide_small(item, p.token_factor) * p.M; }
  QE_DEV int row(const ClusterArgs& p, int item) const {  // of this lane's eight; `end` where there are none
    const int k = k0 + divide_small(item, p.token_factor) * kPiece + (thread_id() & 31) * 8;
    return item < items && k < end ? k : end;
  }
};
template <class T>
QE_DEV u32x4 load_eight(const void* from, int k, int end) {
  u32x4 v{};
  if (k < end) v = load16(static_cast<const T*>(from) + k);
  return v;
}

// The tokens' maxima of pieces of x. All blocks are told those of a slice. `omega` has the channel scales of the first piece.
template <class T>
QE_DEV void find_maxima(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, const Pieces& pieces, u32x4 omega) {
  const int lane = thread_id() & 31;
  const auto load_x = [&](int item) {
    return load_eight<T>(static_cast<const T*>(p.x) + static_cast<size_t>(pieces.token(p, item)) * p.K, pieces.row(p, item), pieces.end);
  };
  int item = thread_id() >> 5;
  u32x4 next = load_x(item), next_omega = omega;
  QE_UNROLL_BY(1)
  for (; item < pieces.items; item += p.main_warps) {
    const u32x4 x = next, scale = next_omega;
    next = load_x(item + p.main_warps);
    if (p.inv_omega) next_omega = load_eight<T>(p.inv_omega, pieces.row(p, item + p.main_warps), pieces.end);
    float largest = 0.f;
    QE_UNROLL
    for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(half_of<T>(x, i) * (p.inv_omega ? half_of<T>(scale, i) : 1.f)));
    QE_UNROLL
    for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
    if (!p.own_maxima) {
      if (lane < p.cluster_blocks) send(s.largest + b.rank * pieces.items + item, s.largest_box, lane, largest);
    } else if (lane == 0) {
      s.largest[item] = largest;
    }
  }
}

// A token's maximum, known to every lane.
QE_DEV float maximum_of(const ClusterArgs& p, const ClusterShared& s, int m) {
  const int found = p.own_maxima ? p.pieces : p.pieces << p.cluster_shift;
  float largest = 0.f;
  QE_UNROLL_BY(1)
  for (int i = thread_id() & 31; i < found; i += 32) largest = max_f(largest, s.largest[i * p.M + m]);
  QE_UNROLL
  for (int step = 16; step > 0; step >>= 1) largest = max_f(largest, shuffle_xor(largest, step));
  return largest;
}

// Quantizes this block's slice, a warp 128 rows of int8 activations of one token at once, or 256 of 16-bit ones.
template <class T, int Mode, int Groups, bool Zeros>
QE_DEV void quantize_cluster(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, unsigned char* shared) {
  const int lane = thread_id() & 31, k0 = b.first * kChunk;
  const Rows rows{p.inv_omega ? static_cast<const T*>(p.inv_omega) + k0 : nullptr, shared,
                  Zeros && Groups != 0 ? reinterpret_cast<uint32_t*>(shared + p.group_sums_at) : nullptr, p.K - k0,
                  b.own * kChunk, p.M, p.M, Mode == kInt8 ? p.act_max : 0, Groups == 0 ? 0 : kChunk / Groups, p.code_shifts};
  const int items = p.M * (Mode == kInt8 ? p.slice_chunks : (p.slice_chunks + 1) / 2);
  float largest = 0.f;
  QE_UNROLL_BY(1)
  for (int item = thread_id() >> 5, before = -1; item < items; item += p.main_warps) {
    const int piece = divide_small(item, p.token_factor), m = item - piece * p.M;
    const T* row = static_cast<const T*>(p.x) + static_cast<size_t>(m) * p.K + k0;
    const int k = piece * (Mode == kInt8 ? kChunk : kPiece) + lane * (Mode == kInt8 ? 4 : 8);
    u32x2 x{}, omega{};
    if (Mode == kInt8 && k < rows.K) {
      x = load8(row + k);
      if (p.inv_omega) omega = load8(static_cast<const T*>(p.inv_omega) + k0 + k);
    }
    if (m != before) {
      largest = maximum_of(p, s, m);
      before = m;
    }
    float total;
    if constexpr (Mode == kInt8) {
      float scaled[4];
      scale_four<T>(x, omega, p.inv_omega != nullptr, scaled);
      total = store_four<Groups, Zeros>(p, rows, m, k, scaled, largest);
    } else {
      total = quantize_rows<T>(rows, row, m, k, largest);
    }
    if constexpr (Zeros && Groups == 0) {
      QE_UNROLL
      for (int step = 16; step > 0; step >>= 1) total += shuffle_xor(total, step);
      if (lane < p.cluster_blocks) send(s.slice_sum + b.rank * items + item, s.result_box, lane, total);
    }
  }
  if ((thread_id() >> 5) != p.main_warps - 1) return;  // that warp has least to quantize
  QE_UNROLL_BY(1)
  for (int m = 0; m < p.M; ++m) {
    largest = maximum_of(p, s, m);
    if (lane == 0) s.unit[m] = stored_unit(Mode == kInt8 ? p.act_max : 0, largest);
  }
}

// Where a column of 32 lies in the results: a lane has four of them, eight apart.
QE_DEV int place_of(int column) { return (column & 7) * 4 + (column >> 3); }

// The warps that multiply weights.
template <class T, int Bits, int Mode, int Groups, bool Zeros>
QE_DEV void multiply_weights(const ClusterArgs& p, const ClusterBlock& b, const ClusterShared& s, unsigned char* shared, Feed<Bits>& feed) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, tasks = b.sets * p.parts;
  const Pieces pieces(p, b);
  u32x4 omega{};
  if (p.inv_omega) {
    omega = load_eight<T>(p.inv_omega, pieces.row(p, warp), pieces.end);
    QE_UNROLL_BY(1)
    for (int item = warp + p.main_warps; item < pieces.items; item += p.main_warps)
      if (lane % 8 == 0 && pieces.row(p, item) < pieces.end) prefetch_line(static_cast<const T*>(p.inv_omega) + pieces.row(p, item));
  }
  wait_for_previous();
  find_maxima<T>(p, b, s, pieces, omega);
  if (p.own_maxima) {
    group_sync(kMainGroup, p.main_warps * 32);
  } else {
    wait_for_box(s.largest_box);
  }
  quantize_cluster<T, Mode, Groups, Zeros>(p, b, s, shared);
  group_sync(kMainGroup, p.main_warps * 32);  // the activations are there

  unsigned char *slot = feed.slots, *const last_slot = slot + (kClusterRing - 1) * kBlockBytes<Bits>;
  QE_UNROLL_BY(1)
  for (int task = warp; task < tasks; task += p.main_warps) {
    const int set = divide_small(task, p.parts_factor), part = task - set * p.parts, start = part * p.part_chunks;
    const int end = start + p.part_chunks < b.own ? start + p.part_chunks : b.own;
    typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kDecodeTiles][1][4];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][0][j] = 0;
    Cursor<Bits, Mode, Groups, 1> at(p, b.columns_of(set), b.first + start, b.first, shared, shared + p.group_sums_at, p.M);
    QE_UNROLL_BY(1)
    for (int chunk = start; chunk < end; ++chunk) {
      cp_async_wait<kClusterRing - 1>();
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
      slot = slot == last_slot ? feed.slots : slot + kBlockBytes<Bits>;
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
}

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
  const bool corrects = p.main_warps < warps, multiplies = warp < p.main_warps;
  const int sums = p.M * (Mode == kInt8 ? p.slice_chunks : (p.slice_chunks + 1) / 2);  // of activations, from a block
  if (thread_id() == 0) {
    const int of_token = p.cluster_blocks * p.M * 4;  // bytes, of one float from each block
    open_box(s.largest_box, p.own_maxima ? 0 : p.pieces * of_token);
    open_box(s.part_box, (16 * p.shared_tiles * p.tile_parts + p.score_warps * ((p.E + 3) & ~3)) * of_token);
    open_box(s.routed_box, p.E ? 16 * p.routed_tiles * p.routed_parts * of_token : 0);
    open_box(s.result_box, b.owned * p.parts * kDecodeColumns * of_token + (kWholeColumn ? p.cluster_blocks * sums * 4 : 0));
    boxes_are_open();
  }
  cluster_arrive();
  Feed<Bits> feed{nullptr, shared + p.ring_at + warp * (kClusterRing * kBlockBytes<Bits>) + lane * 16, 0, warp};
  if (multiplies) {
    QE_UNROLL_BY(1)
    for (int i = 0; i < kClusterRing; ++i) feed.push(p, b, feed.slots + i * kBlockBytes<Bits>);
  } else {
    fetch_factors(p, b, s, thread_id() - p.main_warps * 32);
  }
  ColumnScales first{};
  if (warp < b.owned * p.M) first = load_columns<kWholeColumn>(p, b.owned_columns(p, divide_small(warp, p.token_factor)));
  cluster_wait();  // all blocks have begun
  if (multiplies) {
    multiply_weights<T, Bits, Mode, Groups, Zeros>(p, b, s, shared, feed);
  } else {
    correct<T>(p, b, s);
  }
  block_sync();
  wait_for_box(s.result_box);

  const int sources = p.cluster_blocks * p.parts;
  QE_UNROLL_BY(1)
  for (int pair = warp; pair < b.owned * p.M; pair += warps) {
    const int own = divide_small(pair, p.token_factor), m = pair - own * p.M, block = b.owned_columns(p, own);
    const int n = block * kDecodeColumns + lane;
    const ColumnScales c = pair == warp ? first : load_columns<kWholeColumn>(p, block);
    float v = sum_of_parts(s.results + (own * sources * p.M + m) * kDecodeColumns + place_of(lane), sources, p.M * kDecodeColumns);
    if constexpr (kWholeColumn)
      v = without_zero<Mode, true>(v, c.zero, sum_of_parts(s.slice_sum + m, p.cluster_blocks * divide_small(sums, p.token_factor), p.M));
    v *= c.scale * s.unit[m] * kUnit;
    if (corrects) v += s.low[pair * kDecodeColumns + lane];
    if (n < p.N) store2(static_cast<T*>(p.y) + static_cast<size_t>(m) * p.N + n, from_float<T>(v * c.out + c.bias).bits);
  }
}

}  // namespace qe
