// feature_delta: |a/|a| - b/|b|| per row from three sums of one pass, sqrt(2 - 2 a.b / (|a| |b|)). That form cancels when the two
// are close (2e-5 off at 0.01 over 128 features), so small results are summed again as squared differences: the row is in the cache.
#pragma once
#include "cpu/element.h"

namespace fastee::cpu::FASTEE_ISA {

template <typename T>
FASTEE_PIECE float row_delta(const T* a, const T* b, int64_t n) {
  V aa = set1(0.0f), bb = aa, ab = aa;
  auto look = [&](V x, V y) FASTEE_LAMBDA {
    aa = fma(x, x, aa);
    bb = fma(y, y, bb);
    ab = fma(x, y, ab);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) look(load(a + i), load(b + i));
  if (i < n) look(load_n(a + i, n - i, 0.0f), load_n(b + i, n - i, 0.0f));
  const double norm_a = __builtin_sqrt(static_cast<double>(sum(aa))), norm_b = __builtin_sqrt(static_cast<double>(sum(bb)));
  if (norm_a == 0.0 || norm_b == 0.0) return kInf;
  if (!(norm_a < kInf && norm_b < kInf)) return __builtin_nanf("");
  const double squared = 2.0 - 2.0 * (static_cast<double>(sum(ab)) / (norm_a * norm_b));
  if (!(squared < 0.01)) return static_cast<float>(__builtin_sqrt(squared));  // also NaN
  const V ia = set1(static_cast<float>(1.0 / norm_a)), ib = set1(static_cast<float>(1.0 / norm_b));
  V d2 = set1(0.0f);
  auto differ = [&](V x, V y) FASTEE_LAMBDA {
    const V d = sub(mul(x, ia), mul(y, ib));
    d2 = fma(d, d, d2);
  };
  for (i = 0; i + 16 <= n; i += 16) differ(load(a + i), load(b + i));
  if (i < n) differ(load_n(a + i, n - i, 0.0f), load_n(b + i, n - i, 0.0f));
  return __builtin_sqrtf(sum(d2));
}

static void feature_delta(const FeatureDeltaArgs& f) {
  with_float(f.element, [&]<typename T>(const T*) FASTEE_LAMBDA {
    const T *a = static_cast<const T*>(f.a), *b = static_cast<const T*>(f.b);
    for (int64_t r = 0; r < f.rows; ++r) f.out[r] = row_delta(a + r * f.a_stride, b + r * f.b_stride, f.row);
  });
}
}  // namespace fastee::cpu::FASTEE_ISA
