// One chunk of 128 rows in `main` of few tokens: weights against activations, with their scales and zero points.
#pragma once
#include "../include/qe_edge/args.h"
#include "prepare.cuh"
#include "unpack.cuh"

namespace qe {

constexpr int kDecodeColumns = kBlockColumns;  // output columns of a set of warps
constexpr int kDecodeTiles = 2;                // of 16 columns each

// What one lane reads of a chunk. Of at most 8 tokens x and its sums are in shared memory, from the block's first chunk on.
template <int Bits, int Mode, int Groups, int Tokens8>
struct Cursor {
  static constexpr int kRowBytes = Mode == kInt8 ? kChunk : kChunk * 2;  // of one token in one chunk
  const uint8_t *scales, *zeros, *sums;
  const uint8_t* x;  // one place for all tokens: theirs are at constant distances (store_words in prepare.cuh)
  int x_step;

  // Chunk `chunk` of `block` of 32 columns; `act` and `group_sums` start at chunk `first`.
  template <class Args>
  QE_DEV Cursor(const Args& p, int block, int chunk, int first, const uint8_t* act, const uint8_t* group_sums, int count) {
    const int lane = thread_id() & 31, token = Tokens8 == 1 && (lane >> 2) >= count ? count - 1 : lane >> 2;
    const size_t at = static_cast<size_t>(block) * p.chunks + chunk;
    scales = static_cast<const uint8_t*>(p.scales) + at * (Groups * kBlockColumns * 2) + (lane >> 2) * 8;
    zeros = p.zeros + at * (Groups * kBlockColumns) + (lane >> 2) * 4;
    sums = group_sums + static_cast<size_t>(chunk - first) * (Groups * kGroupTokens * 4) +
           (Mode == kInt8 && Groups == 1 ? (lane & 3) * 16 : (lane >> 2) * 8);
    if (Mode == kInt8 && Groups == 2) {  // the group that this lane has in decode_two_groups_s8
      zeros += (lane >> 1 & 1) * kBlockColumns;
      sums += (lane >> 1 & 1) * kGroupTokens * 4;
    }
    const int slots = Tokens8 == 1 ? count : kGroupTokens;
    x_step = slots * kRowBytes;
    x = act + static_cast<size_t>(chunk - first) * x_step + token * kRowBytes + (lane & 3) * (kRowBytes / 4);
  }
  QE_DEV void next() {
    scales += Groups * kBlockColumns * 2;
    zeros += Groups * kBlockColumns;
    sums += Groups * kGroupTokens * 4;
    x += Tokens8 == 1 ? x_step : kGroupTokens * kRowBytes;
  }
  QE_DEV u32x4 load_x(int t, int piece) const { return load16(x + t * 8 * kRowBytes + piece * 16); }
};

// Scales and zero points of the lane's columns c, c + 8, c + 16 and c + 24, which prepack put side by side.
QE_DEV void lane_scales(const u32x2& pairs, float (&s)[4]) {
  QE_UNROLL
  for (int i = 0; i < 4; ++i) s[i] = to_float(f16_t{static_cast<uint16_t>(pairs.v[i / 2] >> (16 * (i & 1)))});
}
// The sums of one token and of the token 8 after it, which `prepare` puts side by side.
template <int Tokens8>
QE_DEV u32x2 load_sums(const uint8_t* sums) {
  if constexpr (Tokens8 == 2) return load8(sums);
  return {{load4(sums), 0u}};
}
QE_DEV void unpack_zeros(uint32_t zeros, int (&z)[4]) {
  z[0] = zero_of<0>(zeros), z[1] = zero_of<1>(zeros), z[2] = zero_of<2>(zeros), z[3] = zero_of<3>(zeros);
}

// One 128-row chunk against int8 activations. Groups: scale rows in the chunk, 0 = the scale is per output channel.
template <int Bits, int Groups, bool Zeros, int Tokens8, class Acc>
QE_DEV void decode_chunk_s8(const Cursor<Bits, kInt8, Groups, Tokens8>& at, const BlockWords<Bits>& w,
                            Acc (&acc)[kDecodeTiles][Tokens8][4]) {
  int sum[kDecodeTiles][Tokens8][4];
  if (Groups == 1) {
    int z[4] = {0, 0, 0, 0};
    if (Zeros) unpack_zeros(load4(at.zeros), z);
    u32x4 xs{};  // sums of the two tokens that this lane's accumulators belong to, and of those 8 after them
    if constexpr (Zeros && Tokens8 == 2) {
      xs = load16(at.sums);
    } else if constexpr (Zeros) {
      const u32x2 two = load8(at.sums);
      xs.v[0] = two.v[0], xs.v[1] = two.v[1];
    }
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) {
      QE_UNROLL
      for (int i = 0; i < kDecodeTiles; ++i)
        QE_UNROLL
        for (int j = 0; j < 4; ++j)
          sum[i][t][j] = kMagicBits - (Zeros ? z[2 * i + j / 2] * static_cast<int>(xs.v[2 * t + (j & 1)]) : 0);
    }
  }
  QE_UNROLL
  for (int half = 0; half < 2; ++half) {
    u32x4 x[Tokens8];  // two k32 steps of two registers
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) x[t] = at.load_x(t, half);
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int step = 0; step < 2; ++step) {
        uint32_t a[4];
        int8_fragment<Zeros>(w, 2 * i, half, step, a);
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t) {
          if constexpr (Groups == 0) {
            mma_s8(acc[i][t], a, x[t].v[2 * step], x[t].v[2 * step + 1], acc[i][t]);
          } else {
            mma_s8(sum[i][t], a, x[t].v[2 * step], x[t].v[2 * step + 1], sum[i][t]);
          }
        }
      }
  }
  if constexpr (Groups == 1) {
    float s[4];
    lane_scales(load8(at.scales), s);
    QE_UNROLL
    for (int i = 0; i < kDecodeTiles; ++i)
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j)
          acc[i][t][j] += (int_bits_to_float(sum[i][t][j]) - kMagic) * s[2 * i + j / 2];
  }
}

// The same with two groups, which join the accumulators together. Zero points are taken off there and not from the
// sums: minus the sum of x, times zero point times scale, on the tensor cores. Either factor needs more than the 11 bits
// of an fp16 and comes as two, so that the eight rows of the short product hold both groups: lanes 0 and 1 of four have
// the first one. That product comes last because ptxas for sm_120 would spill otherwise.
template <int Bits, bool Zeros, int Tokens8>
QE_DEV void decode_two_groups_s8(const Cursor<Bits, kInt8, 2, Tokens8>& at, const BlockWords<Bits>& w,
                                 float (&acc)[kDecodeTiles][Tokens8][4]) {
  const u32x2 scales[2] = {load8(at.scales), load8(at.scales + kBlockColumns * 2)};
  u32x2 sums{};
  if constexpr (Zeros) sums = load_sums<Tokens8>(at.sums);
  float s[2][4], start[4];
  lane_scales(scales[0], s[0]);
  lane_scales(scales[1], s[1]);
  QE_UNROLL
  for (int c = 0; c < 4; ++c) start[c] = pair_start<Zeros>(s[0][c], s[1][c]);
  QE_UNROLL
  for (int i = 0; i < kDecodeTiles; ++i) {
    int sum[2][Tokens8][4];
    QE_UNROLL
    for (int half = 0; half < 2; ++half) {
      u32x4 x[Tokens8];
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t) x[t] = at.load_x(t, half);
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t)
        QE_UNROLL
        for (int j = 0; j < 4; ++j) sum[half][t][j] = start_bits<Zeros>();
      QE_UNROLL
      for (int step = 0; step < 2; ++step) {
        uint32_t a[4];
        int8_fragment<Zeros>(w, 2 * i, half, step, a);
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          mma_s8(sum[half][t], a, x[t].v[2 * step], x[t].v[2 * step + 1], sum[half][t]);
      }
    }
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t)
      QE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int c = 2 * i + j / 2;
        acc[i][t][j] += pair_of_sums(sum[0][t][j], sum[1][t][j], s[0][c], s[1][c], start[c]);
      }
  }
  if constexpr (Zeros) {
    const int lane = thread_id() & 31;
    const bool second = lane & 2;
    const uint32_t zeros = load4(at.zeros);  // of this lane's group, as are the sums
    uint32_t a[4];
    zero_times_scale<0>(zeros, second ? scales[1].v[0] : scales[0].v[0], a[0], a[1]);
    zero_times_scale<2>(zeros, second ? scales[1].v[1] : scales[0].v[1], a[2], a[3]);
    QE_UNROLL
    for (int t = 0; t < Tokens8; ++t) {
      const uint32_t xs = twice_half(sums.v[t], lane & 1);
      QE_UNROLL
      for (int i = 0; i < kDecodeTiles; ++i) mma_f16_k8(acc[i][t], a[2 * i], a[2 * i + 1], xs);
    }
  }
}

// One chunk against 16-bit activations, in pieces of 32 rows; a part has one scale. Two groups take 16 columns after the
// other, which needs fewer registers. The short products come last for 4 bits, because the NOPs that ptxas for sm_120
// puts between neighbouring matrix instructions are fewest then, and first elsewhere, where it would spill otherwise.
template <int Bits, int Groups, int Tokens8>
QE_DEV void decode_chunk_16(const Cursor<Bits, k16Bit, Groups, Tokens8>& at, const BlockWords<Bits>& w,
                            float (&acc)[kDecodeTiles][Tokens8][4]) {
  constexpr int kParts = Groups == 2 ? 2 : 1, kPieces = 4 / kParts;
  constexpr int kZeroStep = Groups == 1 && Bits == 4 ? 2 * kPieces - 1 : 0;
  QE_UNROLL
  for (int part = 0; part < kParts; ++part) {
    u32x4 x[kPieces][Tokens8];  // two k16 steps of two registers
    QE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece)
      QE_UNROLL
      for (int t = 0; t < Tokens8; ++t) x[piece][t] = at.load_x(t, part * kPieces + piece);
    uint32_t zeros = 0;
    u32x2 sums{}, scales{};
    if constexpr (Groups != 0) {
      zeros = load4(at.zeros + part * kBlockColumns);
      sums = load_sums<Tokens8>(at.sums + part * kGroupTokens * 4);
      scales = load8(at.scales + part * kBlockColumns * 2);
    }
    float sum[kDecodeTiles][Tokens8][4];
    QE_UNROLL
    for (int n = 0; n < kDecodeTiles * kPieces; ++n) {
      const int i = Groups == 2 ? n / kPieces : n % kDecodeTiles;
      const int piece = Groups == 2 ? n % kPieces : n / kDecodeTiles, r = (part * kPieces + piece) * 4;
      if (Groups != 0 && piece == 0) {
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          QE_UNROLL
          for (int j = 0; j < 4; ++j) sum[i][t][j] = 0.f;
      }
      QE_UNROLL
      for (int step = 0; step < 2; ++step) {
        if (Groups != 0 && piece * 2 + step == kZeroStep) {
          const uint32_t z0 = i ? zero_pair<2>(zeros) : zero_pair<0>(zeros);
          const uint32_t z1 = i ? zero_pair<3>(zeros) : zero_pair<1>(zeros);
          QE_UNROLL
          for (int t = 0; t < Tokens8; ++t) mma_f16_k8(sum[i][t], z0, z1, sums.v[t]);
        }
        uint32_t u[2], v[2];
        unpack_step_decode<Bits>(w, 2 * i, r + step * 2, u);
        unpack_step_decode<Bits>(w, 2 * i + 1, r + step * 2, v);
        const uint32_t a[4] = {u[0], v[0], u[1], v[1]};
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          mma_16<f16_t>(Groups == 0 ? acc[i][t] : sum[i][t], a, x[piece][t].v[2 * step], x[piece][t].v[2 * step + 1]);
      }
      if (Groups != 0 && piece == kPieces - 1) {
        const f16_t lower{static_cast<uint16_t>(scales.v[i])}, upper{static_cast<uint16_t>(scales.v[i] >> 16)};
        const float s[2] = {to_float(lower), to_float(upper)};
        QE_UNROLL
        for (int t = 0; t < Tokens8; ++t)
          QE_UNROLL
          for (int j = 0; j < 4; ++j) acc[i][t][j] += sum[i][t][j] * s[j / 2];
      }
    }
  }
}

}  // namespace qe
