// The primitive layer: everything that is not plain C++ goes through here, so that the same kernel source runs on a
// GPU (prim_ptx.cuh, the only file with inline PTX) and on the CPU emulator (emulator/prim_host.h).
#pragma once
#include <stdint.h>

namespace qe {
struct f16_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};
struct alignas(16) u32x4 {
  uint32_t v[4];
};
struct alignas(8) u32x2 {
  uint32_t v[2];
};
}  // namespace qe

#ifdef QE_EMULATE
#include "prim_host.h"
#else
#include "prim_ptx.cuh"
#endif
