// The stages of the tiled GEMM in shared memory, and the asynchronous copies that fill them.
#pragma once
#include "../include/qe_edge/args.h"
#include "unpack.cuh"

namespace qe {

constexpr int kRowTiles = 4, kColumnTiles = 4, kWarpRows = 64, kWarpColumns = 32;
constexpr int kWarpsAcross = kPrefillColumns / kWarpColumns;
constexpr int kWideTiles = 8;  // column tiles of a warp in main_prefill_wide.cuh

// The token that a row of a block's tile is; rows past the last one repeat it.
QE_DEV int token_of(const MainArgs& p, int m) {
  const int last = m < p.M ? m : p.M - 1;
  return p.order ? p.order[last] : last;
}

// One stage: activations of all rows of the block, weights, scales, zero points, and sums of the activations.
template <int Bits, int Mode, int Groups, bool Zeros>
struct Stage {
  static constexpr int kRowBytes = Mode == kInt8 ? 128 : 256;  // activations of one token in one chunk
  static constexpr int kWeights = kPrefillColumns / kBlockColumns * kBlockBytes<Bits>;
  static constexpr int kScales = Groups * kPrefillColumns * 2;
  static constexpr int kZeros = Zeros ? Groups * kPrefillColumns : 0;
  static constexpr int kSumBytes = Mode == kInt8 && Groups == 2 && Zeros ? kTokenSums : 0;  // of one row
  static constexpr int kSums = kWeights + kScales + kZeros;  // where they start, past the rows
  // Eight rows of one 16-byte column are read together: the flip sends them to different banks.
  static QE_DEV int offset(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }
};

// Asynchronous copies, chunk after chunk; a warp copies `WarpRows` rows of the activations. Rows beyond M and columns beyond
// Np repeat the last valid ones: their results are never stored. A thread copies the same places of every chunk, so that only
// a few pointers move.
template <int Bits, int Mode, int Groups, bool Zeros, int WarpRows = 16>
struct Loader {
  using S = Stage<Bits, Mode, Groups, Zeros>;
  static constexpr int kPieces = S::kRowBytes / 16, kRowsAtOnce = 32 / kPieces, kCopies = WarpRows / kRowsAtOnce;
  int rows;
  int to_act, to_weights, to_group;  // bytes from the start of a stage
  int group_step;                    // bytes to the next chunk
  bool copies_group;
  const uint8_t *act, *weight, *group;
  uint32_t source[kCopies];  // where the rows of the activations start, in 16-byte pieces

  QE_DEV Loader(const MainArgs& p, int block_rows, int m0, int n0) : rows(block_rows) {
    const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, chunks = p.Kp / kChunk;
    const int row0 = warp * WarpRows + lane / kPieces, piece = lane % kPieces, last_block = p.Np / kBlockColumns - 1;
    act = static_cast<const uint8_t*>(p.act) + piece * 16;
    QE_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      const int from = token_of(p, m0 + row0 + j * kRowsAtOnce);
      source[j] = static_cast<uint32_t>(from) * static_cast<uint32_t>(chunks * kPieces);
    }
    to_act = S::offset(row0, piece);

    const int pieces = kPrefillColumns / 8 / warps;  // of one warp; of 3-bit weights four warps copy a block each
    const int first = Bits == 3 ? 0 : warp * pieces, block = n0 / kBlockColumns + (Bits == 3 ? warp : first / 4);
    weight = p.weight + static_cast<size_t>(block < last_block ? block : last_block) * chunks * kBlockBytes<Bits> +
             first % 4 * kPieceBytes + lane * 16;
    to_weights = rows * S::kRowBytes + (Bits == 3 ? warp * 3 : first) * kPieceBytes + lane * 16;

    to_group = rows * S::kRowBytes + S::kWeights + thread_id() * 16;
    // Scales are copied by the first threads, zero points and then sums, which lie behind them in a stage, by the next
    // ones. A block has two threads for every row, enough for all of that.
    const int past_scales = thread_id() - S::kScales / 16, past_zeros = past_scales - S::kZeros / 16;
    const uint8_t* of_groups = static_cast<const uint8_t*>(p.scales);
    const uint8_t* scales = group_source(of_groups, S::kScales / 64, thread_id(), n0, last_block, chunks);
    const uint8_t* zeros = group_source(p.zeros, S::kZeros / 64, past_scales, n0, last_block, chunks);
    group = past_scales < 0 ? scales : zeros;
    group_step = (past_scales < 0 ? S::kScales : S::kZeros) / 4;
    copies_group = past_zeros < (S::kSumBytes ? rows : 0);
    if (S::kSumBytes && past_zeros >= 0) {
      group = static_cast<const uint8_t*>(p.sums) + static_cast<size_t>(token_of(p, m0 + past_zeros)) * S::kSumBytes;
      group_step = p.M * S::kSumBytes;
    }
  }
  // Where piece `at` of four blocks' scales or zero points starts; a block has `pieces` of 16 bytes in a chunk.
  static QE_DEV const uint8_t* group_source(const uint8_t* from, int pieces, int at, int n0, int last_block,
                                            int chunks) {
    if (pieces == 0) return from;
    const int block = n0 / kBlockColumns + at / pieces;
    const size_t first = static_cast<size_t>(block < last_block ? block : last_block) * chunks * pieces;
    return from + (first + at % pieces) * 16;
  }
  QE_DEV int stage_bytes() const { return StageBytes(rows, Bits, Mode == kInt8, Groups, Zeros); }

  // Copies the next chunk to the stage at s.
  QE_DEV void operator()(unsigned char* s) {
    QE_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      const int down = j * kRowsAtOnce, flip = down % 8 << 4;  // as S::offset flips a row that is so much further down
      cp_async16(s + (to_act ^ flip) + down * S::kRowBytes, act + static_cast<size_t>(source[j]) * 16);
    }
    QE_UNROLL
    for (int i = 0; i < Bits; ++i)
      if (Bits == 3 ? thread_id() < 128 : i < 2 || block_threads() == 128)
        cp_async16(s + to_weights + i * kPieceBytes, weight + i * kPieceBytes);
    if (copies_group) cp_async16(s + to_group, group);
  }
  QE_DEV void next() {
    act += S::kRowBytes;
    weight += kBlockBytes<Bits>;
    group += group_step;
  }
};

}  // namespace qe
