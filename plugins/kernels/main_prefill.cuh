// Launch 3 for M > 16: a tiled GEMM with 16-byte asynchronous copies in three stages. Warp tile 64 x 32, four warps
// across the 128 columns of a block, 1 or 2 across its 64 or 128 rows (chosen at launch: TensorRT times the choices). The
// warp tile is tall because every unpacked weight then serves four matrix instructions.
// Packed weights lie in the order of the tensor core's B fragments: a lane reads its 128 rows of a column tile at once,
// or, of 3-bit weights, a third of its rows of four column tiles.
#pragma once
#include "../include/qe_edge/args.h"
#include "main_decode.cuh"

namespace qe {

constexpr int kPrefillColumns = 128, kStages = 3, kRowTiles = 4, kColumnTiles = 4, kWarpRows = 64, kWarpColumns = 32;
constexpr int kWarpsAcross = kPrefillColumns / kWarpColumns;

// One stage: activations of all rows of the block, weights, scales, zero points.
template <int Bits, int Mode, int Groups, bool Zeros>
struct Stage {
  static constexpr int kRowBytes = Mode == kInt8 ? 128 : 256;  // activations of one token in one chunk
  static constexpr int kWeights = kPrefillColumns / kBlockColumns * kBlockBytes<Bits>;
  static constexpr int kScales = Groups * kPrefillColumns * 2;
  static constexpr int kZeros = Zeros ? Groups * kPrefillColumns : 0;
  static constexpr int kBytesBeyondRows = kWeights + kScales + kZeros;
  // Eight rows of one 16-byte column are read together: the flip sends them to different banks.
  static QE_DEV int offset(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }
};

// Asynchronous copies, chunk after chunk. Rows beyond M and columns beyond Np repeat the last valid ones: their results
// are never stored. A thread copies the same places of every chunk, so that only a few pointers move.
template <int Bits, int Mode, int Groups, bool Zeros>
struct Loader {
  using S = Stage<Bits, Mode, Groups, Zeros>;
  static constexpr int kPieces = S::kRowBytes / 16, kRowsAtOnce = 32 / kPieces, kCopies = 16 / kRowsAtOnce;
  int rows;
  int to_act, to_weights, to_group;  // bytes from the start of a stage
  const uint8_t *act, *weight, *scales, *zeros;
  uint32_t source[kCopies];  // where the rows of the activations start, in 16-byte pieces

  QE_DEV Loader(const MainArgs& p, int block_rows, int m0, int n0) : rows(block_rows) {
    const int lane = thread_id() & 31, warp = thread_id() >> 5, warps = block_threads() >> 5, chunks = p.Kp / kChunk;
    const int row0 = warp * 16 + lane / kPieces, piece = lane % kPieces, last_block = p.Np / kBlockColumns - 1;
    act = static_cast<const uint8_t*>(p.act) + piece * 16;
    QE_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      const int from = token(p, m0 + row0 + j * kRowsAtOnce);
      source[j] = static_cast<uint32_t>(from) * static_cast<uint32_t>(chunks * kPieces);
    }
    to_act = S::offset(row0, piece);

    const int pieces = kPrefillColumns / 8 / warps;  // of one warp; of 3-bit weights four warps copy a block each
    const int first = Bits == 3 ? 0 : warp * pieces, block = n0 / kBlockColumns + (Bits == 3 ? warp : first / 4);
    weight = p.weight + static_cast<size_t>(block < last_block ? block : last_block) * chunks * kBlockBytes<Bits> +
             first % 4 * kPieceBytes + lane * 16;
    to_weights = rows * S::kRowBytes + (Bits == 3 ? warp * 3 : first) * kPieceBytes + lane * 16;

    to_group = rows * S::kRowBytes + S::kWeights + thread_id() * 16;
    scales = group_source(static_cast<const uint8_t*>(p.scales), S::kScales / 64, n0, last_block, chunks);
    zeros = group_source(p.zeros, S::kZeros / 64, n0, last_block, chunks);
  }
  // Where this thread's 16 bytes of four blocks' scales or zero points start; a block has `pieces` of them in a chunk.
  static QE_DEV const uint8_t* group_source(const uint8_t* from, int pieces, int n0, int last_block, int chunks) {
    if (pieces == 0) return from;
    const int block = n0 / kBlockColumns + thread_id() / pieces;
    const size_t first = static_cast<size_t>(block < last_block ? block : last_block) * chunks * pieces;
    return from + (first + thread_id() % pieces) * 16;
  }
  static QE_DEV int token(const MainArgs& p, int m) {
    const int last = m < p.M ? m : p.M - 1;
    return p.order ? p.order[last] : last;
  }
  QE_DEV int stage_bytes() const { return rows * S::kRowBytes + S::kBytesBeyondRows; }

  // Copies the next chunk to the stage at s.
  QE_DEV void operator()(unsigned char* s) {
    QE_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      const int down = j * kRowsAtOnce, flip = down % 8 << 4;  // as S::offset flips a row that is so much further down
      cp_async16(s + (to_act ^ flip) + down * S::kRowBytes, act + static_cast<size_t>(source[j]) * 16);
    }
    QE_UNROLL
    for (int i = 0; i < Bits; ++i)
      if (Bits == 3 ? thread_id() < 128 : i < 2 || block_threads() == 128)
        cp_async16(s + to_weights + i * kPieceBytes, weight + i * kPieceBytes);
    // Copies of nothing are left out; with 4-bit weights that would make ptxas take 185 registers for s8_cz on sm_90.
    if ((Bits == 4 || S::kScales > 0) && thread_id() < S::kScales / 16) cp_async16(s + to_group, scales);
    if ((Bits == 4 || S::kZeros > 0) && thread_id() < S::kZeros / 16) cp_async16(s + to_group + S::kScales, zeros);
    act += S::kRowBytes;
    weight += kBlockBytes<Bits>;
    scales += S::kScales / 4;
    zeros += S::kZeros / 4;
  }
};

// The scales of the eight columns that this lane's accumulators hold: [column & 1][column tile].
QE_DEV void stage_scales(const unsigned char* scales, float (&s)[2][kColumnTiles]) {
  const u32x4 pairs = load16(scales + (thread_id() & 3) * 16);
  QE_UNROLL
  for (int i = 0; i < 8; ++i)
    s[i / 4][i % 4] = to_float(f16_t{static_cast<uint16_t>(pairs.v[i / 2] >> (16 * (i & 1)))});
}

// A fragments of 16 rows from `row` on: 16-byte pieces first, first + 1, ... of each.
template <class S, int Steps>
QE_DEV void load_rows(const unsigned char* s, int row, int first, uint32_t (&a)[Steps][4]) {
  const int lane = thread_id() & 31;
  QE_UNROLL
  for (int step = 0; step < Steps; ++step)
    load_matrix(a[step], s + S::offset(row + (lane & 15), first + step * 2 + (lane >> 4)));
}

QE_DEV void load_words(const unsigned char* weights, BlockWords<3>& w) {
  QE_UNROLL
  for (int i = 0; i < 3; ++i) w[i] = load16(weights + i * kPieceBytes);
}

// Whether all weights of a chunk are unpacked at once. Halves take fewer registers; but a group of 128 rows is one sum,
// and 3-bit groups of 64 made ptxas compute addresses again in every pass (2.07 instructions per 1000 MAC, not 1.84).
template <int Bits, int Groups>
constexpr bool kWholeChunk = Groups == 1 || (Groups == 2 && Bits == 3);

// A chunk, or one half of it. The unpacked weights of the warp's columns stay in registers while its rows pass: they
// take half of the registers that the rows would.
template <int Bits, int Groups, bool Zeros, int Part, class Acc>
QE_DEV void prefill_part_s8(const unsigned char* s, int rows, int wm, int wn, Acc (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<Bits, kInt8, Groups, Zeros>;
  constexpr int kSteps = kWholeChunk<Bits, Groups> ? 4 : 2;  // of k32
  constexpr int kFirst = Part * 2 * kSteps;                  // the first register of 16 rows
  constexpr int kSums = kSteps == 4 && Groups == 2 ? 2 : 1, kSumSteps = kSteps / kSums;
  const int lane = thread_id() & 31;
  const unsigned char* scales = s + rows * S::kRowBytes + S::kWeights;
  const unsigned char* weights = s + rows * S::kRowBytes + wn * (16 * Bits) + lane * 16;
  float scale[kSums][2][kColumnTiles];
  uint32_t zeros = 0;
  if constexpr (Groups != 0) {
    QE_UNROLL
    for (int g = 0; g < kSums; ++g)
      stage_scales(scales + (wn * Groups + (Part + g) * kBlockColumns) * 2, scale[g]);
    if (Zeros) zeros = load4(scales + S::kScales + wn * Groups + Part * kBlockColumns + (lane >> 2) * 4);
  }
  const uint32_t zero[4] = {zero_bytes<0>(zeros), zero_bytes<1>(zeros), zero_bytes<2>(zeros), zero_bytes<3>(zeros)};
  BlockWords<Bits> w;
  if constexpr (Bits == 3) load_words(weights, w);
  uint32_t b[kColumnTiles][2 * kSteps];
  QE_UNROLL
  for (int j = 0; j < kColumnTiles; ++j) {
    if (Bits == 4) w[j] = load16(weights + j * kPieceBytes);
    QE_UNROLL
    for (int c = 0; c < 2 * kSteps; ++c) {
      if constexpr (Bits == 3) {
        b[j][c] = int8_codes3(w, j, kFirst + c);
        continue;
      }
      const uint32_t word = w[j].v[(kFirst + c) & 3];
      const bool high = kFirst + c >= 4;
      if constexpr (Groups != 0 && Zeros) {
        b[j][c] = high ? centred_codes<true>(word, zero[j]) : centred_codes<false>(word, zero[j]);
      } else {
        b[j][c] = high ? high_codes<Zeros>(word) : low_codes<Zeros>(word);
      }
    }
  }
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int g = 0; g < kSums; ++g) {
      uint32_t a[kSumSteps][4];
      load_rows<S>(s, wm + i * 16, kFirst + g * 2 * kSumSteps, a);
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const uint32_t* of_sum = b[j] + g * 2 * kSumSteps;
        if constexpr (Groups == 0) {
          QE_UNROLL
          for (int step = 0; step < kSteps; ++step)
            mma_s8(acc[i][j], a[step], of_sum[2 * step], of_sum[2 * step + 1], acc[i][j]);
        } else {
          int sum[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
          QE_UNROLL
          for (int step = 0; step < kSumSteps; ++step)
            mma_s8(sum, a[step], of_sum[2 * step], of_sum[2 * step + 1], sum);
          QE_UNROLL
          for (int c = 0; c < 4; ++c) acc[i][j][c] += (int_bits_to_float(sum[c]) - kMagic) * scale[g][c & 1][j];
        }
      }
    }
}

template <int Bits, int Groups, bool Zeros, class Acc>
QE_DEV void prefill_chunk_s8(const unsigned char* s, int rows, int wm, int wn, Acc (&acc)[kRowTiles][kColumnTiles][4]) {
  prefill_part_s8<Bits, Groups, Zeros, 0>(s, rows, wm, wn, acc);
  if constexpr (!kWholeChunk<Bits, Groups>) prefill_part_s8<Bits, Groups, Zeros, 1>(s, rows, wm, wn, acc);
}

// Weights of a group become fp16 numbers (q - z) * scale before the product, as an ONNX DequantizeLinear of a float16
// model would have them: sums of their own per group would cost more, in registers above all. Without groups, codes are
// multiplied as they are.
template <int Bits, int Groups>
QE_DEV void prefill_chunk_16(const unsigned char* s, int rows, int wm, int wn,
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
        load_rows<S>(s, wm + i * 16, half * 8 + block * 4, a);
        QE_UNROLL
        for (int step = 0; step < 2; ++step)
          QE_UNROLL
          for (int j = 0; j < kColumnTiles; ++j) mma_16<f16_t>(acc[i][j], a[step], b[j][step][0], b[j][step][1]);
      }
    }
  }
}

// h @ up for the 64 rows of a warp, 16 ranks at a time. Rows come sorted by expert, so most warps see one or two.
template <class T>
QE_DEV void prefill_lowrank(const MainArgs& p, const int (&token)[kRowTiles][2], int column0,
                            float (&out)[kRowTiles][kColumnTiles][4]) {
  const int lane = thread_id() & 31, rank = 16 * (p.shared_tiles + p.routed_tiles), last_tile = p.Np / 8 - 1;
  int expert[kRowTiles][2] = {};
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h)
      if (p.E) expert[i][h] = p.expert[token[i][h]];
  for (int e = -1; e < p.E; ++e) {
    bool wanted = e < 0;
    QE_UNROLL
    for (int i = 0; i < kRowTiles; ++i) wanted = wanted || expert[i][0] == e || expert[i][1] == e;
    if (!ballot(wanted)) continue;
    const int tiles = e < 0 ? p.shared_tiles : p.routed_tiles;
    const int h0 = e < 0 ? 0 : p.shared_tiles, up0 = e < 0 ? 0 : p.shared_tiles + e * p.routed_tiles;
    for (int step = 0; step < tiles; ++step) {
      uint32_t x[kRowTiles][4];
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i)
        QE_UNROLL
        for (int h = 0; h < 2; ++h) {
          const T* row = static_cast<const T*>(p.h) + static_cast<size_t>(token[i][h]) * rank + (h0 + step) * 16 +
                         (lane & 3) * 2;
          const bool routed_here = e < 0 || expert[i][h] == e;
          x[i][h] = routed_here ? load4(row) : 0u;
          x[i][2 + h] = routed_here ? load4(row + 8) : 0u;
        }
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int tile = column0 / 8 + j;
        const size_t at = static_cast<size_t>(up0 + step) * (p.Np / 8) + (tile < last_tile ? tile : last_tile);
        const u32x2 u = load_up<T>(p.up, p.up_is_int8, at, lane);
        QE_UNROLL
        for (int i = 0; i < kRowTiles; ++i) mma_16<T>(out[i][j], x[i], u.v[0], u.v[1]);
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
    cp_async_commit();
  }
  int read = 0, fill = (kStages - 1) * stage_bytes;  // where the stages of this chunk and of the next copy begin
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    block_sync();  // the stage has landed for every thread, and nobody still reads the one that is filled next
    if (chunk + kStages - 1 < chunks) load(shared + fill);
    cp_async_commit();
    if constexpr (Mode == kInt8) {
      prefill_chunk_s8<Bits, Groups, Zeros>(shared + read, rows, wm, wn, acc);
    } else {
      prefill_chunk_16<Bits, Groups>(shared + read, rows, wm, wn, acc);
    }
    fill = read;
    read = read == (kStages - 1) * stage_bytes ? 0 : read + stage_bytes;
  }
  cp_async_wait<0>();

  constexpr bool kWholeColumn = Zeros && Groups == 0;
  int token[kRowTiles][2];
  float out[kRowTiles][kColumnTiles][4];
  int z[2][4] = {};
  if (kWholeColumn) {
    const int at = n0 + wn < p.Np ? n0 + wn : p.Np - kWarpColumns;
    const u32x2 zeros = load8(p.zeros + at + (lane & 3) * 8);
    unpack_zeros(zeros.v[0], z[0]);
    unpack_zeros(zeros.v[1], z[1]);
  }
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int m = m0 + wm + i * 16 + h * 8 + (lane >> 2), last = m < p.M ? m : p.M - 1;
      token[i][h] = p.order ? p.order[last] : last;
      const float sx = p.token_scale[token[i][h]];
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int at = n0 + wn + j * 8, n = (at < p.Np ? at : p.Np - 8) + (lane & 3) * 2;
        QE_UNROLL
        for (int c = 0; c < 2; ++c)
          out[i][j][2 * h + c] = without_zero<Mode, kWholeColumn>(p, acc[i][j][2 * h + c], z[c][j], token[i][h]) *
                                 (p.columns[n + c] * sx);
      }
    }
  prefill_lowrank<T>(p, token, n0 + wn, out);
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (m0 + wm + i * 16 + h * 8 + (lane >> 2) >= p.M) continue;
      T* row = static_cast<T*>(p.y) + static_cast<size_t>(token[i][h]) * p.N;
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int n = n0 + wn + j * 8 + (lane & 3) * 2;
        if (n >= p.N) continue;
        const float* scale = p.columns + p.Np + n;
        const float* bias = p.columns + 2 * p.Np + n;
        store4(row + n, pack2<T>(out[i][j][2 * h] * scale[0] + bias[0], out[i][j][2 * h + 1] * scale[1] + bias[1]));
      }
    }
}

}  // namespace qe
