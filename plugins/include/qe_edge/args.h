// What one kernel launch is told. Plain data, shared by the kernels, the host code and both emulators.
//
// Names: M tokens, K in_features, N out_features; Kp and Np are K and N rounded up to 128 and 32, as the packed
// weights are. Ranks are counted in steps of 16 columns ("tiles"): the shared expert has `shared_tiles`, every
// routed expert has `routed_tiles`; `rank` is 16 * (shared_tiles + routed_tiles), the width of one token's h.
#pragma once
#include <stdint.h>

namespace qe {

// 16-bit activations: how many bits above bit 0 of an fp16 the codes of eight rows stand when `main` multiplies them.
// 4 bits for each of the 16 eights of a chunk, the first in the lowest; see unpack.cuh for both orders.
constexpr uint64_t kCodeShifts4 = 0x4040404040404040, kCodeShifts3 = 0x0636305263041630;

// Sums of int8 activations for a GEMM with two groups in a chunk of K: bytes of one token in one chunk.
constexpr int kTokenSums = 16;

struct PrepareArgs {
  const void* x;          // T [M, K]
  const void* inv_omega;  // T [K] or null: multiplies x in the quantized branch only
  const void* router;     // T [E, K] or null: transposed from the canonical [K, E] by prepack
  void* act;              // int8 or fp16 [M, Kp]: the operand of `main`
  float* token_scale;     // [M]: what one unit of `act` stands for
  void* sums;             // sums of `act` over groups of rows, for zero points, or null; see prepare.cuh
  int32_t* expert;        // [M] or null
  int32_t M, K, Kp, E;
  int32_t act_max;        // 127 or 31; 0 keeps the activations in 16 bits
  int32_t decode_order;   // rows of a chunk in the order of main_decode's lanes instead of their own
  int32_t sum_rows;       // rows of one sum: 64, 128, or 0 for all of K
  uint64_t code_shifts;   // 16-bit activations: kCodeShifts4 or 3, or 0 when `main` takes the factors off the weights
};

struct DownArgs {
  const void* x;            // T [M, K]: adapters see the 16-bit activations, never the quantized ones
  const void* down;         // T, int8 or INT4 codes, packed: see prepack/layout.py
  const float* down_scale;  // [tiles * 16]; ones for 16-bit adapters
  const int32_t* expert;    // [M], unused when E = 0
  float* partial;           // decode: [splits, M, rank]
  void* h;                  // prefill: T [M, rank]
  int32_t* order;           // prefill: [M] tokens sorted by expert, so that a GEMM tile meets few experts
  int32_t M, K, E, shared_tiles, routed_tiles, splits;
};

struct MainArgs {
  const void* act;           // int8 or fp16 [M, Kp]
  const float* token_scale;  // [M]
  const void* sums;          // of `act` over groups of rows, see prepare.cuh
  const uint8_t* weight;     // [Np/32, Kp/128, 4 (tiles) or 3 (words), 32 lanes, 16 bytes]
  const void* scales;        // fp16 [Np/32, Kp/g, 32], in the order of prepack/layout.py, or null (one per column)
  const uint8_t* zeros;      // [Np/32, Kp/g or 1, 32] in that order: zero point plus 8 (3 bits: 4), times 8 for int8
  const float* columns;      // [3, Np]: main scale, output scale, bias
  const float* partial;      // decode: [splits, M, rank]
  const void* h;             // prefill: T [M, rank]
  const void* up;            // T, int8 or INT4 codes, packed
  const int32_t* expert;     // [M]
  const int32_t* order;      // prefill: [M] or null for the identity
  void* y;                   // T [M, N]
  int32_t M, N, Np, Kp;
  int32_t E, shared_tiles, routed_tiles, splits;
  int32_t up_bits;           // 16, 8 or 4
};

}  // namespace qe
