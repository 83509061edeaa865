// compact: a survivor goes to the next place from the front, any other to the next from the back. Eight flags at a time where there
// are byte shuffles in wide registers: the places of the set bits of every byte stand in a table of 2 KB, both runs are stored
// whole, and what lies beyond a run is written again later.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastee::cpu::FASTEE_ISA {

#if defined(FASTEE_SIMD_AVX512) || defined(FASTEE_SIMD_AVX2)
struct Places {
  uint64_t of[256];  // byte j: the place of the j-th set bit; 0 beyond
};
constexpr Places make_places() {
  Places p{};
  for (int m = 0; m < 256; ++m) {
    int j = 0;
    for (int i = 0; i < 8; ++i)
      if (m >> i & 1) p.of[m] |= static_cast<uint64_t>(i) << (8 * j++);
  }
  return p;
}
static constexpr Places kPlaces = make_places();

#if defined(FASTEE_SIMD_AVX512)
FASTEE_INLINE void store_places(int64_t* to, uint64_t places, int64_t base, unsigned lanes = 0xff) {
  const __m512i at = _mm512_add_epi64(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<int64_t>(places))), _mm512_set1_epi64(base));
  _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(lanes), at);
}
#else
FASTEE_INLINE void store_places(int64_t* to, uint64_t places, int64_t base) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(places));
  const __m256i b = _mm256_set1_epi64x(base);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi64(_mm256_cvtepu8_epi64(bytes), b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4), _mm256_add_epi64(_mm256_cvtepu8_epi64(_mm_srli_si128(bytes, 4)), b));
}
#endif
#endif

static int64_t compact(const uint8_t* mask, int64_t n, int64_t stride, uint8_t flip, int64_t* index) {
  int64_t k = 0, i = 0;
#if defined(FASTEE_SIMD_AVX512) || defined(FASTEE_SIMD_AVX2)
  // n - i places are free between the runs; with 16 of them two whole stores of eight cannot meet.
  if (stride == 1)
    for (; i + 16 <= n; i += 8) {
      const __m128i flags = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + i));
      const unsigned zero = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(flags, _mm_setzero_si128()))) & 0xff;
      const unsigned keep = flip ? zero : zero ^ 0xff;
      store_places(index + k, kPlaces.of[keep], i);
      store_places(index + n - i + k - 8, __builtin_bswap64(kPlaces.of[keep ^ 0xff]), i);
      k += __builtin_popcount(keep);
    }
#endif
#if defined(FASTEE_SIMD_AVX512)
  // The last flags with masked stores: one by one, eight of them took a third of a call on 32.
  if (stride == 1)
    for (; i < n; i += 8) {
      const unsigned live = n - i < 8 ? (1u << (n - i)) - 1 : 0xff;
      const __m128i flags = _mm_maskz_loadu_epi8(static_cast<__mmask16>(live), mask + i);
      const unsigned set = _mm_test_epi8_mask(flags, flags), keep = (flip ? ~set : set) & live, drop = keep ^ live;
      const int kept = __builtin_popcount(keep);
      store_places(index + k, kPlaces.of[keep], i, (1u << kept) - 1);
      store_places(index + n - i + k - 8, __builtin_bswap64(kPlaces.of[drop]), i, 0xff & ~(0xffu >> __builtin_popcount(drop)));
      k += kept;
    }
#endif
  for (; i < n; ++i) {
    const int64_t keep = (mask[i * stride] != 0) ^ flip;
    index[keep ? k : n - 1 - (i - k)] = i;
    k += keep;
  }
  return k;
}
}  // namespace fastee::cpu::FASTEE_ISA
