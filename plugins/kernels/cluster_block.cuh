// What a block of a cluster is and where its shared memory has what; see main_cluster.cuh.
#pragma once
#include "../include/qe_edge/args.h"
#include "prepare.cuh"

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

}  // namespace qe
