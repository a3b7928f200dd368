// Warp collectives by the fragment maps of the PTX ISA ("Matrix Fragments for mma.m16n8k32" and "mma.m16n8k16").
// tests/test_fragments.py checks the maps against a second statement of them.
#include <string.h>

#include "simt.h"

namespace qe_emu {
namespace {

float half_value(uint32_t word, int i) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

float brain_value(uint32_t word, int i) {
  const uint32_t bits = (word >> (16 * i)) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

void load_matrix(const void* const (&in)[32], void* const (&out)[32]) {
  unsigned char rows[32][16];
  for (int l = 0; l < 32; ++l) memcpy(rows[l], *static_cast<const unsigned char* const*>(in[l]), 16);
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) memcpy(static_cast<uint32_t*>(out[l]) + m, rows[m * 8 + l / 4] + (l % 4) * 4, 4);
}

void mma_s8(const void* const (&in)[32], void* const (&out)[32]) {
  int a[16][32], b[32][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& m = *static_cast<const MmaIn*>(in[l]);
    const int group = l / 4, lane = l % 4;
    for (int i = 0; i < 16; ++i)
      a[i % 8 < 4 ? group : group + 8][lane * 4 + i % 4 + (i >= 8 ? 16 : 0)] =
          static_cast<int8_t>(m.a[i / 4] >> (8 * (i % 4)));
    for (int i = 0; i < 8; ++i)
      b[lane * 4 + i % 4 + (i >= 4 ? 16 : 0)][group] = static_cast<int8_t>(m.b[i / 4] >> (8 * (i % 4)));
    for (int i = 0; i < 4; ++i) c[i < 2 ? group : group + 8][lane * 2 + i % 2] = m.ci[i];
  }
  uint32_t sums[16][8];  // wrap, as the hardware's do
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) sums[row][column] = static_cast<uint32_t>(c[row][column]);
    for (int k = 0; k < 32; ++k)
      for (int column = 0; column < 8; ++column)
        sums[row][column] += static_cast<uint32_t>(a[row][k] * b[k][column]);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<int32_t*>(out[l])[i] = static_cast<int32_t>(sums[i < 2 ? l / 4 : l / 4 + 8][(l % 4) * 2 + i % 2]);
}

// `depth` is 16, or 8 for the instruction that has the first half of the registers only.
template <float (*value)(uint32_t, int), int depth>
void mma_16(const void* const (&in)[32], void* const (&out)[32]) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& m = *static_cast<const MmaIn*>(in[l]);
    const int group = l / 4, lane = l % 4;
    for (int i = 0; i < 8; ++i)
      a[i % 4 < 2 ? group : group + 8][lane * 2 + i % 2 + (i >= 4 ? 8 : 0)] = value(m.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[lane * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = value(m.b[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) c[i < 2 ? group : group + 8][lane * 2 + i % 2] = m.cf[i];
  }
  float sums[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? l / 4 : l / 4 + 8, column = (l % 4) * 2 + i % 2;
      static_cast<float*>(out[l])[i] = c[row][column] + sums[row][column];
    }
}

}  // namespace

void run_collective(Collective kind, const void* const (&in)[32], void* const (&out)[32]) {
  switch (kind) {
    case Collective::kLoadMatrix:
      return load_matrix(in, out);
    case Collective::kMmaS8:
      return mma_s8(in, out);
    case Collective::kMmaF16:
      return mma_16<half_value, 16>(in, out);
    case Collective::kMmaBf16:
      return mma_16<brain_value, 16>(in, out);
    case Collective::kMmaF16K8:
      return mma_16<half_value, 8>(in, out);
    case Collective::kShuffleXor: {
      float values[32];
      for (int l = 0; l < 32; ++l) values[l] = static_cast<const ShuffleIn*>(in[l])->value;
      for (int l = 0; l < 32; ++l)
        *static_cast<float*>(out[l]) = values[l ^ static_cast<const ShuffleIn*>(in[l])->mask];
      return;
    }
    case Collective::kBallot: {
      uint32_t votes = 0;
      for (int l = 0; l < 32; ++l) votes |= static_cast<uint32_t>(*static_cast<const bool*>(in[l])) << l;
      for (int l = 0; l < 32; ++l) *static_cast<uint32_t*>(out[l]) = votes;
      return;
    }
    case Collective::kClusterArrive:
    case Collective::kClusterWait:
    case Collective::kGroupSync:
      return;  // the scheduler's
  }
}

}  // namespace qe_emu
