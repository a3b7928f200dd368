// From packed bytes to tensor-core operands. The orders below are those of prepack/layout.py.
#pragma once
#include "prim.cuh"

namespace qe {

constexpr int kChunk = 128;           // rows of K in one packed weight tile
constexpr int kTileBytes = 512;       // 128 rows x 8 columns of 4-bit weights
constexpr int kInt8 = 0, k16Bit = 1;  // activation modes of `main`

// int32 sums of one group are read as floats: 1.5 * 2^23 as the start value makes the bit pattern of the sum that of
// the float 12582912 + sum, exact while |sum| < 2^22 (16*8 * 128 * 128 rows = 2^21). It saves a quarter-rate I2F.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// Symmetric weights, four at a time, as 16 * q: masking only, because 1/16 is in the column scale.
QE_DEV uint32_t low_times_16(uint32_t w) { return (w << 4) & 0xF0F0F0F0u; }
QE_DEV uint32_t high_times_16(uint32_t w) { return w & 0xF0F0F0F0u; }

// Asymmetric weights as q - zero. Nibbles hold q + 8, `zero` holds zero + 8 in every byte; the set top bits keep the
// subtraction from borrowing across bytes, and flipping them back gives two's complement.
QE_DEV uint32_t minus_zero(uint32_t nibbles, uint32_t zero) {
  return (and_or(nibbles, 0x0F0F0F0Fu, 0x80808080u) - zero) ^ 0x80808080u;
}

template <bool Zeros>
QE_DEV uint32_t unpack_low(uint32_t w, uint32_t zero) {
  return Zeros ? minus_zero(w, zero) : low_times_16(w);
}
template <bool Zeros>
QE_DEV uint32_t unpack_high(uint32_t w, uint32_t zero) {
  return Zeros ? minus_zero(w >> 4, zero) : high_times_16(w);
}

// 16-bit activations: eight nibbles of one word become the four registers of two k16 steps, exactly q - zero.
// The nibble is planted in the mantissa of 1024 (fp16) or 128 (bf16), then the offset is taken away.
template <class T>
struct Unpack16;

template <>
struct Unpack16<f16_t> {
  uint32_t offset_low, offset_high;
  QE_DEV explicit Unpack16(uint32_t zero_plus_8) {
    offset_low = 0xE400E400u + zero_plus_8 * 0x00010001u;   // -(1024 + zero + 8)
    offset_high = 0xD400D400u + zero_plus_8 * 0x00100010u;  // -(64 + zero + 8), for nibbles that stand 4 bits higher
  }
  QE_DEV void operator()(uint32_t w, uint32_t (&r)[4]) const {
    constexpr uint32_t kOne = 0x3C003C00u, kSixteenth = 0x2C002C00u, kBase = 0x64006400u;
    const uint32_t upper = w >> 8;
    r[0] = fma2<f16_t>(and_or(w, 0x000F000Fu, kBase), kOne, offset_low);
    r[1] = fma2<f16_t>(and_or(w, 0x00F000F0u, kBase), kSixteenth, offset_high);
    r[2] = fma2<f16_t>(and_or(upper, 0x000F000Fu, kBase), kOne, offset_low);
    r[3] = fma2<f16_t>(and_or(upper, 0x00F000F0u, kBase), kSixteenth, offset_high);
  }
};

template <>
struct Unpack16<bf16_t> {
  uint32_t offset;
  QE_DEV explicit Unpack16(uint32_t zero_plus_8) {
    offset = 0xC300C300u + zero_plus_8 * 0x00010001u;  // -(128 + zero + 8)
  }
  QE_DEV void operator()(uint32_t w, uint32_t (&r)[4]) const {
    constexpr uint32_t kOne = 0x3F803F80u, kBase = 0x43004300u;
    QE_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = fma2<bf16_t>(and_or(w >> (4 * i), 0x000F000Fu, kBase), kOne, offset);
  }
};

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
