// What a GEMM does after its loop over K: scales and zero points, the correction h @ up, output scale and bias, and y.
#pragma once
#include "../include/qe_edge/args.h"
#include "main_decode.cuh"
#include "prefill_loader.cuh"

namespace qe {

// Where the correction's operands are in shared memory, in place of the stages: h of the block's rows, and the words of `up` that its 128 columns have
// of the shared expert. Rows of h are 16 bytes longer than they need to be, so that eight of them lie in different banks.
struct Operands {
  int row_bytes, up, step_bytes, bytes;  // `up` is where its words begin, one step of 16 ranks after the other
  QE_DEV Operands(const MainArgs& p, int rows) {
    row_bytes = OperandRowBytes(p.shared_tiles + p.routed_tiles);
    up = rows * row_bytes;
    step_bytes = UpStepBytes(p.up_bits);
    bytes = up + p.shared_tiles * step_bytes;
  }
};

template <class T>
QE_DEV void copy_operands(const MainArgs& p, int m0, int n0, int rows, unsigned char* shared) {
  const Operands to(p, rows);
  const int pieces = 2 * (p.shared_tiles + p.routed_tiles), threads_of_row = block_threads() / rows;
  const int row = thread_id() / threads_of_row, token = token_of(p, m0 + row);
  for (int piece = thread_id() % threads_of_row; piece < pieces; piece += threads_of_row)
    cp_async16(shared + row * to.row_bytes + piece * 16, static_cast<const T*>(p.h) + static_cast<size_t>(token) * (pieces * 8) + piece * 8);
  const int log2_pair = 3 + p.up_bits / 8, last_pair = p.Np / 16 - 1;  // 8, 16 or 32 pieces a pair of column tiles
  for (int step = 0; step < p.shared_tiles; ++step)
    for (int piece = thread_id(); piece < to.step_bytes / 16; piece += block_threads()) {
      const int own = n0 / 16 + (piece >> log2_pair), pair = own < last_pair ? own : last_pair;
      const size_t from = (static_cast<size_t>(step * (p.Np / 16) + pair) << log2_pair) + (piece & ((1 << log2_pair) - 1));
      cp_async16(shared + to.up + step * to.step_bytes + piece * 16, static_cast<const uint8_t*>(p.up) + from * 16);
    }
}

// h @ up for the 64 rows of a warp and the columns from `wn` of its block on, 16 ranks at a time; the words of a routed expert's
// `up` come from memory. Rows come sorted by expert, so most warps see one or two.
template <class T, int Tiles>
QE_DEV void prefill_lowrank(const MainArgs& p, const unsigned char* operands, int block_rows, int wm, int wn, int m0, int column0,
                            float (&out)[kRowTiles][Tiles][4]) {
  const int lane = thread_id() & 31;
  const Operands at(p, block_rows);
  const unsigned char* rows = operands + (wm + (lane & 15)) * at.row_bytes + (lane >> 4) * 16;
  int expert[kRowTiles][2] = {};
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h)
      if (p.E) expert[i][h] = p.expert[token_of(p, m0 + wm + i * 16 + h * 8 + (lane >> 2))];
  for (int e = -1; e < p.E; ++e) {
    bool wanted = e < 0;
    QE_UNROLL
    for (int i = 0; i < kRowTiles; ++i) wanted = wanted || expert[i][0] == e || expert[i][1] == e;
    if (!ballot(wanted)) continue;
    const int tiles = e < 0 ? p.shared_tiles : p.routed_tiles;
    const int h0 = e < 0 ? 0 : p.shared_tiles, up0 = p.shared_tiles + e * p.routed_tiles;
    for (int step = 0; step < tiles; ++step) {
      UpWords words[Tiles / 2];
      QE_UNROLL
      for (int j = 0; j < Tiles / 2; ++j) {
        if (e < 0) {
          load_up(operands + at.up + step * at.step_bytes, p.up_bits, wn / 16 + j, lane, words[j]);
        } else {
          const int own = column0 / 16 + j, last_pair = p.Np / 16 - 1, pair = own < last_pair ? own : last_pair;
          load_up(p.up, p.up_bits, static_cast<size_t>(up0 + step) * (p.Np / 16) + pair, lane, words[j]);
        }
      }
      uint32_t x[kRowTiles][4];
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrix(x[i], rows + i * 16 * at.row_bytes + (h0 + step) * 32);
        QE_UNROLL
        for (int h = 0; h < 2; ++h)
          if (e >= 0 && expert[i][h] != e) x[i][h] = 0u, x[i][2 + h] = 0u;
      }
      QE_UNROLL
      for (int j = 0; j < Tiles; j += 2) {
        uint32_t u[4];
        up_fragments<T>(words[j / 2], p.up_bits, u);
        QE_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          mma_16<T>(out[i][j], x[i], u[0], u[1]);
          mma_16<T>(out[i][j + 1], x[i], u[2], u[3]);
        }
      }
    }
  }
}

// Four words of each of four neighbouring lanes: lane i of them gets the i-th word of all four.
QE_DEV void transpose_four(uint32_t (&w)[4]) {
  const int lane = thread_id() & 3;
  QE_UNROLL
  for (int bit = 1; bit < 4; bit <<= 1)
    QE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t got = shuffle_xor(upper ? w[i] : w[i | bit], bit);
      w[i] = upper ? got : w[i], w[i | bit] = upper ? w[i | bit] : got;
    }
}

// y of a warp's 64 rows from m on: output scale and bias, then 16 bytes of each of four lanes to a row at once.
template <class T, int Tiles>
QE_DEV void store_columns(const MainArgs& p, int m0, const int (&token)[kRowTiles][2], int column0,
                          const float (&out)[kRowTiles][Tiles][4]) {
  const int lane = thread_id() & 31;
  QE_UNROLL
  for (int j = 0; j < Tiles; j += 4) {
    float scale[4][2], bias[4][2];
    QE_UNROLL
    for (int t = 0; t < 4; ++t)
      QE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int at = column0 + (j + t) * 8, n = (at < p.Np ? at : p.Np - 8) + (lane & 3) * 2 + c;
        scale[t][c] = p.columns[p.Np + n], bias[t][c] = p.columns[2 * p.Np + n];
      }
    const int n = column0 + (j + (lane & 3)) * 8;
    QE_UNROLL
    for (int i = 0; i < kRowTiles; ++i)
      QE_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4];
        QE_UNROLL
        for (int t = 0; t < 4; ++t) {
          const float* v = out[i][j + t] + 2 * h;
          words[t] = pack2<T>(v[0] * scale[t][0] + bias[t][0], v[1] * scale[t][1] + bias[t][1]);
        }
        transpose_four(words);
        const int m = m0 + i * 16 + h * 8 + (lane >> 2);
        if (m < p.M && n < p.N)
          store16(static_cast<T*>(p.y) + static_cast<size_t>(token[i][h]) * p.N + n, {{words[0], words[1], words[2], words[3]}});
      }
  }
}

// What follows the loop over K: scales, zero points of whole columns, h @ up, output scale and bias; y of a warp's 64 rows from
// m0 + wm and its columns from n0 + wn on.
template <class T, int Mode, int Groups, bool Zeros, class Acc, int Tiles>
QE_DEV void finish_prefill(const MainArgs& p, unsigned char* shared, int rows, int m0, int n0, int wm, int wn,
                           const Acc (&acc)[kRowTiles][Tiles][4]) {
  const int lane = thread_id() & 31, column0 = n0 + wn;
  cp_async_wait<0>();
  release_next();  // not before: blocks of the next launch that come while all are busy would gather on few multiprocessors
  const bool corrects = p.shared_tiles + p.routed_tiles > 0;
  if (corrects) {
    block_sync();  // nobody reads the stages any more
    copy_operands<T>(p, m0, n0, rows, shared);
    cp_async_commit();
  }

  constexpr bool kWholeColumn = Zeros && Groups == 0;
  constexpr float kUnit = Mode == kInt8 && Groups == 2 && Zeros ? kSmallUnit : 1.f;
  int token[kRowTiles][2];
  float out[kRowTiles][Tiles][4];
  int z[2][Tiles / 4][4] = {};  // [column & 1][block of 32 columns][column tile]
  QE_UNROLL
  for (int block = 0; kWholeColumn && block < Tiles / 4; ++block) {
    const int own = column0 + block * kBlockColumns, at = own < p.Np ? own : p.Np - kBlockColumns;
    const u32x2 zeros = load8(p.zeros + at + (lane & 3) * 8);
    unpack_zeros(zeros.v[0], z[0][block]);
    unpack_zeros(zeros.v[1], z[1][block]);
  }
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h) {
      token[i][h] = token_of(p, m0 + wm + i * 16 + h * 8 + (lane >> 2));
      const float sx = p.token_scale[token[i][h]];
      const float sum = kWholeColumn ? static_cast<const float*>(p.sums)[token[i][h]] : 0.f;
      QE_UNROLL
      for (int j = 0; j < Tiles; ++j) {
        const int at = column0 + j * 8, n = (at < p.Np ? at : p.Np - 8) + (lane & 3) * 2;
        QE_UNROLL
        for (int c = 0; c < 2; ++c)
          out[i][j][2 * h + c] = without_zero<Mode, kWholeColumn>(acc[i][j][2 * h + c], z[c][j / 4][j % 4], sum) *
                                 (p.columns[n + c] * sx * kUnit);
      }
    }
  if (corrects) {
    cp_async_wait<0>();
    block_sync();
    prefill_lowrank<T>(p, shared, rows, wm, wn, m0, column0, out);
  }
  store_columns<T>(p, m0 + wm, token, column0, out);
}

}  // namespace qe
