// The kernels by name. The includer defines QE_PREPARE, QE_DOWN_DECODE, QE_PREPARE_DOWN, QE_DOWN_PREFILL, QE_MAIN_DECODE and
// QE_MAIN_PREFILL; host/plan.cpp builds the same names. Their parts: s8 = int8 activations, h = 16-bit ones; w3 = 3-bit
// weights; c = scale per channel, g128 and g64 = per group, z = zero points; a16, a8 and a4 = bits of the low-rank factors;
// t8 = at most 8 tokens, t16 = 16 tokens a block, at most 64.
// 3-bit weights are for float16 and for the layers that schemes with 3 bits make; all others keep 4 (prepack/width.py).

#define QE_MAIN_VARIANT(variant, tag, T, bits, mode, groups, zeros)                \
  QE_MAIN_DECODE(qe_decode_##variant##_t8_##tag, T, bits, mode, groups, zeros, 1)  \
  QE_MAIN_DECODE(qe_decode_##variant##_t16_##tag, T, bits, mode, groups, zeros, 2) \
  QE_MAIN_CLUSTER(qe_cluster_##variant##_##tag, T, bits, mode, groups, zeros)      \
  QE_MAIN_PREFILL(qe_prefill_##variant##_##tag, T, bits, mode, groups, zeros)

#define QE_FACTORS(bits, tag, T)                                    \
  QE_DOWN_DECODE(qe_down_decode_a##bits##_##tag, T, bits)           \
  QE_PREPARE_DOWN(qe_prepare_down_a##bits##_##tag, T, bits)         \
  QE_PREPARE_PREFILL(qe_prepare_prefill_a##bits##_##tag, T, bits)   \
  QE_DOWN_PREFILL(qe_down_prefill_a##bits##_##tag, T, bits)

#define QE_KERNELS_OF(tag, T)                                       \
  QE_PREPARE(qe_prepare_##tag, T)                                   \
  QE_PREPARE_PREFILL(qe_prepare_prefill_##tag, T, 0)                \
  QE_FACTORS(16, tag, T)                                            \
  QE_FACTORS(4, tag, T)                                             \
  QE_MAIN_VARIANT(s8_c, tag, T, 4, kInt8, 0, false)                 \
  QE_MAIN_PREFILL_WIDE(qe_prefill_wide_s8_c_##tag, T, 4, false)     \
  QE_MAIN_VARIANT(s8_g128z, tag, T, 4, kInt8, 1, true)              \
  QE_MAIN_VARIANT(s8_g64z, tag, T, 4, kInt8, 2, true)               \
  QE_MAIN_VARIANT(h_g128z, tag, T, 4, k16Bit, 1, true)              \
  QE_FACTORS(8, tag, T)                                             \
  QE_MAIN_VARIANT(s8_cz, tag, T, 4, kInt8, 0, true)                 \
  QE_MAIN_PREFILL_WIDE(qe_prefill_wide_s8_cz_##tag, T, 4, true)     \
  QE_MAIN_VARIANT(s8_g128, tag, T, 4, kInt8, 1, false)              \
  QE_MAIN_VARIANT(s8_g64, tag, T, 4, kInt8, 2, false)               \
  QE_MAIN_VARIANT(h_g64z, tag, T, 4, k16Bit, 2, true)               \
  QE_MAIN_VARIANT(h_cz, tag, T, 4, k16Bit, 0, true)

QE_KERNELS_OF(f16, f16_t)
QE_MAIN_VARIANT(s8w3_c, f16, f16_t, 3, kInt8, 0, false)
QE_MAIN_PREFILL_WIDE(qe_prefill_wide_s8w3_c_f16, f16_t, 3, false)
QE_MAIN_VARIANT(hw3_g128z, f16, f16_t, 3, k16Bit, 1, true)
QE_MAIN_VARIANT(s8w3_g128, f16, f16_t, 3, kInt8, 1, false)
QE_MAIN_VARIANT(s8w3_g64, f16, f16_t, 3, kInt8, 2, false)
QE_MAIN_VARIANT(hw3_g64z, f16, f16_t, 3, k16Bit, 2, true)
QE_MAIN_VARIANT(hw3_cz, f16, f16_t, 3, k16Bit, 0, true)
QE_KERNELS_OF(bf16, bf16_t)
