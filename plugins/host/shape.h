// The problem as the kernels count it, and how a decode launch of `main` is cut: what plan.cpp makes launches of.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "../include/qe_edge/args.h"
#include "../include/qe_edge/plan.h"

namespace qe {

constexpr int kDecodeLimit = 64;      // tokens; above it the tiled GEMM runs
constexpr int kSliceChunks = 256;     // of K that a slice has at least: blocks that meet cost more than filling the GPU gains
constexpr int kMostSets = 8;          // of 32 columns that a block has at once
constexpr int kUnknownMultiprocessors = 16;
constexpr int kMostMultiprocessors = 192;  // of any GPU, for the workspace
constexpr int kSharedBytes = 96 << 10;     // that a block of decode may take, on every chip
constexpr int kMaxRank = 128;
constexpr int kMaxSlices = 8;         // of K in `main`
constexpr int kOwnMaxima = 2048;      // values of x whose maxima blocks of a cluster find each on its own
constexpr int64_t kMaxK = 131072;     // int32 sums of 16 * q * xq and of 8 * code * xq stay exact up to it
constexpr int64_t kMaxPieces = int64_t{1} << 32;

inline int RoundUp(int v, int to) { return (v + to - 1) / to * to; }
inline int Divide(int v, int by) { return (v + by - 1) / by; }

// The problem as the kernels count it.
struct Shape {
  int Kp, Np, shared_tiles, routed_tiles, experts, tokens;
  bool int8, decode, lowrank;

  // Short prompts are decoded where the tiles of the GEMM would leave most of the GPU empty.
  Shape(const QeProblem& p, int multiprocessors) {
    Kp = RoundUp(p.K, 128);
    Np = RoundUp(p.N, 32);
    // One expert needs no router: prepack joined its columns to the shared ones.
    const bool routed = p.num_experts > 1 && p.rank_routed > 0;
    experts = routed ? p.num_experts : 0;
    shared_tiles = Divide(p.rank_shared + (p.num_experts == 1 ? p.rank_routed : 0), 16);
    routed_tiles = routed ? Divide(p.rank_routed, 16) : 0;
    int8 = p.act_bits != 0;
    tokens = p.M;
    decode = p.M <= kGroupTokens || (p.M <= kDecodeLimit && 2 * Divide(p.N, 128) <= multiprocessors);
    lowrank = shared_tiles + routed_tiles > 0;
  }
  int token_groups() const { return tokens <= kLoneTokens ? 1 : Divide(tokens, kGroupTokens); }
  // Blocks of 32 tokens of the prefill down-projection, and its strips of 64 columns.
  int down_blocks(int m) const {
    return (shared_tiles ? Divide(m, kDownTokens) : 0) + (experts ? Divide(m, kDownTokens) + experts : 0);
  }
  int down_strips() const { return Divide(std::max(shared_tiles, routed_tiles), kDownColumnTiles); }
  int rank() const { return 16 * (shared_tiles + routed_tiles); }
  int down_tiles() const { return shared_tiles + experts * routed_tiles; }
};

// Weights that are not centred on zero; with 16-bit activations all of them are.
inline bool Zeros(const QeProblem& p) { return p.has_zeros || p.act_bits == 0; }

// Whether a GEMM multiplies the zero points of its groups by sums of activations; else it takes them off the weights.
inline bool SumsOfGemm(const QeProblem& p) { return p.act_bits != 0 && p.group_size == 64 && p.has_zeros; }

// Bytes of the sums of activations that `main` takes zero points off with; prepare.cuh has their layout.
inline size_t SumBytes(const QeProblem& p, const Shape& s) {
  if (!Zeros(p)) return 0;
  if (p.group_size < 0) return size_t{4} * p.M;
  if (s.decode) return size_t{4} * RoundUp(p.M, kGroupTokens) * (s.Kp / p.group_size);
  return SumsOfGemm(p) ? static_cast<size_t>(p.M) * (s.Kp / 128) * kTokenSums : 0;
}

// Slices of K in the down-projection: enough blocks to draw on all of the memory, each with work for its warps.
inline int Splits(const QeProblem& p, const Shape& s) {
  if (s.decode) {
    const int most = p.M <= kLoneTokens ? kMaxSplits : 4;  // `main` reads every slice's h
    return std::clamp(std::min(320 / std::max(1, s.down_tiles()), Divide(p.K, 128)), 1, most);
  }
  const int blocks = s.down_blocks(p.M) * s.down_strips();
  return std::clamp(std::min(264 / std::max(1, blocks), Divide(p.K, 384)), 1, kMaxPrefillSplits);
}

// How a decode launch of `main` is cut: slices of K and sets of 32 columns, warps of a set, and blocks beside each other; and
// where its shared memory has what.
struct Cut {
  bool lone;  // it quantizes x itself
  int slices, slice_chunks, sets, set_warps, warp_chunks, blocks, groups;
  int group_sums_at, ring_at, results_at, tokens_at, scores_at, h_at, shared;
};

inline void PlaceShared(const QeProblem& p, const Shape& s, Cut& c) {
  const int of_group = p.group_size < 0 ? 0 : 128 / p.group_size, warps = c.sets * c.set_warps;
  int at = 0;
  const auto take = [&](int bytes) {
    const int here = at;
    at += RoundUp(bytes, 16);
    return here;
  };
  take(c.lone ? c.slice_chunks * p.M * 128 * (s.int8 ? 1 : 2) : 0);
  c.group_sums_at = take(c.lone && Zeros(p) ? c.slice_chunks * of_group * kGroupTokens * 4 : 0);
  c.ring_at = take(warps * kRing * 512 * p.weight_bits);
  c.results_at = take(warps * 2 * (c.lone ? 1 : 2) * 4 * 128);
  c.tokens_at = take(3 * kGroupTokens * 4 + 16 + (c.lone ? 2 * p.M * kDecodeWarps * 4 : 0));
  c.scores_at = take(c.lone && s.experts ? p.M * kMaxExperts * 4 : 0);
  c.h_at = take((c.lone ? p.M : std::min(p.M, kGroupTokens)) * s.rank() * 2);
  c.shared = at;
}

// With this many slices of K: a block on every multiprocessor, with as many columns as that takes, and as many warps as its
// shared memory has room for.
inline Cut CutColumns(const QeProblem& p, const Shape& s, bool lone, int slices, int multiprocessors, int set_warps) {
  Cut c{};
  const int blocks = s.Np / 32, chunks = s.Kp / 128;
  c.lone = lone;
  c.slice_chunks = Divide(chunks, slices);
  c.slices = Divide(chunks, c.slice_chunks);  // none is empty
  c.groups = lone ? 1 : s.token_groups();
  const int beside = std::max(1, multiprocessors / c.groups);
  c.sets = c.slices > 1 ? 1 : std::clamp(Divide(blocks, beside), 1, kMostSets);
  c.blocks = c.slices > 1 ? blocks : std::min(blocks, beside);
  const int most = std::max(1, kDecodeWarps / c.sets);
  for (c.set_warps = std::clamp(set_warps ? set_warps : most, 1, std::min(most, c.slice_chunks));; --c.set_warps) {
    c.warp_chunks = Divide(c.slice_chunks, c.set_warps);
    PlaceShared(p, s, c);
    if (c.shared <= kSharedBytes || c.set_warps == 1) break;
  }
  while (c.shared > kSharedBytes && c.sets > 1) {
    --c.sets;
    PlaceShared(p, s, c);
  }
  return c;
}

// Slices of K until every multiprocessor has a block, as long as each has some chunks of K.
inline int Slices(const Shape& s, int multiprocessors) {
  const int blocks = s.Np / 32 * s.token_groups(), chunks = s.Kp / 128;
  const int to_fill = Divide(std::min(multiprocessors, kMostMultiprocessors), blocks);
  const int wanted = std::clamp(std::min(to_fill, chunks / kSliceChunks), 1, kMaxSlices);
  return Divide(chunks, Divide(chunks, wanted));  // none is empty
}

inline Cut CutDecode(const QeProblem& p, const Shape& s, const QeTactic& t, int multiprocessors, bool counters) {
  const int wanted = counters ? Slices(s, multiprocessors) : 1;
  for (int slices = wanted; p.M <= kLoneTokens && slices <= (counters ? kMaxSlices : 1); ++slices) {
    const Cut cut = CutColumns(p, s, true, slices, multiprocessors, t.decode_warps);
    if (cut.shared <= kSharedBytes) return cut;
  }
  return CutColumns(p, s, false, wanted, multiprocessors, t.decode_warps);
}

// How a launch of clusters is cut: blocks of a cluster, which is also slices of K; sets of 32 columns of a cluster; parts of a
// slice, for different warps; and where shared memory has what. blocks is 0 where no cut fits.
struct ClusterCut {
  int blocks, shift, clusters, sets, longer, slice_chunks, parts, part_chunks;
  int main_warps, own_maxima, pieces, copies_down, score_warps, tile_parts, routed_parts;
  int group_sums_at, ring_at, largest_at, slice_sum_at, part_at, score_part_at, routed_part_at, results_at, unit_at, scores_at;
  int expert_at, x_at, router_at, down_at, low_at, h_at, boxes_at, row_bytes, shared;
  int most_sets() const { return sets + (longer ? 1 : 0); }
};

inline void PlaceClusterShared(const QeProblem& p, const Shape& s, ClusterCut& c) {
  const int of_group = p.group_size < 0 ? 0 : 128 / p.group_size, owned = Divide(c.most_sets(), c.blocks), m4 = p.M * 4;
  int at = 0;
  const auto take = [&](int bytes) {
    const int here = at;
    at += RoundUp(bytes, 16);
    return here;
  };
  take(c.slice_chunks * p.M * 128 * (s.int8 ? 1 : 2));
  c.group_sums_at = take(Zeros(p) ? c.slice_chunks * of_group * kGroupTokens * 4 : 0);
  c.ring_at = take(c.main_warps * kClusterRing * 512 * p.weight_bits);
  c.largest_at = take(c.pieces * (c.own_maxima ? 1 : c.blocks) * m4);
  c.slice_sum_at = take(Zeros(p) && !of_group ? c.blocks * c.slice_chunks * m4 : 0);
  c.part_at = take(c.blocks * c.tile_parts * 16 * s.shared_tiles * m4);
  c.score_part_at = take(c.blocks * c.score_warps * kMaxExperts * m4);
  c.routed_part_at = take(c.blocks * c.routed_parts * 16 * s.routed_tiles * m4);
  c.results_at = take(owned * c.blocks * c.parts * 32 * m4);
  c.unit_at = take(m4);
  c.scores_at = take(s.experts ? kMaxExperts * m4 : 0);
  c.expert_at = take(s.experts ? m4 : 0);
  c.row_bytes = c.slice_chunks * 256 + 64;  // so that two tokens' rows lie in different banks
  c.x_at = take(s.lowrank ? p.M * c.row_bytes : 0);
  c.router_at = take(s.experts * c.row_bytes);
  c.down_at = take(c.copies_down ? s.shared_tiles * c.slice_chunks * 4 * p.adapter_bits * 64 : 0);
  c.low_at = take(s.lowrank ? owned * 32 * m4 : 0);
  c.h_at = take(p.M * s.rank() * 2);
  c.boxes_at = take(4 * 8);
  c.shared = at;
}

// Nanoseconds of a cut, nearly, on an H100: enough to choose between cuts. Weights of a block from memory, or of a warp one ring
// after the other; its share of x; beside both its share of x @ down; sums over blocks.
inline int ClusterTime(const QeProblem& p, const Shape& s, const ClusterCut& c) {
  const int rounds = Divide(c.most_sets() * c.parts, c.main_warps);
  const int units = c.most_sets() * c.slice_chunks - c.main_warps * kClusterRing;  // that are not on their way before the launch in front ends
  const int stream = std::max(0, units) * 22 * p.weight_bits, steps = rounds * c.part_chunks * 200;
  const int maxima = Divide(c.pieces * p.M, c.main_warps) * 150 + (c.own_maxima ? 0 : 350);
  const int codes = Divide(c.slice_chunks * p.M, c.main_warps) * 200;
  const int blocks = c.slice_chunks * 4, of_block = c.copies_down ? 40 : 100;  // of 32 rows
  const auto tiles = [&](int tiles, int parts, int time) { return parts ? Divide(tiles * parts, kCorrectWarps) * Divide(blocks, parts) * time : 0; };
  const int shared = tiles(s.shared_tiles, c.tile_parts, of_block);
  const int routed = s.experts ? p.M * (tiles(s.routed_tiles, c.routed_parts, 150) + 300) + 1500 : 0;
  const int sums = Divide(Divide(c.most_sets(), c.blocks) * p.M, kClusterWarps) * c.blocks * c.parts * 8;
  return std::max(maxima + codes + std::max(stream, steps), s.lowrank ? 1300 + shared + routed : 0) + sums + 50 * c.shift;
}

// The fastest cut of 1 to 4 tokens into clusters, or of a given number of blocks each.
inline ClusterCut CutCluster(const QeProblem& p, const Shape& s, const QeTactic& t, int multiprocessors) {
  ClusterCut best{};
  if (p.M > kClusterTokens) return best;
  const int all = s.Np / 32, chunks = s.Kp / 128;
  for (int shift = 1; 1 << shift <= kMostCluster; ++shift) {
    ClusterCut c{};
    c.shift = shift, c.blocks = 1 << shift;
    c.slice_chunks = Divide(chunks, c.blocks);
    c.clusters = std::min(multiprocessors / c.blocks, all);
    if (Divide(chunks, c.slice_chunks) != c.blocks || c.clusters < 1 || (t.clusters > 1 && t.clusters != c.blocks)) continue;
    c.sets = all / c.clusters, c.longer = all % c.clusters;
    c.own_maxima = p.M * p.K <= kOwnMaxima;
    c.pieces = Divide(c.own_maxima ? p.K : c.slice_chunks * 128, 256);
    c.main_warps = kClusterWarps - (s.lowrank ? kCorrectWarps : 0);
    c.score_warps = s.experts ? std::min(kCorrectWarps, Divide(c.slice_chunks, 2)) : 0;
    c.tile_parts = s.shared_tiles ? std::max(1, kCorrectWarps / s.shared_tiles) : 0;
    c.routed_parts = s.routed_tiles ? std::max(1, kCorrectWarps / s.routed_tiles) : 0;
    for (c.copies_down = 0; c.copies_down <= (s.shared_tiles && p.adapter_bits < 16); ++c.copies_down)
      for (c.parts = 1; c.parts <= std::min(kClusterWarps, c.slice_chunks); ++c.parts) {
        c.part_chunks = Divide(c.slice_chunks, c.parts);
        PlaceClusterShared(p, s, c);
        if (c.shared > kSharedBytes || c.most_sets() * c.parts > 4096) break;
        if (!best.blocks || ClusterTime(p, s, c) < ClusterTime(p, s, best)) best = c;
      }
  }
  return best;
}

// The most slices that any GPU has.
inline int MostSlices(const QeProblem& p, const Shape& s) {
  const bool roomy = p.M > kLoneTokens || CutColumns(p, s, true, 1, kMostMultiprocessors, 0).shared <= kSharedBytes;
  return roomy ? Slices(s, kMostMultiprocessors) : kMaxSlices;
}

}  // namespace qe
