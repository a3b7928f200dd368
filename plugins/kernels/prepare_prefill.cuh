// `prepare` and `down` of more than 64 tokens in one launch, where no router has to be asked first and no group has sums of
// its own. A block has 8 tokens, or 16 with 16-bit factors, because every block reads all of `down`. Its warps share K. A lane
// has eight values of a token, which are the B operand of the product with `down` and are quantized where they are.
#pragma once
#include "../include/qe_edge/args.h"
#include "lowrank_down.cuh"
#include "prepare.cuh"

namespace qe {

template <int Bits>
constexpr int kPrepareTokens8 = PrepareTokens(Bits) / 8;
template <int Bits>
constexpr int kStrip = Bits >= 8 ? 1 : 2;  // blocks of 32 rows that a warp has at a time; the next ones are on their way

// Eight values after the channel scale, as load_scaled has them.
template <class T>
QE_DEV void scale_eight(const u32x4& x, const u32x4& omega, bool scales, float (&scaled)[8]) {
  QE_UNROLL
  for (int i = 0; i < 8; ++i) scaled[i] = scales ? half_of<T>(x, i) * half_of<T>(omega, i) : half_of<T>(x, i);
}

// Eight values of a token, which lie in its row from k on, in steps of the token's unit. Returns what they add up to.
template <class T>
QE_DEV float store_eight(const PrepareArgs& p, int token, int k, const float (&scaled)[8], float largest, bool stored) {
  const size_t at = static_cast<size_t>(token) * p.Kp + k;
  float sum = 0.f;
  if (p.act_max) {
    const float inverse = inverse_unit(p.act_max, largest);
    u32x2 words;
    QE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float four[4] = {scaled[4 * half], scaled[4 * half + 1], scaled[4 * half + 2], scaled[4 * half + 3]};
      words.v[half] = int8_codes(p.act_max, four, largest, inverse, sum);
    }
    if (stored) store8(static_cast<uint8_t*>(p.act) + at, words);
    return sum;
  }
  float unit, inverse;
  token_unit(largest, unit, inverse);
  const uint32_t shift = static_cast<uint32_t>(p.code_shifts >> (k / 8 % 16 * 4)) & 15u;
  const float share = int_bits_to_float(static_cast<int>((127u - shift) << 23));
  u32x4 words;
  float x[8];
  QE_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = to_float(from_float<T>(scaled[i])) * inverse, sum += x[i];
  QE_UNROLL
  for (int i = 0; i < 4; ++i) words.v[i] = pack2<f16_t>(x[2 * i] * share, x[2 * i + 1] * share);
  if (stored) store16(static_cast<uint16_t*>(p.act) + at, words);
  return sum;
}

// What a warp has of a strip of K: x and the channel scales, eight values a lane, and its words of 64 columns of `down`.
template <int Bits>
struct Strip {
  u32x4 x[kStrip<Bits>][kPrepareTokens8<Bits>], scales[kStrip<Bits>];
  DownWords<Bits != 0 ? Bits : 4> words[kStrip<Bits>][kDownColumnTiles];
};

// The first of the 32 rows of a warp's i-th block in a strip, counted in blocks.
template <int Bits>
QE_DEV int block_of(int strip, int i) {
  return (strip * kStrip<Bits> + i) * (block_threads() >> 5) + (thread_id() >> 5);
}

template <class T, int Bits>
QE_DEV void load_strip(const PrepareDownArgs& p, const int (&token)[kPrepareTokens8<Bits>], int strip, Strip<Bits>& to) {
  QE_UNROLL
  for (int i = 0; i < kStrip<Bits>; ++i) {
    const int block = block_of<Bits>(strip, i), k = block * 32 + (thread_id() & 3) * 8;
    load_x_rows<T>(p.down, token, block, to.x[i]);
    to.scales[i] = u32x4{};
    if (p.prepare.inv_omega && k < p.prepare.K) to.scales[i] = load16(static_cast<const T*>(p.prepare.inv_omega) + k);
  }
}

// The words of the 64 columns from tile `first` on.
template <int Bits>
QE_DEV void load_strip_words(const DownArgs& p, int strip, int first, Strip<Bits>& to) {
  const int blocks = (p.K + 31) / 32;
  QE_UNROLL
  for (int i = 0; i < kStrip<Bits>; ++i)
    QE_UNROLL
    for (int c = 0; c < kDownColumnTiles; ++c) {
      const int block = block_of<Bits>(strip, i), tile = first + c;
      if (Bits != 0 && tile < p.shared_tiles && block < blocks)
        load_down(p.down, static_cast<size_t>(tile) * blocks + block, thread_id() & 31, to.words[i][c]);
    }
}

// The block's h in 64 columns from tile `first` on: the sum over its warps.
template <class T, int Bits>
QE_DEV void store_h(const DownArgs& p, int m0, int count, int first, const float* sums) {
  constexpr int kColumns = kDownColumnTiles * 16;
  const int tiles = p.shared_tiles - first, width = 16 * (tiles < kDownColumnTiles ? tiles : kDownColumnTiles);
  for (int o = thread_id(); o < kColumns * count; o += block_threads()) {
    const int column = o % kColumns, i = o / kColumns;
    if (column >= width) continue;
    const float v = collect<kPrepareTokens8<Bits>, kDownColumnTiles>(sums, column, i) * p.down_scale[first * 16 + column];
    store2(static_cast<T*>(p.h) + static_cast<size_t>(m0 + i) * (p.shared_tiles * 16) + first * 16 + column, from_float<T>(v).bits);
  }
}

template <class T, int Bits>
QE_DEV void prepare_prefill(const PrepareDownArgs& args) {
  constexpr int kTokens8 = kPrepareTokens8<Bits>, kTokens = 8 * kTokens8;
  constexpr bool kWordsAhead = Bits != 16;  // which take too many registers
  QE_DYNAMIC_SHARED(shared);
  const PrepareArgs& p = args.prepare;
  const DownArgs& down = args.down;
  float* maxima = reinterpret_cast<float*>(shared);  // [warps][tokens]
  float* totals = maxima + kPrepareWarps * kTokens;  // likewise
  float* sums = totals + kPrepareWarps * kTokens;    // [warps][tiles][kTokens8][4][32]
  const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5;
  const int m0 = block_x() * kTokens, left = p.M - m0, count = left < kTokens ? left : kTokens;
  const int blocks = p.Kp / 32, strips = (blocks + warps * kStrip<Bits> - 1) / (warps * kStrip<Bits>);
  int place[kTokens8], token[kTokens8];  // in the block, in x
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) {
    place[t] = t * 8 + (lane >> 2);
    token[t] = m0 + (place[t] < count ? place[t] : count - 1);  // the copy's result is not stored
  }
  wait_for_previous();

  Strip<Bits> now, next;
  float largest[kTokens8];
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) largest[t] = 0.f;
  for (int first = 0; first == 0 || first < down.shared_tiles; first += kDownColumnTiles) {
    float acc[kDownColumnTiles][kTokens8][4];
    QE_UNROLL
    for (int c = 0; c < kDownColumnTiles; ++c)
      QE_UNROLL
      for (int t = 0; t < kTokens8; ++t)
        QE_UNROLL
        for (int i = 0; i < 4; ++i) acc[c][t][i] = 0.f;
    if (kWordsAhead) load_strip_words<Bits>(down, 0, first, now);
    load_strip<T, Bits>(args, token, 0, now);
    QE_UNROLL_BY(2)
    for (int strip = 0; strip < strips; ++strip) {
      if (!kWordsAhead) load_strip_words<Bits>(down, strip, first, now);
      if (strip + 1 < strips) {
        if (kWordsAhead) load_strip_words<Bits>(down, strip + 1, first, next);
        load_strip<T, Bits>(args, token, strip + 1, next);
      }
      QE_UNROLL
      for (int i = 0; i < kStrip<Bits>; ++i) {
        if constexpr (Bits != 0) {
          QE_UNROLL
          for (int c = 0; c < kDownColumnTiles; ++c)
            if (first + c < down.shared_tiles && block_of<Bits>(strip, i) * 32 < p.K)
              multiply_down<T, Bits>(now.words[i][c], now.x[i], acc[c]);
        }
        QE_UNROLL
        for (int t = 0; t < kTokens8; ++t) {
          float scaled[8];
          scale_eight<T>(now.x[i][t], now.scales[i], p.inv_omega, scaled);
          QE_UNROLL
          for (int j = 0; j < 8; ++j) largest[t] = max_f(largest[t], abs_f(scaled[j]));
        }
      }
      if (strip + 1 < strips) now = next;
    }
    if (first == 0) {
      QE_UNROLL
      for (int t = 0; t < kTokens8; ++t) {
        largest[t] = max_f(largest[t], shuffle_xor(largest[t], 1));
        largest[t] = max_f(largest[t], shuffle_xor(largest[t], 2));
        if ((lane & 3) == 0) maxima[warp * kTokens + place[t]] = largest[t];
      }
    } else {
      block_sync();  // nobody reads the sums of the columns before any more
    }
    if constexpr (Bits != 0) store_partial<kTokens8, kDownColumnTiles>(acc, sums);
    block_sync();
    if constexpr (Bits != 0) store_h<T, Bits>(down, m0, count, first, sums);
  }

  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) {
    largest[t] = 0.f;
    for (int w = 0; w < warps; ++w) largest[t] = max_f(largest[t], maxima[w * kTokens + place[t]]);
    if (warp == 0 && (lane & 3) == 0 && place[t] < count) p.token_scale[token[t]] = stored_unit(p.act_max, largest[t]);
  }
  float total[kTokens8];
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) total[t] = 0.f;
  QE_UNROLL_BY(2)
  for (int strip = strips - 1; strip >= 0; --strip) {  // the last one is still there
    if (strip > 0) load_strip<T, Bits>(args, token, strip - 1, next);
    QE_UNROLL
    for (int i = 0; i < kStrip<Bits>; ++i) {
      const int block = block_of<Bits>(strip, i);
      if (block >= blocks) continue;
      QE_UNROLL
      for (int t = 0; t < kTokens8; ++t) {
        float scaled[8];
        scale_eight<T>(now.x[i][t], now.scales[i], p.inv_omega, scaled);
        total[t] += store_eight<T>(p, token[t], block * 32 + (lane & 3) * 8, scaled, largest[t], place[t] < count);
      }
    }
    now = next;
  }
  if (!p.sums) return;
  QE_UNROLL
  for (int t = 0; t < kTokens8; ++t) {
    total[t] += shuffle_xor(total[t], 1);
    total[t] += shuffle_xor(total[t], 2);
    if ((lane & 3) == 0) totals[warp * kTokens + place[t]] = total[t];
  }
  block_sync();
  if (thread_id() >= count) return;
  float all = 0.f;
  for (int w = 0; w < warps; ++w) all += totals[w * kTokens + thread_id()];
  store4(static_cast<float*>(p.sums) + m0 + thread_id(), static_cast<uint32_t>(float_to_int_bits(all)));
}

}  // namespace qe
