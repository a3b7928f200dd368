// Primitives on a GPU. Every asm statement of the project is in this file; the PTX emulator (rung 3 of the ladder)
// executes what it compiles to, because the source emulator (rung 2) replaces it.
// Conversions are spelled in PTX so that no CUDA header beyond the compiler's own is needed.
#pragma once

#define QE_DEV __device__ __forceinline__
#define QE_KERNEL extern "C" __global__
#define QE_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define QE_REGISTERS(most) __maxnreg__(most)
#define QE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define QE_UNROLL _Pragma("unroll")
#define QE_PRAGMA(text) _Pragma(#text)
#define QE_UNROLL_BY(count) QE_PRAGMA(unroll count)

namespace qe {

QE_DEV int thread_id() { return static_cast<int>(threadIdx.x); }
QE_DEV int block_threads() { return static_cast<int>(blockDim.x); }
QE_DEV int block_x() { return static_cast<int>(blockIdx.x); }
QE_DEV int grid_x() { return static_cast<int>(gridDim.x); }
QE_DEV int block_y() { return static_cast<int>(blockIdx.y); }

QE_DEV float to_float(f16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
QE_DEV float to_float(bf16_t h) { return __uint_as_float(static_cast<uint32_t>(h.bits) << 16); }

template <class T>
QE_DEV T from_float(float f);
template <>
QE_DEV f16_t from_float<f16_t>(float f) {
  f16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
}
template <>
QE_DEV bf16_t from_float<bf16_t>(float f) {
  bf16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
}

// Two values in one register, `lo` in the low half.
template <class T>
QE_DEV uint32_t pack2(float lo, float hi);
template <>
QE_DEV uint32_t pack2<f16_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <>
QE_DEV uint32_t pack2<bf16_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

QE_DEV uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
QE_DEV uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
QE_DEV uint32_t neg_f16x2(uint32_t a) {
  uint32_t r;
  asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// a * b + c, rounded once.
QE_DEV uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// (a & mask) | base in one instruction; left to itself the compiler takes two.
QE_DEV uint32_t and_or(uint32_t a, uint32_t mask, uint32_t base) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(base));
  return r;
}

// Bits of a where the mask has ones, of b elsewhere.
template <uint32_t Mask>
QE_DEV uint32_t select_bits(uint32_t a, uint32_t b) {
  return (a & Mask) | (b & ~Mask);
}

// One half of a word in both halves, said so that ptxas makes it part of the instruction on fp16 pairs that reads it.
template <bool Upper>
QE_DEV uint32_t repeat_half(uint32_t word) {
  uint16_t lo, hi;
  uint32_t r;
  asm("mov.b32 {%0, %1}, %2;" : "=h"(lo), "=h"(hi) : "r"(word));
  asm("mov.b32 %0, {%1, %1};" : "=r"(r) : "h"(Upper ? hi : lo));
  return r;
}

// Four bytes by the nibbles of the selector: 0 to 3 of the first word, 4 to 7 of the second.
QE_DEV uint32_t pick_bytes_at(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
template <uint32_t Selector>
QE_DEV uint32_t pick_bytes(uint32_t low, uint32_t high = 0u) {
  return pick_bytes_at(low, high, Selector);
}
QE_DEV uint32_t rotate_right(uint32_t v, uint32_t by) { return __funnelshift_r(v, v, by); }
QE_DEV float int_bits_to_float(int v) { return __int_as_float(v); }
QE_DEV int float_to_int_bits(float v) { return __float_as_int(v); }
QE_DEV float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
// Within one unit in the last place.
QE_DEV float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
QE_DEV int round_to_int(float v) { return __float2int_rn(v); }
QE_DEV float abs_f(float v) { return fabsf(v); }
QE_DEV float max_f(float a, float b) { return fmaxf(a, b); }
QE_DEV float fma_f(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QE_DEV int popcount(uint32_t v) { return __popc(v); }

QE_DEV uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
QE_DEV void cp_async16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(dst)), "l"(src) : "memory");
}
QE_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
QE_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

QE_DEV u32x4 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
QE_DEV u32x2 load8(const void* p) {
  const uint2 v = *static_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
QE_DEV uint16_t load2(const void* p) { return *static_cast<const uint16_t*>(p); }
QE_DEV uint32_t load4(const void* p) { return *static_cast<const uint32_t*>(p); }
// Weights are read once: they must not push the activations out of L1.
QE_DEV u32x4 load16_stream(const void* p) {
  u32x4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "l"(p));
  return r;
}
QE_DEV u32x2 load8_stream(const void* p) {
  u32x2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.v[0]), "=r"(r.v[1]) : "l"(p));
  return r;
}
QE_DEV void store2(void* p, uint16_t v) { *static_cast<uint16_t*>(p) = v; }
QE_DEV void store4(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
QE_DEV void store8(void* p, u32x2 v) { *static_cast<uint2*>(p) = make_uint2(v.v[0], v.v[1]); }
QE_DEV void store16(void* p, u32x4 v) { *static_cast<uint4*>(p) = make_uint4(v.v[0], v.v[1], v.v[2], v.v[3]); }

// Four 8 x 16-byte matrices: lane i gives the address of row i % 8 of matrix i / 8, and gets 4 bytes of each matrix.
QE_DEV void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d = a[16 x 32] * b[32 x 8] + c, int8 operands, int32 sums. c may be any registers: constants cost nothing.
QE_DEV void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// c += a[16 x 16] * b[16 x 8], 16-bit operands, float sums.
template <class T>
QE_DEV void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
QE_DEV void mma_16<f16_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
QE_DEV void mma_16<bf16_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a[16 x 8] * b[8 x 8], fp16 operands, float sums.
QE_DEV void mma_f16_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Programmatic dependent launch, on chips that have it, from 9.0 on: the launch that follows may start, and this one waits
// until all launches in front of it have ended and what they wrote can be read. What the comments hold becomes code for
// those chips (cmake/sm_90.cmake). Elsewhere nothing overlaps, so that there is no time to fetch anything ahead either.
QE_DEV void release_next() { asm volatile("// sm_90: griddepcontrol.launch_dependents;" ::: "memory"); }
QE_DEV void wait_for_previous() { asm volatile("// sm_90: griddepcontrol.wait;" ::: "memory"); }
QE_DEV void prefetch_line(const void* p) { asm volatile("// sm_90: prefetch.global.L2 [%0];" ::"l"(p)); }

// Adds one and returns what was there before; `last` becomes zero again.
QE_DEV uint32_t count_up(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}
// What this block wrote before its last barrier can be read by blocks that see what it writes next.
QE_DEV void device_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// A value that another block of this launch wrote.
QE_DEV float load_fresh(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

QE_DEV void load_fresh(const float* p, float (&v)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(p));
}

// Clusters, on chips that have them, from 9.0 on: blocks that run at the same time and write into each other's shared memory.
// A kernel of clusters is launched nowhere else.
QE_DEV int cluster_rank() {  // of this block in its cluster
  int rank;
  asm volatile("mov.u32 %0, 0;\n\t// sm_90: mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster arrive and then wait, which takes long and empties L1: once, at the beginning.
QE_DEV void cluster_arrive() {
  __syncwarp();  // lanes that left a loop early come together
  asm volatile("// sm_90: barrier.cluster.arrive.release.aligned;" ::: "memory");
}
QE_DEV void cluster_wait() {
  __syncwarp();
  asm volatile("// sm_90: barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Messages to blocks of the cluster. A box says how many bytes will come in all; one thread opens it, before the block
// arrives at the cluster's barrier for the first time. Whoever waits for it can then read what came. It is used once.
QE_DEV void open_box(uint64_t* box, int bytes) {
  asm volatile("// sm_90: mbarrier.init.shared.b64 [%0], 1;\n\t// sm_90: mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               ::"r"(shared_address(box)), "r"(bytes) : "memory");
}
QE_DEV void boxes_are_open() { asm volatile("// sm_90: fence.mbarrier_init.release.cluster;" ::: "memory"); }
// To where `own` and `box` lie in the shared memory of block `rank`. Four floats are at a multiple of 16 bytes.
QE_DEV void send(float* own, uint64_t* box, int rank, float v) {
  uint32_t to = shared_address(own), there = shared_address(box);
  asm volatile("// sm_90: mapa.shared::cluster.u32 %0, %0, %2;\n\t"
               "// sm_90: mapa.shared::cluster.u32 %1, %1, %2;\n\t"
               "// sm_90: st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %3, [%1];"
               : "+r"(to), "+r"(there) : "r"(rank), "f"(v) : "memory");
}
QE_DEV void send(float* own, uint64_t* box, int rank, const float (&v)[4]) {
  uint32_t to = shared_address(own), there = shared_address(box);
  asm volatile("// sm_90: mapa.shared::cluster.u32 %0, %0, %2;\n\t"
               "// sm_90: mapa.shared::cluster.u32 %1, %1, %2;\n\t"
               "// sm_90: st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%3, %4, %5, %6}, [%1];"
               : "+r"(to), "+r"(there) : "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
QE_DEV bool box_is_full(uint64_t* box) {
  uint32_t full;
  asm volatile("mov.u32 %0, 1;\n\t"
               "// sm_90: {.reg .pred full;\n\t"
               "// sm_90: mbarrier.try_wait.parity.shared.b64 full, [%1], 0;\n\t"
               "// sm_90: selp.u32 %0, 1, 0, full;}"
               : "=r"(full) : "r"(shared_address(box)) : "memory");
  return full;
}
QE_DEV void wait_for_box(uint64_t* box) {
  while (!box_is_full(box)) {}
}

// The value is needed here and not before.
QE_DEV void hold(float& v) { asm volatile("" : "+f"(v)); }

QE_DEV float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
QE_DEV uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
QE_DEV uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
QE_DEV void block_sync() { __syncthreads(); }
// A barrier of some warps of a block, which have this number (1 to 15) and no other, and are `threads` threads in all.
QE_DEV void group_sync(int group, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(threads) : "memory"); }
QE_DEV void warp_sync() { __syncwarp(); }

}  // namespace qe
