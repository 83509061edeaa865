// pool: [rows, inner, features] -> [rows, features]. Two layouts: inner contiguous (NCHW) and features contiguous (channels-last,
// tokens). Floor: one read of the activation.
#pragma once
#include "cpu/bits.h"
#include "cpu/element.h"

namespace fastee::cpu::FASTEE_ISA {

// Sums of F features of n contiguous floats each, `stride` apart, and with Largest the bits of the largest magnitude on the way.
template <int F, bool Largest, typename T>
FASTEE_INLINE void accumulate_inner(const T* p, int64_t stride, int64_t n, V* sums, V& largest) {
  V acc[F], top = largest;  // not in `sums`, which could lie where p points: then every step would be stored
  auto take = [&](int f, V v) FASTEE_LAMBDA {
    acc[f] = add(acc[f], v);
    if constexpr (Largest) top = bits_max(top, bits_and(v, set1_bits(0x7fffffff)));
  };
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) acc[f] = set1(0.0f);
  int64_t i = 0;
  if constexpr (F == 1) {
    for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
      for (int k = 0; k < 64; k += 16) take(0, load(p + i + k));
    }
  }
  for (; i + 16 <= n; i += 16)
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) take(f, load(p + f * stride + i));
  if (i < n)
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) take(f, load_n(p + f * stride + i, n - i, 0.0f));
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) sums[f] = acc[f];
  largest = top;
}

// From 64 values on a feature is summed before the next: memory is then read in order, 20 GB/s from DRAM where four features abreast got
// 9 to 14 (Zen 4, 64 to 1,024 values each), and the adds of the next features hide the latency. Short features go four abreast. A map of
// 8 x 8 is unrolled as a whole: 112 GB/s from the L2 cache, with a loop 98; not in the scalar build, which then compiles for minutes.
template <bool Largest, typename T>
FASTEE_PIECE uint32_t pool_inner_contiguous(const Activation& x, const T* row, float* out) {
  const float scale = 1.0f / static_cast<float>(x.inner);
  const int64_t stride = x.feature_stride;
  V top = set1_bits(0);
  int64_t d = 0;
  for (; d + 16 <= x.features; d += 16) {
    V acc[16];
    if (x.inner < 64) {
#pragma GCC unroll 4
      for (int f = 0; f < 16; f += 4) accumulate_inner<4, Largest>(row + (d + f) * stride, stride, x.inner, acc + f, top);
    } else if (kPartLanes > 1 && x.inner == 64) {
#pragma GCC unroll 16
      for (int f = 0; f < 16; ++f) accumulate_inner<1, Largest>(row + (d + f) * 64, 64, 64, acc + f, top);
    } else {
#pragma GCC unroll 4
      for (int f = 0; f < 16; ++f) accumulate_inner<1, Largest>(row + (d + f) * stride, stride, x.inner, acc + f, top);
    }
    store(out + d, mul(sums(acc), set1(scale)));
  }
  for (; d < x.features; ++d) {
    V acc;
    accumulate_inner<1, Largest>(row + d * stride, stride, x.inner, &acc, top);
    out[d] = sum(acc) * scale;
  }
  return Largest ? highest_bits(top) : 0;
}

template <typename T>
FASTEE_O3_PIECE void pool_features_contiguous(const Activation& x, const T* row, const uint8_t* mask, float* out) {
  if (x.inner == 1 && !mask) {  // one vector: widened and nothing else, so that -0 stays -0
    int64_t d = 0;
    for (; d + 16 <= x.features; d += 16) store(out + d, load(row + d));
    if (d < x.features) store_n(out + d, load_n(row + d, x.features - d, 0.0f), x.features - d);
    return;
  }
  int64_t kept = x.inner;
  if (mask) {
    kept = 0;
    for (int64_t i = 0; i < x.inner; ++i) kept += mask[i] != 0;
  }
  const V scale = set1(1.0f / static_cast<float>(kept));  // no token: 0 * inf = NaN, a row that never exits
  int64_t d = 0;
  for (; d + 64 <= x.features; d += 64) {
    V acc[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t i = 0; i < x.inner; ++i) {
      if (mask && !mask[i]) continue;
      const T* p = row + i * x.inner_stride + d;
      for (int j = 0; j < 4; ++j) acc[j] = add(acc[j], load(p + 16 * j));
    }
    for (int j = 0; j < 4; ++j) store(out + d + 16 * j, mul(acc[j], scale));
  }
  for (; d < x.features; d += 16) {
    const int64_t n = x.features - d < 16 ? x.features - d : 16;
    V acc = set1(0.0f);
    for (int64_t i = 0; i < x.inner; ++i)
      if (!mask || mask[i]) acc = add(acc, load_n(row + i * x.inner_stride + d, n, 0.0f));
    store_n(out + d, mul(acc, scale), n);
  }
}

template <typename T>
FASTEE_INLINE void pool_row(const Activation& x, int64_t b, float* out, uint32_t* largest) {
  const T* row = static_cast<const T*>(x.data) + b * x.row_stride;
  if (x.feature_stride == 1)
    pool_features_contiguous(x, row, x.mask ? x.mask + b * x.mask_stride : nullptr, out);
  else if (largest)
    *largest = pool_inner_contiguous<true>(x, row, out);
  else
    pool_inner_contiguous<false>(x, row, out);
}

// Pool rows [first, first + rows) into out, `stride` apart. `largest` as in HeadArgs.
FASTEE_INLINE void pool_rows(const Activation& x, int64_t first, int64_t rows, float* out, int64_t stride, uint32_t* largest) {
  with_float(x.element, [&]<typename T>(const T*) FASTEE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r) pool_row<T>(x, first + r, out + r * stride, largest ? largest + first + r : nullptr);
  });
}

static void pool(const Activation& x, float* out, int64_t out_stride) { pool_rows(x, 0, x.rows, out, out_stride, nullptr); }
}  // namespace fastee::cpu::FASTEE_ISA
