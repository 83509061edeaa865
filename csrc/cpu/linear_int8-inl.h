// Products of rows with int8 weights, in whole numbers: a row is brought to fixed point, x = q * unit with |q| <= 2^22 and unit a power
// of two, and q . w is summed exactly. Exact sums have no order: every instruction set may take its own way to the same bits. Rounding x
// to a 2^-22th of the row's largest value moves a product by at most D * 128 * 2^-22 of that value (in steps of the weights): a quarter,
// for 4,096 features, of what rounding one weight to int8 may do.
//
// Why not fp32: widening sixteen int8 weights takes two instructions before the multiply-add, 29 GB/s from the L2 cache (Zen 4, AVX-512);
// three digits of eight bits and vpdpbusd take four instructions for sixty-four. Elsewhere two halves and a multiply-add of 16-bit pairs
// take five for sixteen (AVX2) instead of six, which the compiler finds by itself in a plain loop.
#pragma once
#include "cpu/linear-inl.h"
#include "cpu/quantize_rows-inl.h"

namespace fastee::cpu::FASTEE_ISA {

constexpr int64_t kFixedBlock = 4096;  // features whose sum fits 32 bits: halves of 12 bits times 8 bits

struct FixedRow {
  double unit;    // NaN for a row with NaN or inf: its logits are then NaN
  int64_t total;  // of all q
  // 64 bytes from the beginning: q as `high` and `low`, q = 2048 high + low, or as three planes of signed digits to base 256.
  int16_t* high() { return reinterpret_cast<int16_t*>(this) + 32; }
  int16_t* low(int64_t features) { return high() + 16 * steps_of(features); }
  int8_t* digits(int k, int64_t features) { return reinterpret_cast<int8_t*>(high()) + k * round64(features); }
  static constexpr int64_t round64(int64_t n) { return (n + 63) / 64 * 64; }
};
FASTEE_INLINE FixedRow& fixed_row(float* rows, int64_t r, int64_t features) {
  return *reinterpret_cast<FixedRow*>(rows + r * packed_row(features));
}

#if defined(FASTEE_SIMD_AVX512)
FASTEE_INLINE bool by_digits() { return __builtin_cpu_supports("avx512vnni"); }  // all but the first AVX-512 servers
#else
FASTEE_INLINE bool by_digits() { return false; }
#endif

FASTEE_PIECE void fix_rows(const float* x, int64_t rows, int64_t xs, int64_t features, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += xs) {
    FixedRow& row = fixed_row(out, r, features);
    // The largest value comes to [2^21, 2^22), in two steps where one factor would pass fp32's range; denormals stay below.
    const uint32_t top = largest_bits(x, features), exponent = top >> 23 ? top >> 23 : 1;
    const float tiny = exponent < 64 ? 0x1p64f : 1.0f;
    const uint32_t lift_bits = (275 - exponent - (exponent < 64 ? 64 : 0)) << 23;
    float lift;
    __builtin_memcpy(&lift, &lift_bits, 4);
    const bool finite = top < 0x7f800000;
    row.unit = finite ? 1.0 / static_cast<double>(tiny) / static_cast<double>(lift) : __builtin_nan("");
    int64_t total = 0;
    const int64_t end = by_digits() ? FixedRow::round64(features) : features;
    for (int64_t i = 0; i < end; i += 16) {
      const V v = features - i >= 16 ? load(x + i) : load_n(x + i, features > i ? features - i : 0, 0.0f);
      uint32_t round;
      __builtin_memcpy(&round, &kRound, 4);
      const V q = finite ? bits_add(add(mul(mul(v, set1(tiny)), set1(lift)), set1(kRound)), set1_bits(0u - round)) : set1_bits(0);
      int32_t whole[16];
      __builtin_memcpy(whole, &q, sizeof whole);
      for (int k = 0; k < 16; ++k) total += whole[k];
      if (by_digits()) {
        const V t = bits_add(q, set1_bits(0x808080));  // bytes of t are the digits plus 128
        store_low_bytes(row.digits(0, features) + i, bits_add(t, set1_bits(0x80)));
        store_low_bytes(row.digits(1, features) + i, bits_add(bits_right<8>(t), set1_bits(0x80)));
        store_low_bytes(row.digits(2, features) + i, bits_add(bits_right<16>(t), set1_bits(0x80)));
      } else {
        const V t = bits_add(q, set1_bits(1024));
        store_low_halves(reinterpret_cast<uint16_t*>(row.high()) + i, bits_right<11>(t));
        store_low_halves(reinterpret_cast<uint16_t*>(row.low(features)) + i, bits_add(bits_and(t, set1_bits(2047)), set1_bits(0u - 1024)));
      }
    }
    row.total = total;
  }
}

// sum[c] += q . w[c] over features [k, k + n) of `count` classes.
FASTEE_PIECE void add_halves(FixedRow& x, int64_t features, int64_t k, int64_t n, const int8_t* w, int64_t ws, int64_t count, int64_t ahead,
                             int64_t* sum) {
  const int16_t *high = x.high() + k, *low = x.low(features) + k;
  for (int64_t c = 0; c < count; ++c) {
    const int8_t* row = w + c * ws;
    int32_t above = 0, below = 0;
    for (int64_t i = 0; ahead && i < n; i += 64) __builtin_prefetch(row + i + ahead, 0, 2);
    for (int64_t i = 0; i < n; ++i) {
      const int16_t v = row[i];
      above += high[i] * v;
      below += low[i] * v;
    }
    sum[c] += 2048 * static_cast<int64_t>(above) + below;
  }
}

#if defined(FASTEE_SIMD_AVX512)
// sum += u . digits, sixteen sums of four. Written out because GCC 12 copies the accumulator around the intrinsic: 24 moves beside the 12 products
// of a step, in the window in which loads are on their way. 1 MB from the L3 cache took 17.5 instead of 15.5 us (Zen 4).
FASTEE_INLINE void add_products(__m512i& sum, __m512i u, __m512i digits) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(digits)); }

template <int...>
struct Classes {};

// The same by digits. vpdpbusd takes w + 128 as its unsigned operand: 128 times the sum of all q is too much. Four classes at a time, k, k + 4,
// k + 8 and k + 12: their sums are half reduced while the next four are read.
__attribute__((target("avx512vnni"))) FASTEE_PIECE void add_digits(FixedRow& x, int64_t features, int64_t k, int64_t n, const int8_t* w,
                                                                   int64_t ws, int64_t count, int64_t ahead, int64_t* sum) {
  const __m512i sign = _mm512_set1_epi8(-128);
  const int8_t *low = x.digits(0, features) + k, *middle = x.digits(1, features) + k, *high = x.digits(2, features) + k;
  V quad[3][4];
  auto four = [&]<int... J>(int c, Classes<J...>) FASTEE_LAMBDA {  // J, not a loop: GCC places arrays before it unrolls
    const int8_t* row[4] = {w + (c + 4 * J < count ? c + 4 * J : count - 1) * ws...};
    __m512i a[4], b[4], d[4];
    ((a[J] = b[J] = d[J] = _mm512_setzero_si512()), ...);
    auto meet = [&](int64_t i, auto read) FASTEE_LAMBDA {
      const __m512i x0 = _mm512_load_si512(low + i), x1 = _mm512_load_si512(middle + i), x2 = _mm512_load_si512(high + i);
      __m512i u;
      ((u = _mm512_xor_si512(read(row[J] + i), sign), add_products(a[J], u, x0), add_products(b[J], u, x1), add_products(d[J], u, x2)), ...);
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      if (ahead) (__builtin_prefetch(row[J] + i + ahead, 0, 2), ...);
      meet(i, [](const int8_t* p) FASTEE_LAMBDA { return _mm512_loadu_si512(p); });
    }
    if (i < n) meet(i, [&](const int8_t* p) FASTEE_LAMBDA { return _mm512_maskz_loadu_epi8((__mmask64{1} << (n - i)) - 1, p); });
    quad[0][c] = quarter_sums(as_lanes(a[J])..., bits_add), quad[1][c] = quarter_sums(as_lanes(b[J])..., bits_add);
    quad[2][c] = quarter_sums(as_lanes(d[J])..., bits_add);
  };
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) four(c, Classes<0, 1, 2, 3>());
  alignas(64) int32_t part[3][16];
#pragma GCC unroll 3
  for (int d = 0; d < 3; ++d) _mm512_store_si512(part[d], as_bits(sums_of_quarters(quad[d], bits_add)));
  for (int c = 0; c < 16; ++c) sum[c] += (static_cast<int64_t>(part[2][c]) << 16) + (static_cast<int64_t>(part[1][c]) << 8) + part[0][c];
}
#endif

// z[r, c] = finish(x[r] . w[c]) with rows from fix_rows(). Sixteen classes stay in the cache while all rows pass.
FASTEE_PIECE void linear_int8(float* fixed, int64_t rows, const int8_t* w, int64_t classes, int64_t ws, int64_t features, int64_t ahead,
                              Finish finish, float* z, int64_t zs) {
  for (int64_t c = 0; c < classes; c += 16) {
    const int64_t count = classes - c < 16 ? classes - c : 16;
    for (int64_t r = 0; r < rows; ++r) {
      FixedRow& x = fixed_row(fixed, r, features);
      int64_t sum[16];
      for (int64_t& s : sum) s = by_digits() ? -128 * x.total : 0;
      for (int64_t k = 0; k < features; k += kFixedBlock) {
        const int64_t n = features - k < kFixedBlock ? features - k : kFixedBlock;
        const int8_t* from = w + c * ws + k;
#if defined(FASTEE_SIMD_AVX512)
        if (by_digits()) {
          add_digits(x, features, k, n, from, ws, count, r ? 0 : ahead, sum);
          continue;
        }
#endif
        add_halves(x, features, k, n, from, ws, count, r ? 0 : ahead, sum);
      }
      float dots[16];
      for (int j = 0; j < 16; ++j) dots[j] = static_cast<float>(static_cast<double>(sum[j]) * x.unit);
      float* to = z + r * zs + c;
      if (count == 16)
        store(to, finish(load(dots), c));
      else
        for (int64_t j = 0; j < count; ++j) to[j] = finish(dots[j], c + j);
    }
  }
}
}  // namespace fastee::cpu::FASTEE_ISA
