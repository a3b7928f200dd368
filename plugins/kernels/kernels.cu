// Every kernel that ships, once per line of kernel_list.h.
#include "lowrank_down.cuh"
#include "main_cluster.cuh"
#include "main_decode.cuh"
#include "main_prefill.cuh"
#include "main_prefill_wide.cuh"
#include "prepare.cuh"
#include "prepare_prefill.cuh"

// What follows on the stream may start its own weights' way from memory at once, unless a kernel says so itself.
#define QE_PREPARE(name, T)                                    \
  QE_KERNEL void QE_BOUNDS(1024) name(qe::PrepareArgs p) {     \
    qe::release_next();                                        \
    qe::prepare<qe::T>(p);                                     \
  }
#define QE_DOWN_DECODE(name, T, bits)                          \
  QE_KERNEL void QE_BOUNDS(256, 1) name(qe::DownArgs p) {      \
    qe::release_next();                                        \
    qe::lowrank_down_decode<qe::T, bits>(p);                   \
  }
#define QE_PREPARE_DOWN(name, T, bits)                         \
  QE_KERNEL void QE_BOUNDS(512, 1) name(qe::PrepareDownArgs p) {  \
    qe::release_next();                                        \
    qe::prepare_and_down<qe::T, bits>(p);                      \
  }
#define QE_PREPARE_PREFILL(name, T, bits)                      \
  QE_KERNEL void QE_BOUNDS(512, 1) name(qe::PrepareDownArgs p) {  \
    qe::prepare_prefill<qe::T, bits>(p);                       \
  }
#define QE_DOWN_PREFILL(name, T, bits)                         \
  QE_KERNEL void QE_BOUNDS(256, 1) name(qe::DownArgs p) {      \
    qe::lowrank_down_prefill<qe::T, bits>(p);                  \
  }
#define QE_MAIN_DECODE(name, T, bits, mode, groups, zeros, tokens8)         \
  QE_KERNEL void QE_BOUNDS(384, 1) name(qe::MainArgs p) {                   \
    qe::release_next();                                                     \
    qe::main_decode<qe::T, bits, qe::mode, groups, zeros, tokens8>(p);      \
  }
// Two blocks on a multiprocessor, so that the weights of the launch that follows are on their way while this one still runs.
#define QE_MAIN_CLUSTER(name, T, bits, mode, groups, zeros)                 \
  QE_KERNEL void QE_BOUNDS(256, 2) name(qe::ClusterArgs p) {                \
    qe::release_next();                                                     \
    qe::main_cluster<qe::T, bits, qe::mode, groups, zeros>(p);              \
  }
// Bounds chosen by the registers that the assembler then takes, 128 to 184. Without groups 168 leave room for three blocks of
// 128 threads on a multiprocessor. Of the others 0 as the second number makes it spend no more than 184, and 3-bit weights with 16-bit
// activations fewer than they need.
#define QE_LIMIT_kInt8_0(bits) QE_REGISTERS(168)
#define QE_LIMIT_kInt8_1(bits) QE_BOUNDS(256, 0)
#define QE_LIMIT_kInt8_2(bits) QE_BOUNDS(256, 0)
#define QE_LIMIT_k16Bit_0(bits) QE_BOUNDS(256, bits == 3)
#define QE_LIMIT_k16Bit_1(bits) QE_BOUNDS(256, bits == 3)
#define QE_LIMIT_k16Bit_2(bits) QE_BOUNDS(256, bits == 3)
#define QE_MAIN_PREFILL(name, T, bits, mode, groups, zeros)          \
  QE_KERNEL void QE_LIMIT_##mode##_##groups(bits) name(qe::MainArgs p) { \
    qe::main_prefill<qe::T, bits, qe::mode, groups, zeros>(p);       \
  }
#define QE_MAIN_PREFILL_WIDE(name, T, bits, zeros)                   \
  QE_KERNEL void QE_BOUNDS(128, 2) name(qe::MainArgs p) {            \
    qe::main_prefill_wide<qe::T, bits, zeros>(p);                    \
  }
#include "kernel_list.h"
