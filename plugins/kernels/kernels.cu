// Every kernel that ships, once per line of kernel_list.h.
#include "lowrank_down.cuh"
#include "main_decode.cuh"
#include "main_prefill.cuh"
#include "prepare.cuh"

// What follows on the stream may start its own weights' way from memory at once, except behind QE_DOWN_DECODE, which lets
// its `main` start when x is there.
#define QE_PREPARE(name, T)                                    \
  QE_KERNEL void QE_BOUNDS(1024) name(qe::PrepareArgs p) {     \
    qe::release_next();                                        \
    qe::prepare<qe::T>(p);                                     \
  }
#define QE_DOWN_DECODE(name, T, bits)                          \
  QE_KERNEL void QE_BOUNDS(256) name(qe::DownArgs p) {         \
    qe::lowrank_down_decode<qe::T, bits>(p);                   \
  }
#define QE_PREPARE_DOWN(name, T, bits)                         \
  QE_KERNEL void QE_BOUNDS(512, 1) name(qe::PrepareDownArgs p) {  \
    qe::release_next();                                        \
    qe::prepare_and_down<qe::T, bits>(p);                      \
  }
#define QE_DOWN_PREFILL(name, T, bits)                         \
  QE_KERNEL void QE_BOUNDS(256) name(qe::DownArgs p) {         \
    qe::release_next();                                        \
    qe::lowrank_down_prefill<qe::T, bits>(p);                  \
  }
#define QE_MAIN_DECODE(name, T, bits, mode, groups, zeros, tokens8)         \
  QE_KERNEL void QE_BOUNDS(384, 1) name(qe::MainArgs p) {                   \
    qe::release_next();                                                     \
    qe::main_decode<qe::T, bits, qe::mode, groups, zeros, tokens8>(p);      \
  }
// Bounds chosen by the registers that the assembler then takes, 128 to 184. Of int8 activations the second number keeps
// it from squeezing the kernels without groups into 128 at the price of instructions, and makes it spend more than 184
// on the others. Kernels of 16-bit ones may take 184, or it would squeeze some of them too, though only sm_90 and
// sm_110 have shared memory for more than the two blocks of 128 threads that 184 registers allow.
#ifndef QE_LIMIT_kInt8
#define QE_LIMIT_kInt8(groups) QE_BOUNDS(256, groups == 0 ? 1 : 0)
#endif
#define QE_LIMIT_k16Bit(groups) QE_REGISTERS(184)
#define QE_MAIN_PREFILL(name, T, bits, mode, groups, zeros)          \
  QE_KERNEL void QE_LIMIT_##mode(groups) name(qe::MainArgs p) {      \
    qe::release_next();                                              \
    qe::main_prefill<qe::T, bits, qe::mode, groups, zeros>(p);       \
  }
#include "kernel_list.h"
