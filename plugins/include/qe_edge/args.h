// What one kernel launch is told. Plain data, shared by the kernels, the host code and both emulators.
//
// Names: M tokens, K in_features, N out_features; Kp and Np are K and N rounded up to 128 and 32, as the packed
// weights are. Ranks are counted in steps of 16 columns ("tiles"): the shared expert has `shared_tiles`, every
// routed expert has `routed_tiles`; `rank` is 16 * (shared_tiles + routed_tiles), the width of one token's h.
#pragma once
#include <stdint.h>

namespace qe {

struct PrepareArgs {
  const void* x;          // T [M, K]
  const void* inv_omega;  // T [K] or null: multiplies x in the quantized branch only
  const void* router;     // T [E, K] or null: transposed from the canonical [K, E] by prepack
  void* act;              // int8 or T [M, Kp] or null: the operand of `main`
  float* token_scale;     // [M], int8 modes only
  int32_t* expert;        // [M] or null
  int32_t M, K, Kp, E;
  int32_t act_max;        // 127 or 31; 0 keeps the activations in 16 bits
};

struct DownArgs {
  const void* x;            // T [M, K]: adapters see the 16-bit activations, never the quantized ones
  const void* down;         // T or int8, packed: see prepack/layout.py
  const float* down_scale;  // [tiles * 16]; ones for 16-bit adapters
  const int32_t* expert;    // [M], unused when E = 0
  float* partial;           // decode: [splits, M, rank]
  void* h;                  // prefill: T [M, rank]
  int32_t* order;           // prefill: [M] tokens sorted by expert, so that a GEMM tile meets few experts
  int32_t M, K, E, shared_tiles, routed_tiles, splits;
};

struct MainArgs {
  const void* act;           // int8 or T [M, act_stride]
  const float* token_scale;  // [M], int8 modes only
  const uint8_t* weight;     // [Kp/128, Np/8, 32 lanes, 16 bytes]
  const void* scales;        // T [Kp/g, Np]; null when the scale is per output channel
  const uint8_t* zeros;      // [Kp/g or 1, Np], the zero point plus 8
  const float* columns;      // [3, Np]: main scale, output scale, bias
  const float* partial;      // decode: [splits, M, rank]
  const void* h;             // prefill: T [M, rank]
  const void* up;            // T or int8, packed
  const int32_t* expert;     // [M]
  const int32_t* order;      // prefill: [M] or null for the identity
  void* y;                   // T [M, N]
  int32_t M, N, Np, Kp, act_stride;
  int32_t groups_per_chunk;  // scale rows in 128 rows of weights: 0 (per channel), 1 or 2
  int32_t E, shared_tiles, routed_tiles, splits;
  int32_t up_is_int8;
};

}  // namespace qe
