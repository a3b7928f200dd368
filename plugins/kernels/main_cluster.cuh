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
#include "cluster_block.cuh"
#include "cluster_correct.cuh"
#include "main_decode.cuh"

namespace qe {

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
