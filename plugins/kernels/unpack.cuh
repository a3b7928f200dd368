// From packed bytes to tensor-core operands. The orders below are those of prepack/layout.py.
#pragma once
#include "prim.cuh"

namespace qe {

constexpr int kChunk = 128;           // rows of K in one packed weight tile
constexpr int kTileBytes = 512;       // 128 rows x 8 columns of 4-bit weights
constexpr int kBlockColumns = 32;     // columns whose weights, scales and zero points are together
constexpr int kBlockBytes = 4 * kTileBytes;
constexpr int kInt8 = 0, k16Bit = 1;  // activation modes of `main`

// int32 sums of one group are read as floats: 1.5 * 2^23 as the start value makes the bit pattern of the sum that of
// the float 12582912 + sum, exact while |sum| < 2^22 (16*8 or 8*15 times 128 times 128 rows = 2^21). It saves a
// quarter-rate I2F.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// int8 activations. Symmetric weights become 16 * q: masking only. Weights with zero points are codes without sign, and
// their words are stored turned left by 3 bits, so that 8 * code (at most 120) is masking only as well. The sixteenth
// or eighth is in the column scale.
template <bool Zeros>
QE_DEV uint32_t low_codes(uint32_t w) {
  return Zeros ? w & 0x78787878u : (w << 4) & 0xF0F0F0F0u;
}
template <bool Zeros>
QE_DEV uint32_t high_codes(uint32_t w) {
  return Zeros ? rotate_right(w, 4) & 0x78787878u : w & 0xF0F0F0F0u;
}

// 8 * (code - zero), four at a time: the set top bits keep the subtraction from borrowing across bytes, and flipping
// them back gives two's complement.
QE_DEV uint32_t minus_zero(uint32_t word, uint32_t zero) {
  return (and_or(word, 0x78787878u, 0x80808080u) - zero) ^ 0x80808080u;
}
template <bool High>
QE_DEV uint32_t centred_codes(uint32_t w, uint32_t zero) {
  return minus_zero(High ? rotate_right(w, 4) : w, zero);
}

// 16-bit activations: four codes of one word become the two registers of a k16 step by masking only, and the four that
// stand 8 bits higher those of the next step. A code in the
// low bits of an fp16 is the subnormal code * 2^-24; four bits higher it is 16 times that, which `prepare` makes up for
// in x. Tensor cores multiply subnormal fp16 numbers exactly (PTX ISA, mma, "subnormal numbers are supported"; Fasi,
// Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021); the self-test would notice
// one that does not. 2^24 is in the column scale.
QE_DEV void unpack_16(uint32_t w, uint32_t (&r)[2]) {
  r[0] = w & 0x000F000Fu;
  r[1] = w & 0x00F000F0u;
}
constexpr float kCodeUnit = 1.f / 16777216.f;

// The zero points of four columns that are 8 apart, byte by byte.
template <int Column>
QE_DEV int zero_of(uint32_t zeros) {
  return static_cast<int>(pick_bytes<0x4440 + Column>(zeros));
}
// One of them as a pair of fp16 subnormals, the unit of `unpack_16`.
template <int Column>
QE_DEV uint32_t zero_pair(uint32_t zeros) {
  return pick_bytes<0x4040 + 0x101 * Column>(zeros);
}
// One of them in every byte.
template <int Column>
QE_DEV uint32_t zero_bytes(uint32_t zeros) {
  return pick_bytes<0x1111 * Column>(zeros);
}

// Zero point and scale of one column, in pairs, for weights that become numbers of their own (prefill). Scales are so
// large (prepack/pack.py) that the product of a subnormal difference and a scale is a normal fp16, rounded once.
struct GroupPairs {
  uint32_t zero, zero_times_16, scale;
  QE_DEV void dequantize(uint32_t (&r)[2]) const {
    r[0] = mul_f16x2(sub_f16x2(r[0], zero), scale);
    r[1] = mul_f16x2(sub_f16x2(r[1], zero_times_16), scale);
  }
};
template <int Column>
QE_DEV GroupPairs pairs_of(const u32x2& scales, uint32_t zeros) {
  return {zero_pair<Column>(zeros), zero_pair<Column>(zeros << 4),
          pick_bytes<Column % 2 ? 0x3232 : 0x1010>(scales.v[Column / 2])};
}
QE_DEV void group_pairs(const u32x2& scales, uint32_t zeros, GroupPairs (&pairs)[4]) {
  pairs[0] = pairs_of<0>(scales, zeros), pairs[1] = pairs_of<1>(scales, zeros);
  pairs[2] = pairs_of<2>(scales, zeros), pairs[3] = pairs_of<3>(scales, zeros);
}

// Two int8 values (bytes 2*half and 2*half + 1) as two 16-bit floats. Planting the byte in the mantissa of 2^23 is
// full rate, unlike a conversion.
template <class T>
QE_DEV uint32_t int8_pair(uint32_t word, int half) {
  const uint32_t biased = (word ^ 0x80808080u) >> (16 * half);
  const float lo = int_bits_to_float(static_cast<int>(0x4B000000u | (biased & 0xFFu))) - 8388736.0f;
  const float hi = int_bits_to_float(static_cast<int>(0x4B000000u | ((biased >> 8) & 0xFFu))) - 8388736.0f;
  return pack2<T>(lo, hi);
}

// The two registers of one [16 ranks x 8 columns] tile of `up`; `tile` counts (rank step, column tile) pairs.
template <class T>
QE_DEV u32x2 load_up(const void* up, bool is_int8, size_t tile, int lane) {
  if (!is_int8) return load8(static_cast<const uint8_t*>(up) + (tile * 32 + lane) * 8);
  const uint32_t w = load4(static_cast<const uint8_t*>(up) + (tile * 32 + lane) * 4);
  return {{int8_pair<T>(w, 0), int8_pair<T>(w, 1)}};
}

}  // namespace qe
