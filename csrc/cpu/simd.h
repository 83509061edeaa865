// Sixteen float lanes on every machine: one zmm, two ymm, four NEON registers, or an array. Included by isa_*.cc only, with
// FASTEE_ISA naming the namespace and FASTEE_SIMD_{AVX512,AVX2,NEON} the registers. FASTEE_SIMD_EMU16 is the array in the
// shape of one register of sixteen lanes: AVX-512's tiles, run where there is no AVX-512.
//
// Why always sixteen: an algorithm over sixteen logical lanes with explicit fused multiply-adds and fixed trees gives the same
// bits on every instruction set, so an exit decision never depends on the machine that took it. (-ffp-contract=off keeps the
// compiler from fusing more.) The scalar build pays for that with a libm fmaf per lane; it is for machines before 2013.
#pragma once
#include <cstdint>
#if defined(FASTEE_SIMD_AVX512) || defined(FASTEE_SIMD_AVX2)
#include <immintrin.h>
#elif defined(FASTEE_SIMD_NEON)
#include <arm_neon.h>
#endif

// Primitives are always inlined into registers. The array forms are not: inlining a hundred loops of sixteen into each other
// made GCC 12 compile for minutes. The large pieces are kept out of line everywhere, once per element type.
#if defined(FASTEE_SIMD_AVX512) || defined(FASTEE_SIMD_AVX2) || defined(FASTEE_SIMD_NEON)
#define FASTEE_INLINE static inline __attribute__((always_inline))
#define FASTEE_LAMBDA __attribute__((always_inline))
#else
#define FASTEE_INLINE static inline
#define FASTEE_LAMBDA
#endif
#define FASTEE_PIECE static __attribute__((noinline))
// GCC builds the scalar set at -O2 (CMakeLists.txt), which leaves the lanes of these pieces in memory: two that take three times as long so.
#if defined(__OPTIMIZE__) && !defined(__clang__) && !defined(FASTEE_SIMD_AVX512) && !defined(FASTEE_SIMD_AVX2) && !defined(FASTEE_SIMD_NEON) && !defined(FASTEE_SIMD_EMU16)
#define FASTEE_O3_PIECE __attribute__((optimize("O3"))) FASTEE_PIECE
#else
#define FASTEE_O3_PIECE FASTEE_PIECE
#endif

namespace fastee::cpu::FASTEE_ISA {

#if defined(FASTEE_SIMD_AVX512)

using V = __m512;
constexpr int kTileRows = 4, kTileClasses = 4, kRowClasses = 8;  // 16 accumulators of 32 registers; 8 hide the latency of one row
// A part is one register of a V: products walk part by part, so that operands of one part only are live beside the accumulators.
constexpr int kParts = 1, kPartLanes = 16;
using Part = __m512;
FASTEE_INLINE Part load_part(const float* p) { return _mm512_loadu_ps(p); }
FASTEE_INLINE void fma_part(V& acc, int, Part a, Part b) { acc = _mm512_fmadd_ps(a, b, acc); }
FASTEE_INLINE void store_part(float* p, Part a) { _mm512_storeu_ps(p, a); }
constexpr int kPanelRows = 8, kPanelVectors = 2, kPanelLeastRows = 96;  // 16 accumulators, 2 of weights; rows are broadcast from memory

FASTEE_INLINE V set1(float a) { return _mm512_set1_ps(a); }
FASTEE_INLINE V iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FASTEE_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FASTEE_INLINE V load_n(const float* p, int64_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
FASTEE_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
FASTEE_INLINE void store_n(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a); }
FASTEE_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FASTEE_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
FASTEE_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FASTEE_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FASTEE_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
FASTEE_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
FASTEE_INLINE V abs(V a) { return _mm512_abs_ps(a); }
FASTEE_INLINE V select_gt(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes); }
FASTEE_INLINE V select_eq(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes); }
FASTEE_INLINE V select_not_lt(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), no, yes); }
FASTEE_INLINE V scale_by_low_bits(V p, V bits) {  // p * 2^k, k in the low bits of `bits`
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(bits), 23)));
}
FASTEE_INLINE void store_low_bytes(int8_t* p, V bits) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(bits))); }
FASTEE_INLINE V load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
FASTEE_INLINE __m256 upper(V a) { return _mm512_extractf32x8_ps(a, 1); }
FASTEE_INLINE __m256 lower(V a) { return _mm512_castps512_ps256(a); }

#elif defined(FASTEE_SIMD_AVX2)

struct V {
  __m256 lo, hi;
};
constexpr int kTileRows = 2, kTileClasses = 3, kRowClasses = 4;  // 12 of 16 registers accumulate, 3 hold operands
constexpr int kParts = 2, kPartLanes = 8;
using Part = __m256;
FASTEE_INLINE Part load_part(const float* p) { return _mm256_loadu_ps(p); }
FASTEE_INLINE void fma_part(V& acc, int part, Part a, Part b) { (part ? acc.hi : acc.lo) = _mm256_fmadd_ps(a, b, part ? acc.hi : acc.lo); }
FASTEE_INLINE void store_part(float* p, Part a) { _mm256_storeu_ps(p, a); }
constexpr int kPanelRows = 6, kPanelVectors = 1, kPanelLeastRows = 24;  // 12 of 16 registers accumulate, 2 hold weights, 1 a row's broadcast

FASTEE_INLINE V set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FASTEE_INLINE V iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)}; }
FASTEE_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FASTEE_INLINE __m256i first(int64_t n) {  // lanes below n are all ones
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTEE_INLINE V load_n(const float* p, int64_t n, float fill) {
  const __m256i lo = first(n), hi = first(n - 8);
  const __m256 f = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(f, _mm256_maskload_ps(p, lo), _mm256_castsi256_ps(lo)), _mm256_blendv_ps(f, _mm256_maskload_ps(p + 8, hi), _mm256_castsi256_ps(hi))};
}
FASTEE_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
FASTEE_INLINE void store_n(float* p, V a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.lo), _mm256_maskstore_ps(p + 8, first(n - 8), a.hi); }
FASTEE_INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FASTEE_INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FASTEE_INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FASTEE_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
FASTEE_INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
FASTEE_INLINE V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
FASTEE_INLINE V abs(V a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FASTEE_INLINE V select_gt(V a, V b, V y, V n) {
  return {_mm256_blendv_ps(n.lo, y.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)), _mm256_blendv_ps(n.hi, y.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
FASTEE_INLINE V select_eq(V a, V b, V y, V n) {
  return {_mm256_blendv_ps(n.lo, y.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ)), _mm256_blendv_ps(n.hi, y.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ))};
}
FASTEE_INLINE V select_not_lt(V a, V b, V y, V n) {
  return {_mm256_blendv_ps(n.lo, y.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ)), _mm256_blendv_ps(n.hi, y.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ))};
}
FASTEE_INLINE __m256 scale_half(__m256 p, __m256 bits) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(bits), 23)));
}
FASTEE_INLINE V scale_by_low_bits(V p, V bits) { return {scale_half(p.lo, bits.lo), scale_half(p.hi, bits.hi)}; }
FASTEE_INLINE void store_low_bytes(int8_t* p, V bits) {
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i lo = _mm256_shuffle_epi8(_mm256_castps_si256(bits.lo), pick), hi = _mm256_shuffle_epi8(_mm256_castps_si256(bits.hi), pick);
  const __m128i a = _mm_unpacklo_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i b = _mm_unpacklo_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi64(a, b));
}
FASTEE_INLINE V load_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
FASTEE_INLINE __m256 upper(V a) { return a.hi; }
FASTEE_INLINE __m256 lower(V a) { return a.lo; }

#elif defined(FASTEE_SIMD_NEON)

struct V {
  float32x4_t a, b, c, d;
};
constexpr int kTileRows = 2, kTileClasses = 3, kRowClasses = 4;  // 24 of 32 registers accumulate, 3 hold operands
constexpr int kParts = 4, kPartLanes = 4;
using Part = float32x4_t;
FASTEE_INLINE Part load_part(const float* p) { return vld1q_f32(p); }
FASTEE_INLINE void fma_part(V& acc, int part, Part x, Part y) {
  float32x4_t& q = part == 0 ? acc.a : part == 1 ? acc.b : part == 2 ? acc.c : acc.d;
  q = vfmaq_f32(q, x, y);
}
FASTEE_INLINE void store_part(float* p, Part x) { vst1q_f32(p, x); }
constexpr int kPanelRows = 6, kPanelVectors = 1, kPanelLeastRows = 24;  // 24 of 32 registers accumulate

FASTEE_INLINE V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
FASTEE_INLINE void store(float* p, V x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d); }
FASTEE_INLINE V set1(float x) {
  const float32x4_t q = vdupq_n_f32(x);
  return {q, q, q, q};
}
FASTEE_INLINE V iota() {
  const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(lanes);
}
FASTEE_INLINE V load_n(const float* p, int64_t n, float fill) {
  float lanes[16];
  for (int64_t i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
FASTEE_INLINE void store_n(float* p, V x, int64_t n) {
  float lanes[16];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
FASTEE_INLINE V add(V x, V y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)}; }
FASTEE_INLINE V sub(V x, V y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)}; }
FASTEE_INLINE V mul(V x, V y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)}; }
FASTEE_INLINE V fma(V x, V y, V z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)}; }
FASTEE_INLINE V abs(V x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
FASTEE_INLINE V select(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d, V y, V n) {
  return {vbslq_f32(a, y.a, n.a), vbslq_f32(b, y.b, n.b), vbslq_f32(c, y.c, n.c), vbslq_f32(d, y.d, n.d)};
}
FASTEE_INLINE V select_gt(V x, V z, V y, V n) { return select(vcgtq_f32(x.a, z.a), vcgtq_f32(x.b, z.b), vcgtq_f32(x.c, z.c), vcgtq_f32(x.d, z.d), y, n); }
FASTEE_INLINE V select_eq(V x, V z, V y, V n) { return select(vceqq_f32(x.a, z.a), vceqq_f32(x.b, z.b), vceqq_f32(x.c, z.c), vceqq_f32(x.d, z.d), y, n); }
FASTEE_INLINE V select_not_lt(V x, V z, V y, V n) { return select(vcltq_f32(x.a, z.a), vcltq_f32(x.b, z.b), vcltq_f32(x.c, z.c), vcltq_f32(x.d, z.d), n, y); }
// x86's rule for NaN and signed zeros (the second operand unless the comparison holds), not vmaxq_f32's.
FASTEE_INLINE V max(V x, V y) { return select_gt(x, y, x, y); }
FASTEE_INLINE V min(V x, V y) { return select_gt(y, x, x, y); }
FASTEE_INLINE float32x4_t scale_quad(float32x4_t p, float32x4_t bits) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vreinterpretq_s32_f32(bits), 23)));
}
FASTEE_INLINE V scale_by_low_bits(V p, V bits) { return {scale_quad(p.a, bits.a), scale_quad(p.b, bits.b), scale_quad(p.c, bits.c), scale_quad(p.d, bits.d)}; }
FASTEE_INLINE int16x8_t low_halves(float32x4_t x, float32x4_t y) {
  return vcombine_s16(vmovn_s32(vreinterpretq_s32_f32(x)), vmovn_s32(vreinterpretq_s32_f32(y)));
}
FASTEE_INLINE void store_low_bytes(int8_t* p, V bits) { vst1q_s8(p, vcombine_s8(vmovn_s16(low_halves(bits.a, bits.b)), vmovn_s16(low_halves(bits.c, bits.d)))); }
FASTEE_INLINE V load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_s8(vget_high_s8(bytes));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo))), vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))),
          vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)))};
}

#else

struct V {
  float a[16];
};
#define FASTEE_LANES for (int i = 0; i < 16; ++i)
#if defined(FASTEE_SIMD_EMU16)
constexpr int kTileRows = 4, kTileClasses = 4, kRowClasses = 8;
constexpr int kParts = 1, kPartLanes = 16;
using Part = V;
FASTEE_INLINE Part load_part(const float* p) { V r; FASTEE_LANES r.a[i] = p[i]; return r; }
FASTEE_INLINE void fma_part(V& acc, int, const Part& a, const Part& b) { FASTEE_LANES acc.a[i] = __builtin_fmaf(a.a[i], b.a[i], acc.a[i]); }
FASTEE_INLINE void store_part(float* p, const Part& a) { FASTEE_LANES p[i] = a.a[i]; }
constexpr int kPanelRows = 8, kPanelVectors = 2, kPanelLeastRows = 96;
#else
constexpr int kTileRows = 2, kTileClasses = 2, kRowClasses = 4;
constexpr int kParts = 16, kPartLanes = 1;
using Part = float;
FASTEE_INLINE Part load_part(const float* p) { return *p; }
FASTEE_INLINE void fma_part(V& acc, int part, Part a, Part b) { acc.a[part] = __builtin_fmaf(a, b, acc.a[part]); }
FASTEE_INLINE void store_part(float* p, Part a) { *p = a; }
constexpr int kPanelRows = 2, kPanelVectors = 1, kPanelLeastRows = 24;
#endif

FASTEE_INLINE uint32_t bits_of(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
FASTEE_INLINE float of_bits(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
FASTEE_INLINE V set1(float a) { V r; FASTEE_LANES r.a[i] = a; return r; }
FASTEE_INLINE V iota() { V r; FASTEE_LANES r.a[i] = static_cast<float>(i); return r; }
FASTEE_INLINE V load(const float* p) { V r; FASTEE_LANES r.a[i] = p[i]; return r; }
FASTEE_INLINE V load_n(const float* p, int64_t n, float fill) { V r; FASTEE_LANES r.a[i] = i < n ? p[i] : fill; return r; }
FASTEE_INLINE void store(float* p, V a) { FASTEE_LANES p[i] = a.a[i]; }
FASTEE_INLINE void store_n(float* p, V a, int64_t n) { for (int i = 0; i < n; ++i) p[i] = a.a[i]; }
FASTEE_INLINE V add(V a, V b) { FASTEE_LANES a.a[i] = a.a[i] + b.a[i]; return a; }
FASTEE_INLINE V sub(V a, V b) { FASTEE_LANES a.a[i] = a.a[i] - b.a[i]; return a; }
FASTEE_INLINE V mul(V a, V b) { FASTEE_LANES a.a[i] = a.a[i] * b.a[i]; return a; }
FASTEE_INLINE V fma(V a, V b, V c) { FASTEE_LANES a.a[i] = __builtin_fmaf(a.a[i], b.a[i], c.a[i]); return a; }
FASTEE_INLINE V max(V a, V b) { FASTEE_LANES a.a[i] = a.a[i] > b.a[i] ? a.a[i] : b.a[i]; return a; }
FASTEE_INLINE V min(V a, V b) { FASTEE_LANES a.a[i] = a.a[i] < b.a[i] ? a.a[i] : b.a[i]; return a; }
FASTEE_INLINE V abs(V a) { FASTEE_LANES a.a[i] = __builtin_fabsf(a.a[i]); return a; }
FASTEE_INLINE V select_gt(V a, V b, V y, V n) { FASTEE_LANES n.a[i] = a.a[i] > b.a[i] ? y.a[i] : n.a[i]; return n; }
FASTEE_INLINE V select_eq(V a, V b, V y, V n) { FASTEE_LANES n.a[i] = a.a[i] == b.a[i] ? y.a[i] : n.a[i]; return n; }
FASTEE_INLINE V select_not_lt(V a, V b, V y, V n) { FASTEE_LANES n.a[i] = !(a.a[i] < b.a[i]) ? y.a[i] : n.a[i]; return n; }
FASTEE_INLINE V scale_by_low_bits(V p, V bits) { FASTEE_LANES p.a[i] = of_bits(bits_of(p.a[i]) + (bits_of(bits.a[i]) << 23)); return p; }
FASTEE_INLINE void store_low_bytes(int8_t* p, V bits) { FASTEE_LANES p[i] = static_cast<int8_t>(bits_of(bits.a[i]) & 0xff); }
FASTEE_INLINE V load_i8(const int8_t* p) { V r; FASTEE_LANES r.a[i] = static_cast<float>(p[i]); return r; }

#endif

// The trees: lane i with i + 8, then + 4, + 2, + 1. The same on every instruction set.
#if defined(FASTEE_SIMD_AVX512) || defined(FASTEE_SIMD_AVX2)
FASTEE_INLINE float sum(V a) {
  const __m256 h = _mm256_add_ps(lower(a), upper(a));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
FASTEE_INLINE float highest(V a) {
  const __m256 h = _mm256_max_ps(lower(a), upper(a));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
#elif defined(FASTEE_SIMD_NEON)
FASTEE_INLINE float32x4_t quad_sum(V x) { return vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d)); }
FASTEE_INLINE float sum(V x) {
  const float32x4_t q = quad_sum(x);
  return vaddv_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)));
}
FASTEE_INLINE float32x4_t max_quad(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
FASTEE_INLINE float highest(V x) {
  float32x4_t q = max_quad(max_quad(x.a, x.c), max_quad(x.b, x.d));
  q = max_quad(q, vextq_f32(q, q, 2));
  return vgetq_lane_f32(max_quad(q, vextq_f32(q, q, 1)), 0);
}
#else
FASTEE_INLINE float sum(V a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.a[i] = a.a[i] + a.a[i + w];
  return a.a[0];
}
FASTEE_INLINE float highest(V a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.a[i] = a.a[i] > a.a[i + w] ? a.a[i] : a.a[i + w];
  return a.a[0];
}
#endif

// Sixteen sums at once: lane i of the result is sum(v[i]), by the same tree, in 45 instead of 16 * 9 operations.
#if defined(FASTEE_SIMD_AVX512)
template <typename Add>
FASTEE_INLINE V quarter_sums(V a, V b, V c, V d, Add add) {  // the four sums of lanes i, i + 4, i + 8, i + 12 of a, then those of b, c, d
  const V ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const V cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
template <typename Add>
FASTEE_INLINE V sums_of_quarters(const V (&quad)[4], Add add) {  // quads 0..3 of quad[k] are vectors k, k + 4, k + 8, k + 12
  const V even = add(_mm512_shuffle_ps(quad[0], quad[1], 0x44), _mm512_shuffle_ps(quad[0], quad[1], 0xee));
  const V odd = add(_mm512_shuffle_ps(quad[2], quad[3], 0x44), _mm512_shuffle_ps(quad[2], quad[3], 0xee));
  return add(_mm512_shuffle_ps(even, odd, 0x88), _mm512_shuffle_ps(even, odd, 0xdd));
}
FASTEE_INLINE V sums(const V (&v)[16]) {
  V quad[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) quad[k] = quarter_sums(v[k], v[k + 4], v[k + 8], v[k + 12], add);
  return sums_of_quarters(quad, add);
}
#elif defined(FASTEE_SIMD_AVX2)
FASTEE_INLINE __m256 sums_half(const V* v) {
  __m256 quad[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // halves 0, 1 of quad[k] are vectors k, k + 4
    const __m256 a = _mm256_add_ps(v[k].lo, v[k].hi), b = _mm256_add_ps(v[k + 4].lo, v[k + 4].hi);
    quad[k] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  const __m256 even = _mm256_add_ps(_mm256_shuffle_ps(quad[0], quad[1], 0x44), _mm256_shuffle_ps(quad[0], quad[1], 0xee));
  const __m256 odd = _mm256_add_ps(_mm256_shuffle_ps(quad[2], quad[3], 0x44), _mm256_shuffle_ps(quad[2], quad[3], 0xee));
  return _mm256_add_ps(_mm256_shuffle_ps(even, odd, 0x88), _mm256_shuffle_ps(even, odd, 0xdd));
}
FASTEE_INLINE V sums(const V (&v)[16]) { return {sums_half(v), sums_half(v + 8)}; }
#elif defined(FASTEE_SIMD_NEON)
FASTEE_INLINE float32x4_t sums_quad(const V* v) {  // halves 0, 1 of even and odd are vectors 0, 1 and 2, 3
  const float32x4_t p = quad_sum(v[0]), q = quad_sum(v[1]), r = quad_sum(v[2]), s = quad_sum(v[3]);
  const float32x4_t even = vaddq_f32(vcombine_f32(vget_low_f32(p), vget_low_f32(q)), vcombine_f32(vget_high_f32(p), vget_high_f32(q)));
  const float32x4_t odd = vaddq_f32(vcombine_f32(vget_low_f32(r), vget_low_f32(s)), vcombine_f32(vget_high_f32(r), vget_high_f32(s)));
  return vpaddq_f32(even, odd);
}
FASTEE_INLINE V sums(const V (&v)[16]) { return {sums_quad(v), sums_quad(v + 4), sums_quad(v + 8), sums_quad(v + 12)}; }
#else
FASTEE_INLINE V sums(const V (&v)[16]) {
  V r;
  FASTEE_LANES r.a[i] = sum(v[i]);
  return r;
}
#endif

// A square of parts: p[i][j] becomes p[j][i].
#if defined(FASTEE_SIMD_AVX512)
FASTEE_INLINE void transpose(Part (&p)[16]) {
  // Four perfect shuffles of p[i] with p[i + 8]; their composition is the transposition.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
    Part q[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      q[2 * i] = _mm512_permutex2var_ps(p[i], low, p[i + 8]);
      q[2 * i + 1] = _mm512_permutex2var_ps(p[i], high, p[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) p[i] = q[i];
  }
}
#elif defined(FASTEE_SIMD_AVX2)
FASTEE_INLINE void transpose(Part (&p)[8]) {
  Part pair[8], quad[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) pair[2 * i] = _mm256_unpacklo_ps(p[2 * i], p[2 * i + 1]), pair[2 * i + 1] = _mm256_unpackhi_ps(p[2 * i], p[2 * i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44), quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44), quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) p[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20), p[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
}
#elif defined(FASTEE_SIMD_NEON)
FASTEE_INLINE void transpose(Part (&p)[4]) {
  const float32x4_t a = vzip1q_f32(p[0], p[2]), b = vzip2q_f32(p[0], p[2]), c = vzip1q_f32(p[1], p[3]), d = vzip2q_f32(p[1], p[3]);
  p[0] = vzip1q_f32(a, c), p[1] = vzip2q_f32(a, c), p[2] = vzip1q_f32(b, d), p[3] = vzip2q_f32(b, d);
}
#elif defined(FASTEE_SIMD_EMU16)
FASTEE_INLINE void transpose(Part (&p)[16]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float f = p[i].a[j];
      p[i].a[j] = p[j].a[i], p[j].a[i] = f;
    }
}
#else
FASTEE_INLINE void transpose(Part (&)[1]) {}
#endif
FASTEE_INLINE float lowest(V a) { return -highest(sub(set1(0.0f), a)); }

constexpr float kInf = __builtin_inff();
// 1.5 * 2^23: adding it rounds to the nearest integer (half to even) and leaves that integer in the low bits.
constexpr float kRound = 12582912.0f;

// exp(u) for u <= 0: u = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 minimax polynomial, then 2^n by the exponent bits. Below
// -87.33 the result would be denormal: it is 0. Largest error found by testing every float in [-88, 0]: see tests/ops.
FASTEE_INLINE V exp_negative(V u) {
  const V n = add(mul(u, set1(1.44269504088896341f)), set1(kRound));
  const V k = sub(n, set1(kRound));
  V r = fma(k, set1(-0.693359375f), u);
  r = fma(k, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return select_gt(u, set1(-87.33f), scale_by_low_bits(p, n), set1(0.0f));
}
}  // namespace fastee::cpu::FASTEE_ISA
