// `main` of more than 64 tokens where int8 sums run over all of K: a tiled GEMM as in main_prefill.cuh with a warp tile of
// 64 x 64, four warps in a block of 128 x 128. Each fragment that a warp reads from shared memory then serves twice as many
// matrix instructions, and those of one k32 step are enough to hide the reads for the next one.
#pragma once
#include "../include/qe_edge/args.h"
#include "prefill_epilogue.cuh"

namespace qe {

constexpr int kWideRows = 128, kWideColumns = 8 * kWideTiles;

// The codes of 64 columns in one chunk.
template <int Bits>
QE_DEV void load_wide_words(const unsigned char* weights, BlockWords<Bits> (&w)[2]) {
  QE_UNROLL
  for (int block = 0; block < 2; ++block)
    QE_UNROLL
    for (int i = 0; i < Bits; ++i) w[block][i] = load16(weights + (block * Bits + i) * kPieceBytes);
}

// The A fragments of 64 rows in one k32 step.
template <class S>
QE_DEV void load_wide_rows(const unsigned char* rows, uint32_t (&a)[kRowTiles][4]) {
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i) load_matrix(a[i], rows + i * 16 * S::kRowBytes);
}

template <class T, int Bits, bool Zeros>
QE_DEV void main_prefill_wide(const MainArgs& p) {
  using S = Stage<Bits, kInt8, 0, Zeros>;
  QE_DYNAMIC_SHARED(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5;
  const int wm = warp / 2 * kWarpRows, wn = warp % 2 * kWideColumns;
  const int m0 = block_y() * kWideRows, n0 = block_x() * kPrefillColumns, chunks = p.Kp / kChunk;
  wait_for_previous();
  Loader<Bits, kInt8, 0, Zeros, 32> load(p, kWideRows, m0, n0);
  const int stage_bytes = load.stage_bytes();
  for (int s = 0; s < kStages; ++s) {
    if (s < chunks) load(shared + s * stage_bytes);
    load.next();
    cp_async_commit();
  }

  int acc[kRowTiles][kWideTiles][4];
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int j = 0; j < kWideTiles; ++j)
      QE_UNROLL
      for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
  int piece[4];
  QE_UNROLL
  for (int step = 0; step < 4; ++step) piece[step] = S::offset(wm + (lane & 15), step * 2 + (lane >> 4));
  const int words_at = kWideRows * S::kRowBytes + wn * (16 * Bits) + lane * 16;

  BlockWords<Bits> w[2];
  uint32_t a[2][kRowTiles][4];
  cp_async_wait<kStages - 1>();
  block_sync();
  load_wide_words<Bits>(shared + words_at, w);
  load_wide_rows<S>(shared + piece[0], a[0]);
  unsigned char* stage = shared;
  unsigned char* const end = shared + kStages * stage_bytes;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    QE_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t b[kWideTiles][2];
      QE_UNROLL
      for (int j = 0; j < kWideTiles; ++j)
        QE_UNROLL
        for (int r = 0; r < 2; ++r) b[j][r] = codes_of<Bits, Zeros>(w[j / 4], j % 4, 2 * step + r);
      if (step < 3) {
        load_wide_rows<S>(stage + piece[step + 1], a[(step + 1) & 1]);
      } else {
        // Every warp has read all of this stage: it is filled anew. The next one has landed for every thread.
        cp_async_wait<kStages - 2>();
        block_sync();
        if (chunk + kStages < chunks) load(stage);
        load.next();
        cp_async_commit();
        stage = stage + stage_bytes == end ? shared : stage + stage_bytes;
        if (chunk + 1 < chunks) {
          load_wide_words<Bits>(stage + words_at, w);
          load_wide_rows<S>(stage + piece[0], a[0]);
        }
      }
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i)
        QE_UNROLL
        for (int j = 0; j < kWideTiles; ++j) mma_s8(acc[i][j], a[step & 1][i], b[j][0], b[j][1], acc[i][j]);
    }
  }
  finish_prefill<T, kInt8, 0, Zeros>(p, shared, kWideRows, m0, n0, wm, wn, acc);
}

}  // namespace qe
