// Primitives on the source emulator; the counterpart of kernels/prim_ptx.cuh.
#pragma once
#include <math.h>
#include <string.h>

#include "simt.h"

#define QE_DEV inline __attribute__((always_inline))
#define QE_KERNEL static
#define QE_BOUNDS(...)
#define QE_REGISTERS(most)
#define QE_DYNAMIC_SHARED(name) unsigned char* name = qe::dynamic_shared()
#define QE_UNROLL
#define QE_UNROLL_BY(count)
#define QE_EMU_OUT __attribute__((noinline, no_sanitize("thread")))
#define QE_EMU_SITE __builtin_return_address(0)

namespace qe {

QE_EMU_OUT inline unsigned char* dynamic_shared() { return qe_emu::shared_memory; }
QE_EMU_OUT inline int thread_id() { return qe_emu::now.thread; }
QE_EMU_OUT inline int block_threads() { return qe_emu::now.threads; }
QE_EMU_OUT inline int block_x() { return qe_emu::now.block_x; }
QE_EMU_OUT inline int grid_x() { return qe_emu::now.grid_x; }
QE_EMU_OUT inline int block_y() { return qe_emu::now.block_y; }

template <class To, class From>
QE_EMU_OUT inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs equal sizes");
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}

QE_EMU_OUT inline float to_float(f16_t h) { return static_cast<float>(bits_as<_Float16>(h.bits)); }
QE_EMU_OUT inline float to_float(bf16_t h) { return bits_as<float>(static_cast<uint32_t>(h.bits) << 16); }

template <class T>
T from_float(float f);
template <>
QE_EMU_OUT inline f16_t from_float<f16_t>(float f) {
  return {bits_as<uint16_t>(static_cast<_Float16>(f))};
}
template <>
QE_EMU_OUT inline bf16_t from_float<bf16_t>(float f) {
  const uint32_t u = bits_as<uint32_t>(f);
  if (f != f) return {0x7FFF};
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
template <class T>
QE_DEV uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}
QE_DEV float half_of(uint32_t pair, int i) { return to_float(f16_t{static_cast<uint16_t>(pair >> (16 * i))}); }
QE_DEV uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return pack2<f16_t>(half_of(a, 0) - half_of(b, 0), half_of(a, 1) - half_of(b, 1));
}
QE_DEV uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return pack2<f16_t>(half_of(a, 0) * half_of(b, 0), half_of(a, 1) * half_of(b, 1));
}
QE_DEV uint32_t neg_f16x2(uint32_t a) { return a ^ 0x80008000u; }
QE_DEV uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pack2<f16_t>(fmaf(half_of(a, 0), half_of(b, 0), half_of(c, 0)), fmaf(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}

QE_DEV uint32_t and_or(uint32_t a, uint32_t mask, uint32_t base) { return (a & mask) | base; }
template <uint32_t Mask>
QE_DEV uint32_t select_bits(uint32_t a, uint32_t b) {
  return (a & Mask) | (b & ~Mask);
}
template <bool Upper>
QE_DEV uint32_t repeat_half(uint32_t word) {
  const uint32_t half = (Upper ? word >> 16 : word) & 0xFFFFu;
  return half << 16 | half;
}
QE_DEV uint32_t pick_bytes_at(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = (selector >> (4 * i)) & 7u;
    r |= (((from < 4 ? low : high) >> (8 * (from & 3u))) & 0xFFu) << (8 * i);
  }
  return r;
}
template <uint32_t Selector>
QE_DEV uint32_t pick_bytes(uint32_t low, uint32_t high = 0u) {
  return pick_bytes_at(low, high, Selector);
}
QE_DEV uint32_t rotate_right(uint32_t v, uint32_t by) { return by ? (v >> by) | (v << (32 - by)) : v; }
QE_DEV float int_bits_to_float(int v) { return bits_as<float>(v); }
QE_DEV int float_to_int_bits(float v) { return bits_as<int>(v); }
QE_DEV float divide_rn(float a, float b) { return a / b; }
QE_DEV float reciprocal(float v) { return 1.f / v; }
QE_DEV int round_to_int(float v) { return static_cast<int>(nearbyintf(v)); }
QE_DEV float abs_f(float v) { return fabsf(v); }
QE_DEV float max_f(float a, float b) { return fmaxf(a, b); }
QE_DEV float fma_f(float a, float b, float c) { return fmaf(a, b, c); }
QE_DEV int popcount(uint32_t v) { return __builtin_popcount(v); }

QE_DEV void cp_async16(void* dst, const void* src) { qe_emu::copy_async(dst, src); }
QE_DEV void cp_async_commit() { qe_emu::copy_commit(); }
template <int Pending>
QE_DEV void cp_async_wait() {
  qe_emu::copy_wait(Pending);
}

// One checked access of the whole width: a vector load must be aligned to its size. The 16-bit ones are here too,
// because the sanitizer does not report copies of the one-member structs f16_t and bf16_t.
template <class V>
QE_EMU_OUT inline V checked_load(const void* p) {
  qe_emu::on_access(p, sizeof(V), false, sizeof(V));
  V v{};
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
QE_EMU_OUT inline void checked_store(void* p, V v) {
  qe_emu::on_access(p, sizeof(V), true, sizeof(V));
  memcpy(p, &v, sizeof v);
}
QE_DEV u32x4 load16(const void* p) { return checked_load<u32x4>(p); }
QE_DEV u32x4 load16_stream(const void* p) { return checked_load<u32x4>(p); }
QE_DEV u32x2 load8(const void* p) { return checked_load<u32x2>(p); }
QE_DEV u32x2 load8_stream(const void* p) { return checked_load<u32x2>(p); }
QE_DEV uint16_t load2(const void* p) { return checked_load<uint16_t>(p); }
QE_DEV uint32_t load4(const void* p) { return checked_load<uint32_t>(p); }
QE_DEV void store2(void* p, uint16_t v) { checked_store(p, v); }
QE_DEV void store4(void* p, uint32_t v) { checked_store(p, v); }
QE_DEV void store8(void* p, u32x2 v) { checked_store(p, v); }
QE_DEV void store16(void* p, u32x4 v) { checked_store(p, v); }

QE_EMU_OUT inline void collective(qe_emu::Collective kind, const void* in, void* out) {
  qe_emu::collective(kind, in, out, QE_EMU_SITE);
}
QE_DEV void load_matrix(uint32_t (&r)[4], const void* row) { collective(qe_emu::Collective::kLoadMatrix, &row, r); }
QE_EMU_OUT inline qe_emu::MmaIn mma_operands(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const void* c) {
  qe_emu::MmaIn m;
  memcpy(m.a, a, sizeof m.a);
  m.b[0] = b0, m.b[1] = b1;
  memcpy(m.ci, c, sizeof m.ci);
  return m;
}
QE_DEV void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  const qe_emu::MmaIn m = mma_operands(a, b0, b1, c);
  collective(qe_emu::Collective::kMmaS8, &m, d);
}
template <class T>
QE_DEV void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const qe_emu::MmaIn m = mma_operands(a, b0, b1, c);
  collective(sizeof(T) == 2 && __is_same(T, f16_t) ? qe_emu::Collective::kMmaF16 : qe_emu::Collective::kMmaBf16, &m, c);
}
QE_DEV void mma_f16_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  const qe_emu::MmaIn m = mma_operands(a, b, 0, c);
  collective(qe_emu::Collective::kMmaF16K8, &m, c);
}
QE_DEV void release_next() {}
QE_DEV void wait_for_previous() { qe_emu::wait_for_previous(); }
QE_DEV void prefetch_line(const void* p) { qe_emu::prefetch(p); }
QE_EMU_OUT inline uint32_t count_up(uint32_t* counter, uint32_t last) { return qe_emu::count_up(counter, last); }
QE_DEV void device_fence() { qe_emu::device_fence(); }
QE_EMU_OUT inline float load_fresh(const float* p) {
  qe_emu::on_fresh_read(p, sizeof(float));
  float v;
  memcpy(&v, p, sizeof v);
  return v;
}
QE_EMU_OUT inline void load_fresh(const float* p, float (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(p) % 16) qe_emu::report("misaligned access");
  qe_emu::on_fresh_read(p, sizeof v);
  memcpy(v, p, sizeof v);
}
QE_DEV void hold(float&) {}
QE_DEV float shuffle_xor(float v, int mask) {
  const qe_emu::ShuffleIn in{v, mask};
  float out;
  collective(qe_emu::Collective::kShuffleXor, &in, &out);
  return out;
}
QE_DEV uint32_t shuffle_xor(uint32_t v, int mask) {
  return static_cast<uint32_t>(float_to_int_bits(shuffle_xor(int_bits_to_float(static_cast<int>(v)), mask)));
}
QE_DEV uint32_t ballot(bool v) {
  uint32_t out;
  collective(qe_emu::Collective::kBallot, &v, &out);
  return out;
}
QE_DEV void warp_sync() {}  // it only keeps ptxas from moving loads: no kernel relies on it
QE_EMU_OUT inline void block_sync() { qe_emu::barrier(QE_EMU_SITE); }
QE_EMU_OUT inline void group_sync(int group, int threads) {
  const qe_emu::GroupIn in{group, threads};
  qe_emu::collective(qe_emu::Collective::kGroupSync, &in, nullptr, QE_EMU_SITE);
}

QE_EMU_OUT inline int cluster_rank() { return qe_emu::now.rank; }
QE_EMU_OUT inline void cluster_arrive() {
  qe_emu::collective(qe_emu::Collective::kClusterArrive, nullptr, nullptr, QE_EMU_SITE);
}
QE_EMU_OUT inline void cluster_wait() {
  qe_emu::collective(qe_emu::Collective::kClusterWait, nullptr, nullptr, QE_EMU_SITE);
}
QE_EMU_OUT inline void open_box(uint64_t* box, int bytes) { qe_emu::open_box(box, bytes); }
QE_EMU_OUT inline void boxes_are_open() { qe_emu::boxes_are_open(); }
QE_EMU_OUT inline void send(float* own, uint64_t* box, int rank, float v) { qe_emu::send(own, box, rank, &v, 1); }
QE_EMU_OUT inline void send(float* own, uint64_t* box, int rank, const float (&v)[4]) { qe_emu::send(own, box, rank, v, 4); }
QE_EMU_OUT inline void wait_for_box(uint64_t* box) { qe_emu::wait_for_box(box); }

}  // namespace qe
