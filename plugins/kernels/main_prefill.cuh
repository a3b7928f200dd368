// Launch 3 for M > 16: a tiled GEMM with 16-byte asynchronous copies in three stages. Warp tile 32 x 64, two warps across
// the 128 columns of a block, 1 to 4 warps across its 32 to 128 rows (chosen at launch: TensorRT times the choices).
// Packed weights lie in the order of the tensor core's B fragments: a lane reads its 128 rows of a column tile at once.
#pragma once
#include "../include/qe_edge/args.h"
#include "main_decode.cuh"

namespace qe {

constexpr int kPrefillColumns = 128, kStages = 3, kRowTiles = 2, kColumnTiles = 8;

template <int Mode, int Groups, bool Zeros>
struct Stage {
  static constexpr int kRowBytes = Mode == kInt8 ? 128 : 256;  // activations of one token in one chunk
  static constexpr int kWeights = kPrefillColumns * 64;
  static constexpr int kScaleRows = Groups == 0 ? 0 : (Mode == kInt8 ? Groups : 2);
  static constexpr int kZeroRows = Zeros ? (kScaleRows == 0 ? 1 : kScaleRows) : 0;
  static constexpr int kScales = kScaleRows * kPrefillColumns * 2;
  static constexpr int kBytesBeyondRows = kWeights + kScales + kZeroRows * kPrefillColumns;
  // Eight rows of one 16-byte column are read together: the flip sends them to different banks.
  static QE_DEV int offset(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }
};

// Asynchronous copy of chunk `chunk` into its stage. Rows beyond M and columns beyond Np repeat the last valid one:
// their results are never stored.
template <int Mode, int Groups, bool Zeros>
struct Loader {
  using S = Stage<Mode, Groups, Zeros>;
  const MainArgs& p;
  unsigned char* shared;
  int rows, stage_bytes, n0;
  uint32_t source[S::kRowBytes / 32];  // where this thread's rows of the activations start, in 16-byte pieces

  static constexpr int kPieces = S::kRowBytes / 16;

  QE_DEV Loader(const MainArgs& args, unsigned char* base, int block_rows, int m0, int column0)
      : p(args), shared(base), rows(block_rows), stage_bytes(block_rows * S::kRowBytes + S::kBytesBeyondRows),
        n0(column0) {
    QE_UNROLL
    for (int j = 0; j < S::kRowBytes / 32; ++j) {
      const int m = m0 + row(j), last = m < p.M ? m : p.M - 1, token = p.order ? p.order[last] : last;
      source[j] = static_cast<uint32_t>(token) * (p.act_stride / (Mode == kInt8 ? 16 : 8)) + piece();
    }
  }
  // Block threads are 2 * rows: piece() is the same for all of a thread's copies.
  QE_DEV int piece() const { return thread_id() % kPieces; }
  QE_DEV int row(int j) const { return (thread_id() + j * block_threads()) / kPieces; }
  QE_DEV unsigned char* stage(int chunk) const { return shared + (chunk % kStages) * stage_bytes; }

  QE_DEV void operator()(int chunk) const {
    unsigned char* s = stage(chunk);
    QE_UNROLL
    for (int j = 0; j < S::kRowBytes / 32; ++j)
      cp_async16(s + S::offset(row(j), piece()),
                 static_cast<const uint8_t*>(p.act) + static_cast<size_t>(source[j] + chunk * kPieces) * 16);
    s += rows * S::kRowBytes;
    const int last_tile = p.Np / 8 - 1;
    for (int i = thread_id(); i < S::kWeights / 16; i += block_threads()) {
      const int tile = n0 / 8 + i / 32;
      cp_async16(s + i * 16, p.weight + (static_cast<size_t>(chunk) * (p.Np / 8) + (tile < last_tile ? tile : last_tile)) *
                                            kTileBytes + (i & 31) * 16);
    }
    if (S::kScaleRows && thread_id() < p.groups_per_chunk * (kPrefillColumns / 8)) {
      const int r = thread_id() / 16, c = thread_id() % 16, at = n0 + c * 8;
      cp_async16(s + S::kWeights + r * 256 + c * 16,
                 static_cast<const uint16_t*>(p.scales) +
                     (static_cast<size_t>(chunk) * p.groups_per_chunk + r) * p.Np + (at < p.Np ? at : p.Np - 8));
    }
    const int zero_rows = Groups == 0 ? 1 : p.groups_per_chunk;
    if (Zeros && thread_id() < zero_rows * (kPrefillColumns / 16)) {
      const int r = thread_id() / 8, c = thread_id() % 8, at = n0 + c * 16;
      const size_t from = Groups == 0 ? 0 : static_cast<size_t>(chunk) * zero_rows + r;
      cp_async16(s + S::kWeights + S::kScales + r * 128 + c * 16,
                 p.zeros + from * p.Np + (at < p.Np ? at : p.Np - 16));
    }
  }
};

// The scale of the two columns that this lane's accumulators hold.
template <class T>
QE_DEV void stage_scales(const unsigned char* scales, int row, int column, float (&s)[2]) {
  const uint32_t pair = load4(scales + row * 256 + column * 2);
  s[0] = to_float(T{static_cast<uint16_t>(pair)});
  s[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T, int Groups, bool Zeros, class Acc>
QE_DEV void prefill_chunk_s8(const unsigned char* s, int rows, int wm, int wn, Acc (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<kInt8, Groups, Zeros>;
  constexpr int kGroups = Groups == 2 ? 2 : 1, kWords = 8 / kGroups;  // of 16 rows each, in one group
  const int lane = thread_id() & 31;
  uint32_t a[kRowTiles][4][4];  // [row tile][k32 step][register]
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int step = 0; step < 4; ++step)
      load_matrix(a[i][step], s + S::offset(wm + i * 16 + (lane & 15), step * 2 + (lane >> 4)));
  const unsigned char* weights = s + rows * S::kRowBytes + wn * 64 + lane * 16;
  const unsigned char* scales = s + rows * S::kRowBytes + S::kWeights;
  const unsigned char* zeros = scales + S::kScales + wn + (lane >> 2);
  QE_UNROLL
  for (int j = 0; j < kColumnTiles; ++j) {
    const u32x4 w = load16(weights + j * kTileBytes);
    QE_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const uint32_t zero = Zeros ? zeros[group * 128 + j * 8] * 0x01010101u : 0u;
      uint32_t b[kWords];
      QE_UNROLL
      for (int c = 0; c < kWords; ++c)
        b[c] = group * kWords + c < 4 ? unpack_low<Zeros>(w.v[c & 3], zero) : unpack_high<Zeros>(w.v[c & 3], zero);
      float scale[2] = {1.f, 1.f};
      if constexpr (Groups != 0) stage_scales<T>(scales, group, wn + j * 8 + (lane & 3) * 2, scale);
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (Groups == 0) {
          QE_UNROLL
          for (int step = 0; step < 4; ++step) mma_s8(acc[i][j], a[i][step], b[2 * step], b[2 * step + 1], acc[i][j]);
        } else {
          int sum[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
          QE_UNROLL
          for (int step = 0; step < kWords / 2; ++step)
            mma_s8(sum, a[i][group * (kWords / 2) + step], b[2 * step], b[2 * step + 1], sum);
          QE_UNROLL
          for (int c = 0; c < 4; ++c) acc[i][j][c] += (int_bits_to_float(sum[c]) - kMagic) * scale[c & 1];
        }
      }
    }
  }
}

template <class T, int Groups>
QE_DEV void prefill_chunk_16(const unsigned char* s, int rows, int groups_per_chunk, int wm, int wn,
                             float (&acc)[kRowTiles][kColumnTiles][4]) {
  using S = Stage<k16Bit, Groups, true>;
  const int lane = thread_id() & 31;
  const unsigned char* weights = s + rows * S::kRowBytes + wn * 64 + lane * 16;
  const unsigned char* scales = s + rows * S::kRowBytes + S::kWeights;
  const unsigned char* zeros = scales + S::kScales + wn + (lane >> 2);
  QE_NO_UNROLL  // unrolled, the compiler keeps both halves' loads in flight and needs 255 registers
  for (int half = 0; half < 2; ++half) {
    const int group = Groups == 0 ? 0 : half * (groups_per_chunk - 1);
    uint32_t a[kRowTiles][4][4];  // [row tile][k16 step][register]
    QE_UNROLL
    for (int i = 0; i < kRowTiles; ++i)
      QE_UNROLL
      for (int step = 0; step < 4; ++step)
        load_matrix(a[i][step], s + S::offset(wm + i * 16 + (lane & 15), half * 8 + step * 2 + (lane >> 4)));
    QE_UNROLL
    for (int j = 0; j < kColumnTiles; ++j) {
      const u32x2 w = load8(weights + j * kTileBytes + half * 8);
      const Unpack16<T> unpack(zeros[group * 128 + j * 8]);
      float sum[kRowTiles][4];
      QE_UNROLL
      for (int i = 0; i < kRowTiles; ++i)
        QE_UNROLL
        for (int c = 0; c < 4; ++c) sum[i][c] = 0.f;
      QE_UNROLL
      for (int block = 0; block < 2; ++block) {
        uint32_t b[4];
        unpack(w.v[block], b);
        QE_UNROLL
        for (int step = 0; step < 2; ++step)
          QE_UNROLL
          for (int i = 0; i < kRowTiles; ++i)
            mma_16<T>(Groups == 0 ? acc[i][j] : sum[i], a[i][block * 2 + step], b[2 * step], b[2 * step + 1]);
      }
      if (Groups != 0) {
        float scale[2];
        stage_scales<T>(scales, group, wn + j * 8 + (lane & 3) * 2, scale);
        QE_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
          QE_UNROLL
          for (int c = 0; c < 4; ++c) acc[i][j][c] += sum[i][c] * scale[c & 1];
      }
    }
  }
}

// h @ up for the 32 rows of a warp, 16 ranks at a time. Rows come sorted by expert, so most warps see one or two.
template <class T>
QE_DEV void prefill_lowrank(const MainArgs& p, const int (&token)[kRowTiles][2], int row0, int column0,
                            float (&out)[kRowTiles][kColumnTiles][4]) {
  const int lane = thread_id() & 31, rank = 16 * (p.shared_tiles + p.routed_tiles), last_tile = p.Np / 8 - 1;
  int expert[kRowTiles][2] = {{-1, -1}, {-1, -1}}, mine = -1;
  if (p.E) {
    const int m = row0 + lane < p.M ? row0 + lane : p.M - 1;
    mine = p.expert[p.order ? p.order[m] : m];
    QE_UNROLL
    for (int i = 0; i < kRowTiles; ++i)
      QE_UNROLL
      for (int h = 0; h < 2; ++h) expert[i][h] = p.expert[token[i][h]];
  }
  for (int e = -1; e < p.E; ++e) {
    if (e >= 0 && !ballot(mine == e)) continue;
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

template <class T, int Mode, int Groups, bool Zeros>
QE_DEV void main_prefill(const MainArgs& p) {
  QE_DYNAMIC_SHARED(shared);
  const int lane = thread_id() & 31, warp = thread_id() >> 5, rows = block_threads() / 2;
  const int wm = (warp >> 1) * 32, wn = (warp & 1) * 64, m0 = block_y() * rows, n0 = block_x() * kPrefillColumns;
  const int chunks = p.Kp / kChunk;
  const Loader<Mode, Groups, Zeros> load(p, shared, rows, m0, n0);

  typename Accumulator<Mode == kInt8 && Groups == 0>::type acc[kRowTiles][kColumnTiles][4];
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int j = 0; j < kColumnTiles; ++j)
      QE_UNROLL
      for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < chunks) load(s);
    cp_async_commit();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    block_sync();  // the stage has landed for every thread, and nobody still reads the one that is filled next
    if (chunk + kStages - 1 < chunks) load(chunk + kStages - 1);
    cp_async_commit();
    if constexpr (Mode == kInt8) {
      prefill_chunk_s8<T, Groups, Zeros>(load.stage(chunk), rows, wm, wn, acc);
    } else {
      prefill_chunk_16<T, Groups>(load.stage(chunk), rows, p.groups_per_chunk, wm, wn, acc);
    }
  }
  cp_async_wait<0>();

  int token[kRowTiles][2];
  float out[kRowTiles][kColumnTiles][4];
  QE_UNROLL
  for (int i = 0; i < kRowTiles; ++i)
    QE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int m = m0 + wm + i * 16 + h * 8 + (lane >> 2), last = m < p.M ? m : p.M - 1;
      token[i][h] = p.order ? p.order[last] : last;
      const float sx = Mode == kInt8 ? p.token_scale[token[i][h]] : 1.f;
      QE_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int at = n0 + wn + j * 8, n = (at < p.Np ? at : p.Np - 8) + (lane & 3) * 2;
        QE_UNROLL
        for (int c = 0; c < 2; ++c)
          out[i][j][2 * h + c] = static_cast<float>(acc[i][j][2 * h + c]) * (p.columns[n + c] * sx);
      }
    }
  prefill_lowrank<T>(p, token, m0 + wm, n0 + wn, out);
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
