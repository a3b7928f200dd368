// What one kernel launch is told. Plain data, shared by the kernels, the host code and both emulators.
//
// Names: M tokens, K in_features, N out_features; Kp and Np are K and N rounded up to 128 and 32, as the packed
// weights are. Ranks are counted in steps of 16 columns ("tiles"): the shared expert has `shared_tiles`, every
// routed expert has `routed_tiles`; `rank` is 16 * (shared_tiles + routed_tiles), the width of one token's h, and `columns`
// of `down` are 16 * (shared_tiles + E * routed_tiles).
#pragma once
#include <stdint.h>

#include "sizes.h"

namespace qe {

// 16-bit activations: how many bits above bit 0 of an fp16 the codes of eight rows stand when `main` multiplies them.
// 4 bits for each of the 16 eights of a chunk, the first in the lowest; see unpack.cuh for both orders.
constexpr uint64_t kCodeShifts4 = 0x4040404040404040, kCodeShifts3 = 0x0636305263041630;

struct PrepareArgs {
  const void* x;          // T [M, K]
  const void* inv_omega;  // T [K] or null: multiplies x in the quantized branch only
  const void* router;     // T [E, K] or null: transposed from the canonical [K, E] by prepack
  void* act;              // int8 or fp16 [M, Kp]: the operand of `main`
  float* token_scale;     // [M]: what one unit of `act` stands for
  void* sums;             // sums of `act` over groups of rows, for zero points, or null; see prepare.cuh
  int32_t* expert;        // [M] or null
  uint32_t* counters;     // [counter_count]: set to zero for `down`
  int32_t M, K, Kp, E;
  int32_t act_max;        // 127 or 31; 0 keeps the activations in 16 bits
  int32_t decode_order;   // rows of a chunk in the order of main_decode's lanes instead of their own
  int32_t sum_rows;       // rows of one sum: 64, 128, or 0 for all of K
  int32_t counter_count;
  uint64_t code_shifts;   // 16-bit activations: kCodeShifts4 or 3, or 0 when `main` takes the factors off the weights
};

struct DownArgs {
  const void* x;            // T [M, K]: adapters see the 16-bit activations, never the quantized ones
  const void* down;         // T, int8 or INT4 codes, packed: see prepack/layout.py
  const float* down_scale;  // [tiles * 16]; ones for 16-bit adapters
  const void* router;       // decode of few tokens: as in PrepareArgs
  float* scores;            // decode of few tokens: [splits, M, kMaxExperts] parts of the router's scores
  const int32_t* expert;    // prefill: [M]
  float* partial;           // parts of h: [splits, M, columns] in decode, [splits, M, rank] in prefill
  void* h;                  // prefill: T [M, rank]
  int32_t* order;           // prefill: [M] tokens sorted by expert, so that a GEMM tile meets few experts
  uint32_t* counters;       // prefill: one per block of the grid's first two dimensions, zero before and after
  const void* next;         // decode of few tokens: the weights that `main` reads first, to be fetched from memory
  int64_t next_bytes;
  int32_t M, K, E, shared_tiles, routed_tiles, splits;
};

// `prepare` and `down` of 9 to 64 tokens are one launch: the first M blocks prepare a token each.
struct PrepareDownArgs {
  PrepareArgs prepare;
  DownArgs down;
};

struct MainArgs {
  const void* act;           // int8 or fp16 [M, Kp]; null where `main` quantizes x itself
  const float* token_scale;  // [M]
  const void* sums;          // of `act` over groups of rows, see prepare.cuh
  const uint8_t* weight;     // [Np/32, Kp/128, 4 (tiles) or 3 (words), 32 lanes, 16 bytes]
  const void* scales;        // fp16 [Np/32, Kp/g, 32], in the order of prepack/layout.py, or null (one per column)
  const uint8_t* zeros;      // [Np/32, Kp/g or 1, 32] in that order: zero point plus 8 (3 bits: 4), times 8 for int8
  const float* columns;      // [3, Np]: main scale, output scale, bias
  const float* partial;      // decode: parts of h, as `down` leaves them
  const void* h;             // prefill: T [M, rank]
  const void* up;            // T, int8 or INT4 codes, packed
  const int32_t* expert;     // [M]
  const int32_t* order;      // prefill: [M] or null for the identity
  void* y;                   // T [M, N]
  // Decode only:
  const void* x;             // of PrepareArgs, as are inv_omega, act_max and code_shifts
  const void* inv_omega;
  const float* scores;       // [splits, M, kMaxExperts] where `main` quantizes x, which chooses the experts then
  float* slices;             // [k_splits, M, Np]: what each slice of K adds to y, where there are several
  uint32_t* counters;        // [token groups * Np / 32]: slices that are done, zero before and after
  uint64_t code_shifts;
  int32_t M, N, Np, Kp;
  int32_t E, shared_tiles, routed_tiles, splits;
  int32_t up_bits;           // 16, 8 or 4
  int32_t K, act_max, k_splits;
  // How K is cut: chunks of 128 rows in all, of a block's slice and of a warp; and the columns: sets of 32 that a block has
  // at once, warps of a set, and 256 / set_warps rounded up.
  int32_t chunks, slice_chunks, warp_chunks, sets, set_warps, set_factor, token_groups;
  // Where things begin in shared memory, in bytes; the activations are at 0.
  int32_t group_sums_at, ring_at, results_at, tokens_at, scores_at, h_at;
};

// 1 to 4 tokens where blocks form clusters: the whole operator (main_cluster.cuh).
struct ClusterArgs {
  const void *x, *inv_omega, *router;  // of PrepareArgs
  const void* down;                    // of DownArgs, as is down_scale
  const float* down_scale;
  const uint8_t* weight;               // of MainArgs, as are scales, zeros, columns, up, y and code_shifts
  const void* scales;
  const uint8_t* zeros;
  const float* columns;
  const void* up;
  void* y;
  uint64_t code_shifts;
  int32_t M, N, Np, K, E, shared_tiles, routed_tiles;
  int32_t factor_bits, act_max;
  int32_t main_warps;                     // of a block, that multiply weights; the others have the correction
  int32_t own_maxima, pieces;             // 1: every block reads all of x for the maxima; pieces of 256 rows that it reads
  int32_t copies_down;                    // 1: integer factors of the shared expert are copied to shared memory
  int32_t score_warps;                    // that find parts of the scores
  int32_t tile_parts, routed_parts;       // parts of K of a tile of `down`, for different warps
  int32_t cluster_blocks, cluster_shift;  // a power of two, and which
  // Sets of 32 columns that each cluster has; the first `longer_clusters` have one more.
  int32_t cluster_sets, longer_clusters;
  // Chunks of 128 rows in all, and of a block's slice. A slice has `parts` for different warps, each of `part_chunks`.
  int32_t chunks, slice_chunks, parts, part_chunks;
  int32_t parts_factor, token_factor;     // 65536 / parts and 65536 / M, rounded up
  // Where things begin in shared memory, in bytes; the activations are at 0.
  int32_t group_sums_at, ring_at, largest_at, slice_sum_at, part_at, score_part_at, routed_part_at, results_at, unit_at, scores_at;
  int32_t expert_at, x_at, router_at, down_at, low_at, h_at, boxes_at;
  int32_t row_bytes;                      // of one token's slice of x in shared memory
};

}  // namespace qe
