// Lanes and bytes as bit patterns: what codecs need beside the arithmetic of simd.h. Two groups:
//   sixteen 32-bit lanes (a V holds them): bits_and/or/add/shift, bits_max (signed), load_u8 (zero-extended), store_low_halves,
//   on AVX2 store_low_bytes_64 (the low bytes of four V);
//   sixty-four bytes: gather_planes (bits 0, 1, 2 of each byte -> three 64-bit words, byte i at bit i) and its inverse with a table
//   of eight bytes, lookup_planes.
// Plain loops over bytes are left to the compiler, which vectorises them on every instruction set.
#pragma once
#include "cpu/simd.h"

namespace fastee::cpu::FASTEE_ISA {

#if defined(FASTEE_SIMD_AVX512)
FASTEE_INLINE V as_lanes(__m512i a) { return _mm512_castsi512_ps(a); }
FASTEE_INLINE __m512i as_bits(V a) { return _mm512_castps_si512(a); }
FASTEE_INLINE V set1_bits(uint32_t a) { return as_lanes(_mm512_set1_epi32(static_cast<int>(a))); }
FASTEE_INLINE V bits_and(V a, V b) { return as_lanes(_mm512_and_si512(as_bits(a), as_bits(b))); }
FASTEE_INLINE V bits_or(V a, V b) { return as_lanes(_mm512_or_si512(as_bits(a), as_bits(b))); }
FASTEE_INLINE V bits_add(V a, V b) { return as_lanes(_mm512_add_epi32(as_bits(a), as_bits(b))); }
FASTEE_INLINE V bits_max(V a, V b) { return as_lanes(_mm512_max_epi32(as_bits(a), as_bits(b))); }
template <int N>
FASTEE_INLINE V bits_right(V a) { return as_lanes(_mm512_srli_epi32(as_bits(a), N)); }
template <int N>
FASTEE_INLINE V bits_left(V a) { return as_lanes(_mm512_slli_epi32(as_bits(a), N)); }
FASTEE_INLINE V load_u8(const uint8_t* p) { return as_lanes(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
FASTEE_INLINE void store_low_halves(uint16_t* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(as_bits(a))); }

FASTEE_INLINE void gather_planes(const uint8_t* c, uint64_t* p) {
  const __m512i v = _mm512_loadu_si512(c);
  for (int k = 0; k < 3; ++k) p[k] = _mm512_test_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(1 << k)));
}
FASTEE_INLINE void lookup_planes(const uint64_t* p, const uint8_t* table, uint8_t* out) {
  __m512i v = _mm512_maskz_set1_epi8(p[0], 1);
  v = _mm512_or_si512(v, _mm512_maskz_set1_epi8(p[1], 2));
  v = _mm512_or_si512(v, _mm512_maskz_set1_epi8(p[2], 4));
  const __m512i t = _mm512_broadcast_i32x4(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table)));
  _mm512_storeu_si512(out, _mm512_shuffle_epi8(t, v));
}

#elif defined(FASTEE_SIMD_AVX2)
FASTEE_INLINE __m256i as_bits(__m256 a) { return _mm256_castps_si256(a); }
FASTEE_INLINE V as_lanes(__m256i lo, __m256i hi) { return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)}; }
FASTEE_INLINE V set1_bits(uint32_t a) { return as_lanes(_mm256_set1_epi32(static_cast<int>(a)), _mm256_set1_epi32(static_cast<int>(a))); }
FASTEE_INLINE V bits_and(V a, V b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
FASTEE_INLINE V bits_or(V a, V b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
FASTEE_INLINE V bits_add(V a, V b) { return as_lanes(_mm256_add_epi32(as_bits(a.lo), as_bits(b.lo)), _mm256_add_epi32(as_bits(a.hi), as_bits(b.hi))); }
FASTEE_INLINE V bits_max(V a, V b) { return as_lanes(_mm256_max_epi32(as_bits(a.lo), as_bits(b.lo)), _mm256_max_epi32(as_bits(a.hi), as_bits(b.hi))); }
template <int N>
FASTEE_INLINE V bits_right(V a) { return as_lanes(_mm256_srli_epi32(as_bits(a.lo), N), _mm256_srli_epi32(as_bits(a.hi), N)); }
template <int N>
FASTEE_INLINE V bits_left(V a) { return as_lanes(_mm256_slli_epi32(as_bits(a.lo), N), _mm256_slli_epi32(as_bits(a.hi), N)); }
FASTEE_INLINE V load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_lanes(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}
FASTEE_INLINE void store_low_halves(uint16_t* p, V a) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i both = _mm256_packus_epi32(_mm256_and_si256(as_bits(a.lo), low), _mm256_and_si256(as_bits(a.hi), low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}

// packs of saturated words would lose bits above the low byte, so those are masked first; the last permutation undoes the halves' order.
FASTEE_INLINE __m256i low_bytes_32(V a, V b) {
  const __m256i low = _mm256_set1_epi32(0xff);
  auto words = [&](V v) FASTEE_LAMBDA { return _mm256_packus_epi32(_mm256_and_si256(as_bits(v.lo), low), _mm256_and_si256(as_bits(v.hi), low)); };
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words(a), words(b)), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
FASTEE_INLINE void store_low_bytes_64(uint8_t* p, V a, V b, V c, V d) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low_bytes_32(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), low_bytes_32(c, d));
}

FASTEE_INLINE void gather_planes(const uint8_t* c, uint64_t* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)), b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + 32));
  auto top = [](__m256i x, __m256i y) FASTEE_LAMBDA {  // the highest bit of each byte
    return static_cast<uint32_t>(_mm256_movemask_epi8(x)) | static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(y))) << 32;
  };
  p[0] = top(_mm256_slli_epi16(a, 7), _mm256_slli_epi16(b, 7));
  p[1] = top(_mm256_slli_epi16(a, 6), _mm256_slli_epi16(b, 6));
  p[2] = top(_mm256_slli_epi16(a, 5), _mm256_slli_epi16(b, 5));
}
FASTEE_INLINE void lookup_planes(const uint64_t* p, const uint8_t* table, uint8_t* out) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i pick = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i t = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table)));
  for (int half = 0; half < 2; ++half) {
    __m256i v = _mm256_setzero_si256();
    for (int k = 0; k < 3; ++k) {
      const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(p[k] >> (32 * half))), spread), pick);
      v = _mm256_or_si256(v, _mm256_and_si256(_mm256_cmpeq_epi8(bits, pick), _mm256_set1_epi8(static_cast<char>(1 << k))));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), _mm256_shuffle_epi8(t, v));
  }
}

#else
#if defined(FASTEE_SIMD_NEON)
FASTEE_INLINE uint32x4_t as_bits(float32x4_t a) { return vreinterpretq_u32_f32(a); }
FASTEE_INLINE float32x4_t as_lane(uint32x4_t a) { return vreinterpretq_f32_u32(a); }
#define FASTEE_QUADS(f) {as_lane(f(as_bits(x.a), as_bits(y.a))), as_lane(f(as_bits(x.b), as_bits(y.b))), as_lane(f(as_bits(x.c), as_bits(y.c))), as_lane(f(as_bits(x.d), as_bits(y.d)))}
FASTEE_INLINE V set1_bits(uint32_t a) {
  const float32x4_t q = as_lane(vdupq_n_u32(a));
  return {q, q, q, q};
}
FASTEE_INLINE V bits_and(V x, V y) { return FASTEE_QUADS(vandq_u32); }
FASTEE_INLINE V bits_or(V x, V y) { return FASTEE_QUADS(vorrq_u32); }
FASTEE_INLINE V bits_add(V x, V y) { return FASTEE_QUADS(vaddq_u32); }
FASTEE_INLINE uint32x4_t signed_max(uint32x4_t a, uint32x4_t b) { return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b))); }
FASTEE_INLINE V bits_max(V x, V y) { return FASTEE_QUADS(signed_max); }
#undef FASTEE_QUADS
template <int N>
FASTEE_INLINE V bits_right(V x) {
  return {as_lane(vshrq_n_u32(as_bits(x.a), N)), as_lane(vshrq_n_u32(as_bits(x.b), N)), as_lane(vshrq_n_u32(as_bits(x.c), N)), as_lane(vshrq_n_u32(as_bits(x.d), N))};
}
template <int N>
FASTEE_INLINE V bits_left(V x) {
  return {as_lane(vshlq_n_u32(as_bits(x.a), N)), as_lane(vshlq_n_u32(as_bits(x.b), N)), as_lane(vshlq_n_u32(as_bits(x.c), N)), as_lane(vshlq_n_u32(as_bits(x.d), N))};
}
FASTEE_INLINE V load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t lo = vmovl_u8(vget_low_u8(bytes)), hi = vmovl_u8(vget_high_u8(bytes));
  return {as_lane(vmovl_u16(vget_low_u16(lo))), as_lane(vmovl_u16(vget_high_u16(lo))), as_lane(vmovl_u16(vget_low_u16(hi))), as_lane(vmovl_u16(vget_high_u16(hi)))};
}
FASTEE_INLINE void store_low_halves(uint16_t* p, V x) {
  vst1q_u16(p, vcombine_u16(vmovn_u32(as_bits(x.a)), vmovn_u32(as_bits(x.b))));
  vst1q_u16(p + 8, vcombine_u16(vmovn_u32(as_bits(x.c)), vmovn_u32(as_bits(x.d))));
}
#else
FASTEE_INLINE V set1_bits(uint32_t a) { V r; FASTEE_LANES r.a[i] = of_bits(a); return r; }
FASTEE_INLINE V bits_and(V a, V b) { FASTEE_LANES a.a[i] = of_bits(bits_of(a.a[i]) & bits_of(b.a[i])); return a; }
FASTEE_INLINE V bits_or(V a, V b) { FASTEE_LANES a.a[i] = of_bits(bits_of(a.a[i]) | bits_of(b.a[i])); return a; }
FASTEE_INLINE V bits_add(V a, V b) { FASTEE_LANES a.a[i] = of_bits(bits_of(a.a[i]) + bits_of(b.a[i])); return a; }
FASTEE_INLINE V bits_max(V a, V b) { FASTEE_LANES a.a[i] = static_cast<int32_t>(bits_of(a.a[i])) > static_cast<int32_t>(bits_of(b.a[i])) ? a.a[i] : b.a[i]; return a; }
template <int N>
FASTEE_INLINE V bits_right(V a) { FASTEE_LANES a.a[i] = of_bits(bits_of(a.a[i]) >> N); return a; }
template <int N>
FASTEE_INLINE V bits_left(V a) { FASTEE_LANES a.a[i] = of_bits(bits_of(a.a[i]) << N); return a; }
FASTEE_INLINE V load_u8(const uint8_t* p) { V r; FASTEE_LANES r.a[i] = of_bits(p[i]); return r; }
FASTEE_INLINE void store_low_halves(uint16_t* p, V a) { FASTEE_LANES p[i] = static_cast<uint16_t>(bits_of(a.a[i])); }
#endif

// Eight bytes at a time in a general register.
FASTEE_INLINE void gather_planes(const uint8_t* c, uint64_t* p) {
  p[0] = p[1] = p[2] = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t v;
    __builtin_memcpy(&v, c + 8 * i, 8);
    for (int k = 0; k < 3; ++k) p[k] |= (((v >> k) & 0x0101010101010101) * 0x0102040810204080 >> 56) << (8 * i);
  }
}
FASTEE_INLINE void lookup_planes(const uint64_t* p, const uint8_t* table, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    uint64_t v = 0;
    for (int k = 0; k < 3; ++k) {
      const uint64_t one = ((p[k] >> (8 * i)) & 0xff) * 0x0101010101010101 & 0x8040201008040201;
      v |= ((one + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101) << k;
    }
    for (int j = 0; j < 8; ++j) out[8 * i + j] = table[v >> (8 * j) & 7];
  }
}
#endif

// The largest of sixteen non-negative 32-bit integers.
FASTEE_INLINE uint32_t highest_bits(V a) {
  float lanes[16];
  store(lanes, a);
  uint32_t top = 0;
  for (int i = 0; i < 16; ++i) {
    uint32_t u;
    __builtin_memcpy(&u, lanes + i, 4);
    top = u > top ? u : top;
  }
  return top;
}
}  // namespace fastee::cpu::FASTEE_ISA
