// Launch 3 for M <= 16. Packed weights are the A operand (16 output columns x 128 rows per pair of 16-byte loads) and go
// from DRAM to registers; tokens are the 8-wide operand. Warps split K; their sums meet once, in a fixed order.
#pragma once
#include "../include/qe_edge/args.h"
#include "unpack.cuh"

namespace qe {

constexpr int kDecodeColumns = 32;  // output columns of one block
constexpr int kDecodeTiles = 2;     // of 16 columns each

template <class T>
QE_DEV float group_scale(const MainArgs& p, size_t row, int column) {
  return to_float(T{load2(static_cast<const uint16_t*>(p.scales) + row * p.Np + column)});
}
QE_DEV uint32_t group_zero(const MainArgs& p, size_t row, int column) { return p.zeros[row * p.Np + column]; }

// One 128-row chunk against int8 activations. Groups: scale rows in the chunk, 0 = the scale is per output channel.
template <class T, int Groups, bool Zeros, int Tokens8, class Acc>
QE_DEV void decode_chunk_s8(const MainArgs& p, int chunk, int column, const u32x4 (&w)[kDecodeTiles][2],
                            const int (&token)[Tokens8], Acc (&acc)[kDecodeTiles][Tokens8][4]) {
  const int lane = thread_id() & 31;
  uint32_t x[Tokens8][8];  // four k32 steps of two registers
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t) {
    const int8_t* row = static_cast<const int8_t*>(p.act) + static_cast<size_t>(token[t]) * p.act_stride;
    QE_UNROLL
    for (int c = 0; c < 8; ++c) x[t][c] = load4(row + chunk * kChunk + c * 16 + (lane & 3) * 4);
  }
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i) {
    const int c0 = column + i * 16, c8 = c0 + 8;
    int sum[Tokens8][4];
    QE_UNROLL
    for (int half = 0; half < 2; ++half) {
      constexpr int kRows = Groups == 0 ? 1 : Groups;
      const size_t row = Groups == 0 ? 0 : static_cast<size_t>(chunk) * kRows + (Groups == 2 ? half : 0);
      uint32_t z0 = 0, z8 = 0;
      if (Zeros) z0 = group_zero(p, row, c0) * 0x01010101u, z8 = group_zero(p, row, c8) * 0x01010101u;
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t) {
        QE_UNROLL
        for (int step = 0; step < 2; ++step) {
          const uint32_t u0 = w[i][0].v[2 * step], u1 = w[i][0].v[2 * step + 1];
          const uint32_t v0 = w[i][1].v[2 * step], v1 = w[i][1].v[2 * step + 1];
          uint32_t a[4];
          a[0] = half ? unpack_high<Zeros>(u0, z0) : unpack_low<Zeros>(u0, z0);
          a[1] = half ? unpack_high<Zeros>(v0, z8) : unpack_low<Zeros>(v0, z8);
          a[2] = half ? unpack_high<Zeros>(u1, z0) : unpack_low<Zeros>(u1, z0);
          a[3] = half ? unpack_high<Zeros>(v1, z8) : unpack_low<Zeros>(v1, z8);
          const uint32_t b0 = x[t][half * 4 + 2 * step], b1 = x[t][half * 4 + 2 * step + 1];
          if constexpr (Groups == 0) {
            mma_s8(acc[i][t], a, b0, b1, acc[i][t]);
          } else if (step == 0 && (half == 0 || Groups == 2)) {
            const int magic[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
            mma_s8(sum[t], a, b0, b1, magic);
          } else {
            mma_s8(sum[t], a, b0, b1, sum[t]);
          }
        }
      }
      if constexpr (Groups != 0) {
        if (half == 0 && Groups == 1) continue;
        const float s0 = group_scale<T>(p, row, c0), s8 = group_scale<T>(p, row, c8);
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          QE_UNROLL
          for (int j = 0; j < 4; ++j) acc[i][t][j] += (int_bits_to_float(sum[t][j]) - kMagic) * (j < 2 ? s0 : s8);
      }
    }
  }
}

// One chunk against 16-bit activations: two halves of 64 rows, each two blocks of 32.
template <class T, int Groups, int Tokens8>
QE_DEV void decode_chunk_16(const MainArgs& p, int chunk, int column, const u32x4 (&w)[kDecodeTiles][2],
                            const int (&token)[Tokens8], float (&acc)[kDecodeTiles][Tokens8][4]) {
  const int lane = thread_id() & 31;
  QE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const size_t row =
        Groups == 0 ? 0 : static_cast<size_t>(chunk) * p.groups_per_chunk + half * (p.groups_per_chunk - 1);
    uint32_t x[Tokens8][8];  // four k16 steps of two registers
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) {
      const T* row = static_cast<const T*>(p.act) + static_cast<size_t>(token[t]) * p.act_stride;
      QE_UNROLL
      for (int c = 0; c < 8; ++c) x[t][c] = load4(row + chunk * kChunk + half * 64 + c * 8 + (lane & 3) * 2);
    }
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i) {
      const int c0 = column + i * 16, c8 = c0 + 8;
      const Unpack16<T> unpack0(group_zero(p, row, c0)), unpack8(group_zero(p, row, c8));
      float sum[Tokens8][4];
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j) sum[t][j] = 0.f;
      QE_UNROLL
      for (int block = 0; block < 2; ++block) {
        uint32_t u[4], v[4];  // [step * 2 + register]
        unpack0(w[i][0].v[half * 2 + block], u);
        unpack8(w[i][1].v[half * 2 + block], v);
        QE_UNROLL
        for (int step = 0; step < 2; ++step) {
          const uint32_t a[4] = {u[2 * step], v[2 * step], u[2 * step + 1], v[2 * step + 1]};
          QE_UNROLL
          for (int t = 0; t < Tokens8; ++t)
            mma_16<T>(Groups == 0 ? acc[i][t] : sum[t], a, x[t][block * 4 + 2 * step], x[t][block * 4 + 2 * step + 1]);
        }
      }
      if (Groups != 0) {
        const float s0 = group_scale<T>(p, row, c0), s8 = group_scale<T>(p, row, c8);
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          QE_UNROLL
          for (int j = 0; j < 4; ++j) acc[i][t][j] += sum[t][j] * (j < 2 ? s0 : s8);
      }
    }
  }
}

// Two neighbouring ranks of one token's h: the slices of K are summed in their order, then rounded to T.
template <class T>
QE_DEV uint32_t load_h(const MainArgs& p, int token, int rank_at) {
  const int rank = 16 * (p.shared_tiles + p.routed_tiles);
  float lo = 0.f, hi = 0.f;
  for (int s = 0; s < p.splits; ++s) {
    const u32x2 v = load8(p.partial + (static_cast<size_t>(s) * p.M + token) * rank + rank_at);
    lo += int_bits_to_float(static_cast<int>(v.v[0]));
    hi += int_bits_to_float(static_cast<int>(v.v[1]));
  }
  return pack2<T>(lo, hi);
}

// h @ up, on the tensor cores: 16 ranks at a time, the steps dealt out to the warps.
template <class T, int Tokens8>
QE_DEV void decode_lowrank(const MainArgs& p, int tile0, const int (&token)[Tokens8],
                           float (&out)[kDecodeTiles][Tokens8][4]) {
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, pair = (lane & 3) * 2;
  uint32_t hit = 0;
  for (int m = 0; p.E && m < p.M; ++m) hit |= 1u << p.expert[m];
  for (int e = -1; e < p.E; ++e) {
    if (e >= 0 && !((hit >> e) & 1u)) continue;
    const int tiles = e < 0 ? p.shared_tiles : p.routed_tiles;
    const int h0 = e < 0 ? 0 : p.shared_tiles, up0 = e < 0 ? 0 : p.shared_tiles + e * p.routed_tiles;
    for (int step = warp; step < tiles; step += warps) {
      uint32_t b[Tokens8][2];
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t) {
        const bool routed_here = e < 0 || p.expert[token[t]] == e;
        b[t][0] = routed_here ? load_h<T>(p, token[t], (h0 + step) * 16 + pair) : 0u;
        b[t][1] = routed_here ? load_h<T>(p, token[t], (h0 + step) * 16 + pair + 8) : 0u;
      }
      QE_UNROLL
      for (int i = 0; i < kDecodeTiles; ++i) {
        const size_t at = static_cast<size_t>(up0 + step) * (p.Np / 8) + tile0 + i * 2;
        const u32x2 u = load_up<T>(p.up, p.up_is_int8, at, lane), v = load_up<T>(p.up, p.up_is_int8, at + 1, lane);
        const uint32_t a[4] = {u.v[0], v.v[0], u.v[1], v.v[1]};
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t) mma_16<T>(out[i][t], a, b[t][0], b[t][1]);
      }
    }
  }
}

template <bool Integer>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<true> {
  using type = int;
};

template <class T, int Mode, int Groups, bool Zeros, int Tokens8>
QE_DEV void main_decode(const MainArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [warps][tiles][Tokens8][4][32]
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int n0 = block_x() * kDecodeColumns, column = n0 + (lane >> 2), chunks = p.Kp / kChunk;
  int token[Tokens8];
  QE_UNROLL
  for (int t = 0; t < Tokens8; ++t) {
    const int m = t * 8 + (lane >> 2);
    token[t] = m < p.M ? m : p.M - 1;  // the copy's result is not stored
  }

  typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kDecodeTiles][Tokens8][4];
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i)
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][t][j] = 0;
  const uint8_t* weight = p.weight + static_cast<size_t>(n0 / 8) * kTileBytes + lane * 16;
  const size_t chunk_bytes = static_cast<size_t>(p.Np / 8) * kTileBytes;
  QE_UNROLL_BY_2  // two chunks of weights in flight hide the latency of DRAM
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    u32x4 w[kDecodeTiles][2];
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int j = 0; j < 2; ++j) w[i][j] = load16_stream(weight + chunk * chunk_bytes + (i * 2 + j) * kTileBytes);
    if constexpr (Mode == kInt8) {
      decode_chunk_s8<T, Groups, Zeros, Tokens8>(p, chunk, column, w, token, acc);
    } else {
      decode_chunk_16<T, Groups, Tokens8>(p, chunk, column, w, token, acc);
    }
  }

  float out[kDecodeTiles][Tokens8][4];
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i)
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int m = t * 8 + (lane & 3) * 2 + (j & 1);
        const float sx = Mode == kInt8 ? p.token_scale[m < p.M ? m : p.M - 1] : 1.f;
        out[i][t][j] = static_cast<float>(acc[i][t][j]) * (p.columns[column + i * 16 + (j >> 1) * 8] * sx);
      }
  decode_lowrank<T, Tokens8>(p, n0 / 8, token, out);

  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i)
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) sums[(((warp * kDecodeTiles + i) * Tokens8 + t) * 4 + j) * 32 + lane] = out[i][t][j];
  block_sync();
  for (int o = thread_id(); o < kDecodeColumns * p.M; o += block_threads()) {
    const int c = o % kDecodeColumns, m = o / kDecodeColumns, n = n0 + c;
    if (n >= p.N) continue;
    const int j = ((c >> 3) & 1) * 2 + (m & 1), at = (c & 7) * 4 + ((m & 7) >> 1);
    float v = 0.f;
    for (int w = 0; w < warps; ++w) v += sums[(((w * kDecodeTiles + (c >> 4)) * Tokens8 + (m >> 3)) * 4 + j) * 32 + at];
    store2(static_cast<T*>(p.y) + static_cast<size_t>(m) * p.N + n,
           from_float<T>(v * p.columns[p.Np + n] + p.columns[2 * p.Np + n]).bits);
  }
}

}  // namespace qe
