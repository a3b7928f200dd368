// From a problem to at most three kernel launches. Pure C++ without CUDA: the TensorRT plugin, the device script and
// both emulators all launch what this file decides, so what is tested is what ships.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

enum QeDtype { QE_F16 = 0, QE_BF16 = 1 };

// One quantized linear. K = in_features, N = out_features; ranks as stored (any multiple of 1 up to 128).
struct QeProblem {
  int32_t dtype;         // QeDtype of x, y, scales and 16-bit adapters
  int32_t M, N, K;
  int32_t act_bits;      // 0 (16-bit activations), 6 or 8
  int32_t group_size;    // -1 (one scale per output channel), 64 or 128
  int32_t has_zeros;     // asymmetric weights
  int32_t has_inv_omega;
  int32_t rank_shared, rank_routed, num_experts;
  int32_t adapter_bits;  // of both low-rank factors: 16, or integers of 8 or 4 with a scale per column
  int32_t weight_bits;   // of the packed weights: 4, or 3 where QeRefuse knows kernels
};

// What TensorRT may time against each other. Zero means: choose for me.
struct QeTactic {
  int32_t block_rows;    // prefill: rows of the GEMM tile, 64 or (int8 activations) 128
  int32_t decode_warps;  // decode: warps that split K, 2, 4 or 8
  int32_t multiprocessors;  // of the GPU, so that the plan can fill it
  int32_t clusters;         // 1: blocks of a cluster can reach each other's shared memory, as from compute capability 9.0 on
};

// Device addresses. Unused ones are zero. `workspace` has QeWorkspaceBytes(problem) bytes, 256-byte aligned. `counters` has
// QeCounterBytes(problem) bytes that are zero before the first launch; every plan leaves them zero. Plans that share them
// must not run at the same time. Without them decode does not split K over blocks.
struct QeBuffers {
  uint64_t x, weight, scales, zeros, columns, inv_omega, down, down_scale, up, router, y, workspace, counters;
};

struct QeLaunch {
  char kernel[48];
  uint32_t grid_x, grid_y, threads, shared_bytes, args_bytes;
  uint32_t overlaps;  // 1: may start before the launch in front of it ends, because the kernel waits for that itself
  uint32_t cluster;   // blocks beside each other in x that form a cluster; 1: none do
  alignas(8) unsigned char args[320];
};

struct QePlan {
  int32_t count;
  QeLaunch launch[3];
};

// Null when the kernels can run the problem, else one sentence that says what is wrong and one that says what to do.
const char* QeRefuse(const QeProblem* problem);
size_t QeWorkspaceBytes(const QeProblem* problem);
size_t QeCounterBytes(const QeProblem* problem);
// The same refusals, plus those of a tactic; fills `plan` only when it returns null.
const char* QeMakePlan(const QeProblem* problem, const QeBuffers* buffers, const QeTactic* tactic, QePlan* plan);

}  // extern "C"
