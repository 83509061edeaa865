// Narrow element types of activations and weights: every load widens to sixteen fp32 lanes, exactly, so that the arithmetic is the
// same as for fp32. int8 weights have products of their own: linear_int8-inl.h.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastee::cpu::FASTEE_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(FASTEE_SIMD_AVX512)
FASTEE_INLINE V load(const bf16* p) {  // one permutation, zeros below: 1.3 times as fast from the cache as widening and shifting (Zen 4)
  const __m512i at = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, at, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
}
FASTEE_INLINE V load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
template <typename T>
FASTEE_INLINE Part load_part(const T* p) {
  return load(p);
}
#elif defined(FASTEE_SIMD_AVX2)
FASTEE_INLINE Part load_part(const bf16* p) {  // one shuffle within 128 bits, where widening crosses them and shifting follows
  const __m256i at = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                      -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), at));
}
FASTEE_INLINE Part load_part(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <typename T>
FASTEE_INLINE V load(const T* p) {
  return {load_part(p), load_part(p + 8)};
}
#elif defined(FASTEE_SIMD_NEON)
FASTEE_INLINE Part load_part(const bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
FASTEE_INLINE Part load_part(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))); }
template <typename T>
FASTEE_INLINE V load(const T* p) {
  return {load_part(p), load_part(p + 4), load_part(p + 8), load_part(p + 12)};
}
#else
FASTEE_INLINE float widen(bf16 x) { return of_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTEE_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // NaN is quieted, as in hardware
    return of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  if (magnitude >= 0x0400) return of_bits(sign | ((magnitude << 13) + 0x38000000));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;  // denormal: an exact multiple of 2^-24
  return sign ? -tiny : tiny;
}
template <typename T>
FASTEE_INLINE V load(const T* p) {
  V r;
  FASTEE_LANES r.a[i] = widen(p[i]);
  return r;
}
template <typename T>
FASTEE_INLINE Part load_part(const T* p) {
  if constexpr (kParts == 1)
    return load(p);  // emu16
  else
    return widen(*p);
}
#endif

// The first n elements, `fill` behind them.
template <typename T>
FASTEE_INLINE V load_n(const T* p, int64_t n, float fill) {
  T some[16] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  if (fill == 0.0f) return load(some);
  float lanes[16];
  store(lanes, load(some));
  for (int64_t i = n; i < 16; ++i) lanes[i] = fill;
  return load(lanes);
}

// Call f with a null pointer of the element type that `element` (kernels.h) names: the one place where types meet numbers.
template <typename F>
FASTEE_INLINE void with_float(int element, F f) {
  if (element == kBF16)
    f(static_cast<const bf16*>(nullptr));
  else if (element == kF16)
    f(static_cast<const f16*>(nullptr));
  else
    f(static_cast<const float*>(nullptr));
}
}  // namespace fastee::cpu::FASTEE_ISA
