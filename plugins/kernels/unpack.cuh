// From packed bytes to tensor-core operands. The orders below are those of prepack/layout.py.
#pragma once
#include "../include/qe_edge/args.h"
#include "prim.cuh"

namespace qe {

constexpr int kPieceBytes = 512;      // one 16-byte load of a warp: 128 rows x 8 columns of 4-bit weights
template <int Bits>
constexpr int kBlockBytes = Bits * kPieceBytes;
constexpr int kInt8 = 0, k16Bit = 1;  // activation modes of `main`

// What one lane has of a chunk's weights and a block's columns: 4-bit weights by column tile of 8, `w[tile].v[word]`,
// and 3-bit ones by word, `w[word].v[tile]`, because a register may need all three words.
template <int Bits>
using BlockWords = u32x4[Bits];

// int32 sums of one group are read as floats: 1.5 * 2^23 as the start value makes the bit pattern of the sum that of
// the float 12582912 + sum, exact while |sum| < 2^22 (32*4, 16*8 or 8*15 times 128 times 128 rows = 2^21). It saves a
// quarter-rate I2F.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// Where zero points join the float sums as products of fp16 numbers (decode_two_groups_s8, subtract_zeros), sums are
// read in units of 2^24: a start value with a lower exponent does that for nothing.
constexpr int kSmallMagicBits = kMagicBits - (24 << 23);
constexpr float kSmallUnit = 16777216.f;
template <bool Small>
QE_DEV int start_bits() {
  return Small ? kSmallMagicBits : kMagicBits;
}

// Two groups share the subtraction: sum0 * s0 + sum1 * s1 with both start values taken off by one constant. Only the
// first step rounds at the size of kMagic * s1, by at most half of one unit of sum1, of which a code times one step of
// x has 8 or more. That is 2e-5 of the output where x is spread evenly and 2e-4 where outliers leave the rest of x a
// step or two: less than the output's own rounding to 16 bits, and far less than that of x.
template <bool Small = false>
QE_DEV float pair_start(float s0, float s1) {
  constexpr float kStart = Small ? -kMagic / kSmallUnit : -kMagic;
  return fma_f(s0, kStart, s1 * kStart);
}
QE_DEV float pair_of_sums(int sum0, int sum1, float s0, float s1, float start) {
  return fma_f(int_bits_to_float(sum1), s1, fma_f(int_bits_to_float(sum0), s0, start));
}

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

// The A fragment of a k32 step of one half of the chunk, for two column tiles.
template <bool Zeros>
QE_DEV void int8_fragment(const BlockWords<4>& w, int tile, int half, int step, uint32_t (&a)[4]) {
  const uint32_t u0 = w[tile].v[2 * step], u1 = w[tile].v[2 * step + 1];
  const uint32_t v0 = w[tile + 1].v[2 * step], v1 = w[tile + 1].v[2 * step + 1];
  a[0] = half ? high_codes<Zeros>(u0) : low_codes<Zeros>(u0);
  a[1] = half ? high_codes<Zeros>(v0) : low_codes<Zeros>(v0);
  a[2] = half ? high_codes<Zeros>(u1) : low_codes<Zeros>(u1);
  a[3] = half ? high_codes<Zeros>(v1) : low_codes<Zeros>(v1);
}

// A byte of 3-bit weights has a code at its top, 32 * q by masking, one below it, and two spare bits at the bottom.
// Those of three words make up one more byte of that form.
QE_DEV uint32_t top_codes(uint32_t w) { return w & 0xE0E0E0E0u; }
QE_DEV uint32_t spare_codes(uint32_t a, uint32_t b, uint32_t c) {
  return select_bits<0xC0C0C0C0u>(a << 6, select_bits<0x30303030u>(b << 4, c << 2));
}
// Register c of the 8 of a column tile; the first four are rows 0 to 63.
QE_DEV uint32_t int8_codes3(const BlockWords<3>& w, int tile, int c) {
  const uint32_t word = c < 6 ? w[c / 2].v[tile] : spare_codes(w[0].v[tile], w[1].v[tile], w[2].v[tile]);
  return top_codes(c & 1 ? word << 3 : word);
}
template <bool Zeros>
QE_DEV void int8_fragment(const BlockWords<3>& w, int tile, int half, int step, uint32_t (&a)[4]) {
  QE_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = int8_codes3(w, tile + i % 2, half * 4 + 2 * step + i / 2);
}

// Register c of the 8 of a column tile in one chunk; the first four are rows 0 to 63.
template <int Bits, bool Zeros>
QE_DEV uint32_t codes_of(const BlockWords<Bits>& w, int tile, int c) {
  if constexpr (Bits == 3) return int8_codes3(w, tile, c);
  else return c < 4 ? low_codes<Zeros>(w[tile].v[c]) : high_codes<Zeros>(w[tile].v[c & 3]);
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
// stand 8 bits higher those of the next step. A code in the low bits of an fp16 is the subnormal code * 2^-24; four
// bits higher it is 16 times that, which `prepare` makes up for in x (kCodeShifts4). Tensor cores multiply subnormal
// fp16 numbers exactly (PTX ISA, mma, "subnormal numbers are supported"; Fasi, Higham, Mikaitis, Pranesh, "Numerical
// behavior of NVIDIA tensor cores", PeerJ CS 2021); the self-test would notice one that does not. 2^24 is in the column
// scale.
QE_DEV void unpack_16(uint32_t w, uint32_t (&r)[2]) {
  r[0] = w & 0x000F000Fu;
  r[1] = w & 0x00F000F0u;
}

// A half word of 3-bit weights has five codes. Three stand 0, 3 and 6 bits high, two above bit 9, which is spare: the
// three words are shifted so that their spare bits become bits 0, 1 and 2 of one more code. Like this, codes stand up
// to 6 bits high (kCodeShifts3), and `prepare` makes up for that too.
QE_DEV uint32_t upper_part(const BlockWords<3>& w, int word, int tile) { return w[word].v[tile] >> (9 - word); }
QE_DEV uint32_t half_codes3(const BlockWords<3>& w, int tile, int r) {
  if (r == 15) {
    const uint32_t two = select_bits<0x00010001u>(upper_part(w, 0, tile), upper_part(w, 1, tile));
    return select_bits<0x00030003u>(two, upper_part(w, 2, tile)) & 0x00070007u;
  }
  const int word = r / 5, at = r % 5;
  if (at < 3) return w[word].v[tile] & (0x00070007u << (3 * at));
  return upper_part(w, word, tile) & (0x00070007u << (1 + word + 3 * (at - 3)));
}
// The two registers of a k16 step; the first is number r of 16, rows 8 * r to 8 * r + 7.
template <int Bits>
QE_DEV void unpack_step(const BlockWords<Bits>& w, int tile, int r, uint32_t (&to)[2]) {
  if constexpr (Bits == 4) {
    unpack_16(w[tile].v[r / 4] >> (4 * (r & 2)), to);
  } else {
    to[0] = half_codes3(w, tile, r), to[1] = half_codes3(w, tile, r + 1);
  }
}
// The same for decode, in four instructions for a word instead of five. The upper byte of a half word is a number as it
// is, lower + 16 * upper of its two codes. It stands for the upper one, and `prepare` takes what that adds to the lower
// one's product off the lower one's x (x_of_eight).
template <int Bits>
QE_DEV void unpack_step_decode(const BlockWords<Bits>& w, int tile, int r, uint32_t (&to)[2]) {
  if constexpr (Bits == 4) {
    if (r & 2) {
      to[1] = pick_bytes<0x4341>(w[tile].v[r / 4]);
      to[0] = to[1] & 0x000F000Fu;
      return;
    }
  }
  unpack_step<Bits>(w, tile, r, to);
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

// 8 * zero point * scale in units of 2^24, of two columns that are 8 apart: each as the nearest fp16 and the rest. The
// zero points come 8 times too large and are taken as fp16 subnormals; the largest scale of a column is 2^14 to 2^15
// (prepack/pack.py), which leaves at least 18 bits of its product, and no more of small scales than of that one.
template <int Column>
QE_DEV void zero_times_scale(uint32_t zeros, uint32_t scales, uint32_t& first, uint32_t& second) {
  const uint32_t zero = pick_bytes<0x4040 + 0x100 * (Column + 1) + Column>(zeros);
  const uint32_t most = mul_f16x2(zero, scales), rest = fma_f16x2(zero, scales, neg_f16x2(most));
  first = pick_bytes<0x5410>(most, rest), second = pick_bytes<0x7632>(most, rest);
}
// One half of a word in both halves.
QE_DEV uint32_t twice_half(uint32_t word, int upper) { return pick_bytes_at(word, 0u, upper ? 0x3232u : 0x1010u); }

// Zero point and scale of one column, in pairs, for weights that become numbers of their own (prefill). Scales are so
// large (prepack/pack.py) that the product of a subnormal difference and a scale is a normal fp16, rounded once.
struct GroupPairs {
  uint32_t zero, zero_times_16, scale;
  QE_DEV void dequantize(uint32_t (&r)[2], int) const {
    r[0] = mul_f16x2(sub_f16x2(r[0], zero), scale);
    r[1] = mul_f16x2(sub_f16x2(r[1], zero_times_16), scale);
  }
};
// Of two columns that are 8 apart.
template <int Column>
QE_DEV void pairs_of(uint32_t scales, uint32_t zeros, uint32_t zeros_times_16, GroupPairs* pairs) {
  constexpr int kBytes = 0x4040 + 0x100 * (Column + 1) + Column;
  const uint32_t zero = pick_bytes<kBytes>(zeros), zero_times_16 = pick_bytes<kBytes>(zeros_times_16);
  pairs[0] = {repeat_half<false>(zero), repeat_half<false>(zero_times_16), repeat_half<false>(scales)};
  pairs[1] = {repeat_half<true>(zero), repeat_half<true>(zero_times_16), repeat_half<true>(scales)};
}
QE_DEV void group_pairs(const u32x2& scales, uint32_t zeros, GroupPairs (&pairs)[4]) {
  pairs_of<0>(scales.v[0], zeros, zeros << 4, pairs);
  pairs_of<2>(scales.v[1], zeros, zeros << 4, pairs + 2);
}

// 2 to the power of minus kCodeShifts3 of register r, twice.
QE_DEV uint32_t unit_pair(int r) {
  return 0x00010001u * ((15u - static_cast<uint32_t>(kCodeShifts3 >> (4 * r) & 15u)) << 10);
}
// The same of 3-bit weights: the code's factor is taken off together with the zero point, so that one zero point serves
// all of them, and x stays as it is.
struct GroupPairs3 {
  uint32_t minus_zero, scale;
  QE_DEV void dequantize(uint32_t (&r)[2], int first) const {
    r[0] = mul_f16x2(fma_f16x2(r[0], unit_pair(first), minus_zero), scale);
    r[1] = mul_f16x2(fma_f16x2(r[1], unit_pair(first + 1), minus_zero), scale);
  }
};
template <int Bits>
struct PairsOf {
  using type = GroupPairs;
};
template <>
struct PairsOf<3> {
  using type = GroupPairs3;
};
QE_DEV void group_pairs(const u32x2& scales, uint32_t zeros, GroupPairs3 (&pairs)[4]) {
  GroupPairs both[4];
  group_pairs(scales, zeros, both);
  QE_UNROLL
  for (int j = 0; j < 4; ++j) pairs[j] = {neg_f16x2(both[j].zero), both[j].scale};
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

// Eight values of INT4, each stored with 8 added, as four registers: nibbles i and i + 4 are the halves of number i.
template <class T>
QE_DEV void int4_pairs(uint32_t w, uint32_t (&r)[4]) {
  QE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float lo = int_bits_to_float(static_cast<int>(0x4B000000u | ((w >> (4 * i)) & 15u))) - 8388616.0f;
    const float hi = int_bits_to_float(static_cast<int>(0x4B000000u | ((w >> (4 * i + 16)) & 15u))) - 8388616.0f;
    r[i] = pack2<T>(lo, hi);
  }
}
// In the mantissa of the fp16 1024 a code is a whole number, and four bits higher 16 of them: both become the exact value
// in one more instruction, so that factors of any width have the same scales.
template <>
QE_DEV void int4_pairs<f16_t>(uint32_t w, uint32_t (&r)[4]) {
  QE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t codes = w >> (8 * i);
    r[2 * i] = sub_f16x2(and_or(codes, 0x000F000Fu, 0x64006400u), 0x64086408u);  // less 1024 + 8
    r[2 * i + 1] = fma_f16x2(and_or(codes, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD480D480u);  // / 16 - (64 + 8)
  }
}

// A lane's words of a block of `down`, [32 rows x 16 columns] of values with this many bits.
template <int Bits>
struct DownWords {
  static constexpr int kBytes = 32 * 16 * Bits / 8;  // of the block
  uint32_t v[Bits / 2];
};
template <int Bits>
QE_DEV void load_down(const void* down, size_t block, int lane, DownWords<Bits>& words) {
  const uint8_t* at = static_cast<const uint8_t*>(down) + block * DownWords<Bits>::kBytes;
  if constexpr (Bits == 4) {
    const u32x2 w = load8_stream(at + lane * 8);
    words.v[0] = w.v[0], words.v[1] = w.v[1];
  } else {
    QE_UNROLL
    for (int i = 0; i < Bits / 8; ++i) {
      const u32x4 w = load16_stream(at + (i * 32 + lane) * 16);
      QE_UNROLL
      for (int j = 0; j < 4; ++j) words.v[4 * i + j] = w.v[j];
    }
  }
}
// The A fragment of one of its two k16 steps.
template <class T, int Bits>
QE_DEV void down_fragment(const DownWords<Bits>& words, int step, uint32_t (&a)[4]) {
  if constexpr (Bits == 4) {
    int4_pairs<T>(words.v[step], a);
  } else {
    QE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (Bits == 8) {
        a[i] = int8_pair<T>(words.v[step * 2 + i / 2], i & 1);
      } else {
        a[i] = words.v[step * 4 + i];
      }
    }
  }
}

// A lane's words of two neighbouring [16 ranks x 8 columns] tiles of `up`: four of 16 bits, two of 8, one of 4.
struct UpWords {
  uint32_t v[4];
};
// `pair` counts (rank step, 16 columns).
QE_DEV void load_up(const void* up, int bits, size_t pair, int lane, UpWords& words) {
  const uint8_t* at = static_cast<const uint8_t*>(up);
  if (bits == 4) {
    words.v[0] = load4(at + (pair * 32 + lane) * 4);
    return;
  }
  QE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const size_t tile = (pair * 2 + j) * 32 + lane;
    if (bits == 8) {
      words.v[j] = load4(at + tile * 4);
    } else {
      const u32x2 w = load8(at + tile * 8);
      words.v[2 * j] = w.v[0], words.v[2 * j + 1] = w.v[1];
    }
  }
}
// Their registers, two for each tile.
template <class T>
QE_DEV void up_fragments(const UpWords& words, int bits, uint32_t (&r)[4]) {
  if (bits == 4) return int4_pairs<T>(words.v[0], r);
  QE_UNROLL
  for (int i = 0; i < 4; ++i) r[i] = bits == 8 ? int8_pair<T>(words.v[i / 2], i & 1) : words.v[i];
}

}  // namespace qe
