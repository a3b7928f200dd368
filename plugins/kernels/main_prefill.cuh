// `main` of more than 64 tokens: a tiled GEMM with 16-byte asynchronous copies in three stages. Warp tile 64 x 32, four warps
// across the 128 columns of a block, 1 or 2 across its 64 or 128 rows (chosen at launch: TensorRT times the choices). The
// warp tile is tall because every unpacked weight then serves four matrix instructions.
// Packed weights lie in the order of the tensor core's B fragments: a lane reads its 128 rows of a column tile at once,
// or, of 3-bit weights, a third of its rows of four column tiles.
#pragma once
#include "../include/qe_edge/args.h"
#include "prefill_epilogue.cuh"
#include "prefill_loader.cuh"

namespace qe {

// What a lane needs of a group beside its weights: the scales of the eight columns that its accumulators hold, by
// [column & 1][column tile], and, of 128 rows, the zero points of the four columns that it unpacks.
struct GroupData {
  u32x4 scales;
  uint32_t zeros;
  QE_DEV float scale(int c, int tile) const {
    return to_float(f16_t{static_cast<uint16_t>(scales.v[c * 2 + tile / 2] >> (16 * (tile & 1)))});
  }
  QE_DEV uint32_t zero(int tile) const {
    return tile == 0 ? zero_bytes<0>(zeros) : tile == 1 ? zero_bytes<1>(zeros)
         : tile == 2 ? zero_bytes<2>(zeros) : zero_bytes<3>(zeros);
  }
};

// A fragments of 16 rows from `row` on: 16-byte pieces first, first + 1, ... of each.
template <class S, int Steps>
QE_DEV void load_rows(const unsigned char* s, int row, int first, uint32_t (&a)[Steps][4]) {
  const int lane = thread_id() & 31;
  QE_UNROLL
  for (int step = 0; step < Steps; ++step)
    load_matrix(a[step], s + S::offset(row + (lane & 15), first + step * 2 + (lane >> 4)));
}
// The same from where this lane's pieces of a row start; those past the eighth repeat the flips of the first. Left to
// itself ptxas computes that in every chunk; two groups of int8 activations leave no registers to keep it.
template <int Steps>
QE_DEV void load_pieces(const unsigned char* rows, const int (&piece)[4], int first, uint32_t (&a)[Steps][4]) {
  QE_UNROLL
  for (int step = 0; step < Steps; ++step)
    load_matrix(a[step], rows + piece[(first / 2 + step) % 4] + first / 8 * 128);
}

QE_DEV void load_words(const unsigned char* weights, BlockWords<3>& w) {
  QE_UNROLL
  for (int i = 0; i < 3; ++i) w[i] = load16(weights + i * kPieceBytes);
}

// What is unpacked at a time: all of a chunk where a group is one sum; half of its rows without groups; and half of the
// warp's columns where there are two groups, because each pair of sums is one step.
template <int Groups>
constexpr int kPartSteps = Groups == 0 ? 2 : 4;  // of k32
template <int Groups>
constexpr int kPartTiles = Groups == 2 ? kColumnTiles / 2 : kColumnTiles;

// A chunk, or one half of it. The unpacked weights of the warp's columns stay in registers while its rows pass: they
// take half of the registers that the rows would.
template <int Bits, int Groups, bool Zeros, int Part, class Acc>
QE_DEV void prefill_part_s8(const unsigned char* s, int rows, int wm, int wn, const int (&piece)[4],
                            const GroupData (&group)[2], Acc (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<Bits, kInt8, Groups, Zeros>;
  constexpr int kSteps = kPartSteps<Groups>, kTiles = kPartTiles<Groups>;
  constexpr int kFirst = Groups == 0 ? Part * 2 * kSteps : 0;  // the first register of 16 rows
  constexpr int kFirstTile = Groups == 2 ? Part * kTiles : 0;
  constexpr int kSums = Groups == 2 ? 2 : 1, kSumSteps = kSteps / kSums;
  const unsigned char* weights = s + rows * S::kRowBytes + wn * (16 * Bits) + (thread_id() & 31) * 16;
  float scale[kSums][2][kTiles], start[2][kTiles];
  QE_UNROLL
  for (int c = 0; Groups != 0 && c < 2; ++c)
    QE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      QE_UNROLL
      for (int g = 0; g < kSums; ++g) scale[g][c][j] = group[g].scale(c, kFirstTile + j);
      if constexpr (kSums == 2) start[c][j] = pair_start<Zeros>(scale[0][c][j], scale[1][c][j]);
    }
  BlockWords<Bits> w;
  if constexpr (Bits == 3) load_words(weights, w);
  uint32_t b[kTiles][2 * kSteps];
  QE_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    const int tile = kFirstTile + j;
    if (Bits == 4) w[tile] = load16(weights + tile * kPieceBytes);
    QE_UNROLL
    for (int c = 0; c < 2 * kSteps; ++c) {
      if constexpr (Bits == 3) {
        b[j][c] = int8_codes3(w, tile, kFirst + c);
        continue;
      }
      const uint32_t word = w[tile].v[(kFirst + c) & 3];
      const bool high = kFirst + c >= 4;
      if constexpr (Groups == 1 && Zeros) {
        const uint32_t zero = group[0].zero(tile);
        b[j][c] = high ? centred_codes<true>(word, zero) : centred_codes<false>(word, zero);
      } else {
        b[j][c] = high ? high_codes<Zeros>(word) : low_codes<Zeros>(word);
      }
    }
  }
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    uint32_t a[kSteps][4];
    if constexpr (Groups == 2) {
      load_rows<S>(s, wm + i * 16, kFirst, a);
    } else {
      load_pieces(s + i * 16 * S::kRowBytes, piece, kFirst, a);
    }
    QE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      Acc(&to)[4] = acc[i][kFirstTile + j];
      if constexpr (Groups == 0) {
        QE_UNROLL
        for (int step = 0; step < kSteps; ++step) mma_s8(to, a[step], b[j][2 * step], b[j][2 * step + 1], to);
      } else {
        int sum[kSums][4];
        QE_UNROLL
        for (int g = 0; g < kSums; ++g) {
          QE_UNROLL
          for (int c = 0; c < 4; ++c) sum[g][c] = start_bits<Zeros && kSums == 2>();
          QE_UNROLL
          for (int step = g * kSumSteps; step < (g + 1) * kSumSteps; ++step)
            mma_s8(sum[g], a[step], b[j][2 * step], b[j][2 * step + 1], sum[g]);
        }
        QE_UNROLL
        for (int c = 0; c < 4; ++c) {
          if constexpr (kSums == 2) {
            to[c] += pair_of_sums(sum[0][c], sum[1][c], scale[0][c & 1][j], scale[1][c & 1][j], start[c & 1][j]);
          } else {
            to[c] += (int_bits_to_float(sum[0][c]) - kMagic) * scale[0][c & 1][j];
          }
        }
      }
    }
  }
}

// Zero points of two groups: minus the sums of x, times zero point times scale, as in decode_two_groups_s8. A row of
// the short A operand is 16 bytes, so that an ldmatrix brings two row tiles; lanes 0 and 1 of four have the first
// group. For one group of 128 rows this would save 36 to 60 instructions too, but take 218 to 248 registers on sm_90
// and later.
template <class S>
QE_DEV void subtract_zeros(const unsigned char* s, int rows, int wm, int wn,
                           float (&acc)[kRowTiles][kColumnTiles][4]) {
  const int lane = thread_id() & 31, row = wn * 2 + (lane >> 1 & 1) * kBlockColumns;
  const unsigned char* after = s + rows * S::kRowBytes;
  const u32x2 scales = load8(after + S::kWeights + row * 2 + (lane >> 2) * 8);
  const uint32_t zeros = load4(after + S::kWeights + S::kScales + row + (lane >> 2) * 4);
  uint32_t b[kColumnTiles];
  zero_times_scale<0>(zeros, scales.v[0], b[0], b[1]);
  zero_times_scale<2>(zeros, scales.v[1], b[2], b[3]);
  QE_UNROLL
  for (int i = 0; i < kRowTiles; i += 2) {
    uint32_t a[4];
    load_matrix(a, after + S::kSums + (wm + i * 16 + lane) * S::kSumBytes);
    QE_UNROLL
    for (int h = 0; h < 2; ++h)
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) mma_f16_k8(acc[i + h][j], a[2 * h], a[2 * h + 1], b[j]);
  }
}

template <int Bits, int Groups, bool Zeros, class Acc>
QE_DEV void prefill_chunk_s8(const unsigned char* s, int rows, int wm, int wn, const int (&piece)[4],
                             Acc (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<Bits, kInt8, Groups, Zeros>;
  const int lane = thread_id() & 31;
  const unsigned char* scales = s + rows * S::kRowBytes + S::kWeights;
  GroupData group[2];
  QE_UNROLL
  for (int g = 0; g < Groups; ++g) {
    const int row = wn * Groups + g * kBlockColumns;
    group[g].scales = load16(scales + row * 2 + (lane & 3) * 16);
    group[g].zeros = Zeros && Groups == 1 ? load4(scales + S::kScales + row + (lane >> 2) * 4) : 0u;
  }
  prefill_part_s8<Bits, Groups, Zeros, 0>(s, rows, wm, wn, piece, group, acc);
  // Without it ptxas for sm_90 and later reads the rows once for both halves, and takes 255 registers.
  if constexpr (Groups == 2) warp_sync();
  if constexpr (Groups != 1) prefill_part_s8<Bits, Groups, Zeros, 1>(s, rows, wm, wn, piece, group, acc);
  if constexpr (Groups == 2 && Zeros) subtract_zeros<S>(s, rows, wm, wn, acc);
}

// Weights of a group become fp16 numbers (q - z) * scale before the product, as an ONNX DequantizeLinear of a float16
// model would have them: sums of their own per group would cost more, in registers above all. Without groups, codes are
// multiplied as they are.
template <int Bits, int Groups>
QE_DEV void prefill_chunk_16(const unsigned char* s, int rows, int wn, const int (&piece)[4],
                             float (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<Bits, k16Bit, Groups, true>;
  const int lane = thread_id() & 31;
  const unsigned char* after = s + rows * S::kRowBytes + S::kWeights;
  const unsigned char* scales = after + wn * Groups * 2 + (lane >> 2) * 8;
  const unsigned char* zeros = after + S::kScales + wn * Groups + (lane >> 2) * 4;
  const unsigned char* weights = s + rows * S::kRowBytes + wn * (16 * Bits) + lane * 16;
  typename PairsOf<Bits>::type group[kColumnTiles];
  BlockWords<3> words;
  QE_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (Groups == 2 || (Groups == 1 && half == 0))
      group_pairs(load8(scales + half * kBlockColumns * 2), load4(zeros + half * kBlockColumns), group);
    if constexpr (Bits == 3) load_words(weights, words);
    QE_UNROLL
    for (int block = 0; block < 2; ++block) {
      uint32_t b[kColumnTiles][2][2];  // [column tile][k16 step][register]
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        if constexpr (Bits == 3) {
          QE_UNROLL
          for (int step = 0; step < 2; ++step)
            unpack_step<3>(words, j, half * 8 + block * 4 + step * 2, b[j][step]);
        } else {
          const uint32_t w = load4(weights + j * kPieceBytes + half * 8 + block * 4);
          QE_UNROLL
          for (int step = 0; step < 2; ++step) unpack_16(w >> (8 * step), b[j][step]);
        }
        QE_UNROLL
        for (int step = 0; step < 2; ++step)
          if (Groups != 0) group[j].dequantize(b[j][step], half * 8 + block * 4 + step * 2);
      }
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[2][4];  // [k16 step][register]
        load_pieces(s + i * 16 * S::kRowBytes, piece, half * 8 + block * 4, a);
        QE_UNROLL
        for (int step = 0; step < 2; ++step)
          QE_UNROLL
          for (int j = 0; j < kColumnTiles; ++j) mma_16<f16_t>(acc[i][j], a[step], b[j][step][0], b[j][step][1]);
      }
    }
  }
}

template <class T, int Bits, int Mode, int Groups, bool Zeros>
QE_DEV void main_prefill(const MainArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, rows = block_threads() / 2;
  const int wm = warp / kWarpsAcross * kWarpRows, wn = warp % kWarpsAcross * kWarpColumns;
  const int m0 = block_y() * rows, n0 = block_x() * kPrefillColumns, chunks = p.Kp / kChunk;
  wait_for_previous();
  Loader<Bits, Mode, Groups, Zeros> load(p, rows, m0, n0);
  const int stage_bytes = load.stage_bytes();

  typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kRowTiles][kColumnTiles][4];
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int j = 0; j < kColumnTiles; ++j)
      QE_UNROLL
      for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < chunks) load(shared + s * stage_bytes);
    load.next();
    cp_async_commit();
  }
  int piece[4];
  QE_UNROLL
  for (int step = 0; step < 4; ++step)
    piece[step] = Stage<Bits, Mode, Groups, Zeros>::offset(wm + (lane & 15), step * 2 + (lane >> 4));
  int read = 0, fill = (kStages - 1) * stage_bytes;  // where the stages of this chunk and of the next copy begin
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    block_sync();  // the stage has landed for every thread, and nobody still reads the one that is filled next
    if (chunk + kStages - 1 < chunks) load(shared + fill);
    load.next();
    cp_async_commit();
    if constexpr (Mode == kInt8) {
      prefill_chunk_s8<Bits, Groups, Zeros>(shared + read, rows, wm, wn, piece, acc);
    } else {
      prefill_chunk_16<Bits, Groups>(shared + read, rows, wn, piece, acc);
    }
    fill = read;
    read = read == (kStages - 1) * stage_bytes ? 0 : read + stage_bytes;
  }
  finish_prefill<T, Mode, Groups, Zeros>(p, shared, rows, m0, n0, wm, wn, acc);
}

}  // namespace qe
