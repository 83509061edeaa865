// quantize_rows int8: max|x| of a group, then q = round_half_even(x * (127 / max)). Two passes over a row that the first brought into
// the cache. Floor: read 4 bytes, write 1.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastee::cpu::FASTEE_ISA {

FASTEE_INLINE void quantize_group(const float* x, int64_t n, int8_t* q, float* scale) {
  V m = set1(0.0f), bad = m;
  int64_t i = 0;
  auto look = [&](V raw) __attribute__((always_inline)) {
    const V v = abs(raw);
    bad = select_not_lt(v, set1(kInf), set1(1.0f), bad);  // max() may drop a NaN, so it is noted apart
    m = max(m, v);
  };
  for (; i + 16 <= n; i += 16) look(load(x + i));
  if (i < n) look(load_n(x + i, n - i, 0.0f));
  const float top = highest(m);
  const bool finite = !(highest(bad) > 0.0f);
  constexpr float kLargest = 0x1.020406p+121f;  // 127 times the next float is inf
  const float step = top / 127.0f;
  *scale = finite ? (step < kLargest ? step : kLargest) : __builtin_nanf("");
  if (!finite || top == 0.0f) {
    __builtin_memset(q, 0, static_cast<unsigned long>(n));
    return;
  }
  const float tiny = top < 0x1p-100f ? 0x1p64f : 1.0f;  // keeps 127 / top finite; a power of two, so exact
  const V inverse = set1(127.0f / (top * tiny)), lift = set1(tiny);
  // |x| * inverse may pass 127 by one rounding; the clamp keeps it there.
  auto round = [&](V v) __attribute__((always_inline)) {
    return add(min(max(mul(mul(v, lift), inverse), set1(-127.0f)), set1(127.0f)), set1(kRound));
  };
  for (i = 0; i + 16 <= n; i += 16) store_low_bytes(q + i, round(load(x + i)));
  if (i < n) {
    int8_t tail[16];
    store_low_bytes(tail, round(load_n(x + i, n - i, 0.0f)));
    for (int64_t k = 0; i + k < n; ++k) q[i + k] = tail[k];
  }
}

static void quantize_rows(const QuantizeArgs& a) {
  for (int64_t b = 0; b < a.rows; ++b)
    for (int64_t g = 0; g < a.row; g += a.group)
      quantize_group(a.x + b * a.row_stride + g, a.group, a.data + b * a.data_stride + g, a.scale + (b * a.row + g) / a.group);
}

static void dequantize_rows(const DequantizeArgs& a) {
  for (int64_t b = 0; b < a.rows; ++b)
    for (int64_t g = 0; g < a.row; g += a.group) {
      const int8_t* q = a.data + b * a.data_stride + g;
      float* out = a.out + b * a.out_stride + g;
      const float scale = a.scale[(b * a.row + g) / a.group];
      int64_t i = 0;
      for (; i + 16 <= a.group; i += 16) store(out + i, mul(load_i8(q + i), set1(scale)));
      for (; i < a.group; ++i) out[i] = static_cast<float>(q[i]) * scale;
    }
}
}  // namespace fastee::cpu::FASTEE_ISA
