// quantize_rows: max|x| of a group, then every value on the format's grid. Two passes over a group that the first brought into the
// cache. Floor: read 4 bytes, write 1 (int4: half a byte, bf16: 2, in one pass).
#pragma once
#include "cpu/bits.h"
#include "cpu/element.h"
#include "cpu/kernels.h"

namespace fastee::cpu::FASTEE_ISA {

// Bits of the largest |x|: as integers they order like the magnitudes, with inf and NaN on top.
FASTEE_INLINE uint32_t largest_bits(const float* x, int64_t n) {
  const V magnitude = set1_bits(0x7fffffff);
  V m[4] = {set1_bits(0), set1_bits(0), set1_bits(0), set1_bits(0)};  // four chains hide the latency of the maximum
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) m[k] = bits_max(m[k], bits_and(load(x + i + 16 * k), magnitude));
  for (; i < n; i += 16) m[0] = bits_max(m[0], bits_and(load_n(x + i, n - i < 16 ? n - i : 16, 0.0f), magnitude));
  return highest_bits(bits_max(bits_max(m[0], m[1]), bits_max(m[2], m[3])));
}

// How a group is brought onto the grid [-limit, limit]: x * lift * inverse, which passes the limit by a few roundings at most: far from the
// next number of any grid, so nothing needs clamping. `blank`: the group holds NaN or inf, or nothing but zeros.
struct Grid {
  float lift, inverse, scale;
  bool blank;
};

FASTEE_INLINE Grid grid_of(uint32_t bits, float limit, float largest_scale) {
  if (bits >= 0x7f800000) return {1.0f, 0.0f, __builtin_nanf(""), true};
  float top;
  __builtin_memcpy(&top, &bits, 4);
  const float step = top / limit;
  const float lift = top < 0x1p-100f ? 0x1p64f : 1.0f;  // keeps limit / top finite; a power of two, so exact
  const bool zero = bits == 0;
  return {lift, zero ? 0.0f : limit / (top * lift), step < largest_scale ? step : largest_scale, zero};
}

// The low byte of each lane: the OCP e4m3fn code of v, |v| <= 448, rounded half to even. From 2^-6 on by carrying into bit 20 of the
// fp32 pattern, below by an addition whose last place is the denormals' step of 2^-9.
FASTEE_INLINE V e4m3_of(V v) {
  const V magnitude = bits_and(v, set1_bits(0x7fffffff));
  const V odd = bits_and(bits_right<20>(magnitude), set1_bits(1));
  const V normal = bits_right<20>(bits_add(bits_add(magnitude, set1_bits(0x7ffff - (120u << 23))), odd));
  const V tiny = bits_and(add(magnitude, set1(16384.0f)), set1_bits(0xff));
  return bits_or(select_gt(set1(0x1p-6f), magnitude, tiny, normal), bits_and(bits_right<24>(v), set1_bits(0x80)));
}

FASTEE_INLINE V of_e4m3(V code) {
  const V f = bits_add(bits_left<20>(bits_and(code, set1_bits(0x7f))), set1_bits(120u << 23));
  const V small = sub(f, set1(0x1p-7f));
  const V magnitude = select_eq(f, set1(480.0f), set1(__builtin_nanf("")), select_gt(set1(0x1p-6f), f, add(small, small), f));
  return bits_or(magnitude, bits_left<24>(bits_and(code, set1_bits(0x80))));
}

// The low half of each lane: bf16, rounded half to even; a NaN keeps its sign and upper payload and becomes quiet.
FASTEE_INLINE V bf16_of(V v) {
  const V high = bits_right<16>(v);
  const V rounded = bits_right<16>(bits_add(v, bits_add(set1_bits(0x7fff), bits_and(high, set1_bits(1)))));
  const V quiet = bits_or(high, set1_bits(0x40));
  return select_eq(v, v, rounded, quiet);
}

// n values of a group to n bytes: int8 (int4 as bytes) or e4m3.
template <bool E4M3, bool Lift>
FASTEE_INLINE void quantize_finite(const float* x, int64_t n, const Grid& g, uint8_t* q) {
  auto code = [&](V v) FASTEE_LAMBDA {
    const V y = mul(Lift ? mul(v, set1(g.lift)) : v, set1(g.inverse));
    if constexpr (E4M3)
      return e4m3_of(y);
    else
      return add(y, set1(kRound));
  };
  int64_t i = 0;
#if defined(FASTEE_SIMD_AVX2)  // four stores of sixteen bytes cost more shuffles there than two of thirty-two
  for (; i + 64 <= n; i += 64) store_low_bytes_64(q + i, code(load(x + i)), code(load(x + i + 16)), code(load(x + i + 32)), code(load(x + i + 48)));
#endif
  for (; i + 16 <= n; i += 16) store_low_bytes(reinterpret_cast<int8_t*>(q + i), code(load(x + i)));
  if (i < n) {
    int8_t tail[16];
    store_low_bytes(tail, code(load_n(x + i, n - i, 0.0f)));
    for (int64_t k = 0; i + k < n; ++k) q[i + k] = static_cast<uint8_t>(tail[k]);
  }
}

template <bool E4M3>
FASTEE_INLINE void quantize_bytes(const float* x, int64_t n, const Grid& g, uint8_t* q) {
  if (g.blank) {
    __builtin_memset(q, 0, static_cast<unsigned long>(n));
    if (E4M3 && g.scale == 0.0f)
      for (int64_t i = 0; i < n; ++i) q[i] = __builtin_signbit(x[i]) ? 0x80 : 0;  // zeros keep their sign
  } else if (g.lift == 1.0f) {
    quantize_finite<E4M3, false>(x, n, g, q);
  } else {
    quantize_finite<E4M3, true>(x, n, g, q);
  }
}

FASTEE_PIECE void widen_row(const uint16_t* x, int element, int64_t n, float* out) {
  with_float(element, [&]<typename T>(const T*) FASTEE_LAMBDA {
    const T* from = reinterpret_cast<const T*>(x);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(from + i));
    if (i < n) store_n(out + i, load_n(from + i, n - i, 0.0f), n - i);
  });
}

constexpr int64_t kNibbles = 1024;  // values that wait as bytes until they are packed two by two

// A row of activations as fp32, `step` values at a time: where it lies, or widened into the L1 cache. Widening is exact, so the result is
// that of the fp32 row; kernels for each type would not be faster and cost three times the code.
struct Floats {
  const void* row;
  int element;
  int64_t step;
  const uint32_t* known;
  alignas(64) float wide[kNibbles];

  Floats(const QuantizeArgs& a, int64_t b) : element(a.element), step(element == kF32 ? INT64_MAX : kNibbles), known(a.largest ? a.largest + b : nullptr) {
    row = static_cast<const char*>(a.x) + b * a.row_stride * (element == kF32 ? 4 : 2);
  }
  const float* at(int64_t i, int64_t n) {
    if (element == kF32) return static_cast<const float*>(row) + i;
    widen_row(static_cast<const uint16_t*>(row) + i, element, n, wide);
    return wide;
  }
  uint32_t largest(int64_t from, int64_t n) {
    if (known) return *known;
    uint32_t top = 0;
    for (int64_t i = 0, here; i < n; i += here) {
      here = n - i < step ? n - i : step;
      const uint32_t bits = largest_bits(at(from + i, here), here);
      top = bits > top ? bits : top;
    }
    return top;
  }
};

// Pairs of bytes to bytes: the even value in the low nibble; an odd last value has 0 above it.
FASTEE_INLINE void join_nibbles(const uint8_t* q, int64_t n, uint8_t* out) {
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    uint16_t w;
    __builtin_memcpy(&w, q + 2 * i, 2);
    out[i] = static_cast<uint8_t>((w & 15) | ((w >> 4) & 0xf0));
  }
  if (n & 1) out[pairs] = q[n - 1] & 15;
}

FASTEE_INLINE void split_nibbles(const uint8_t* in, int64_t n, int8_t* q) {
  const int64_t pairs = (n + 1) / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const uint16_t w = static_cast<uint16_t>((in[i] | in[i] << 4) & 0x0f0f);
    __builtin_memcpy(q + 2 * i, &w, 2);
  }
  for (int64_t i = 0; i < 2 * pairs; ++i) q[i] = static_cast<int8_t>((q[i] ^ 8) - 8);
}

FASTEE_PIECE void quantize_int4_row(const QuantizeArgs& a, Floats& x, uint8_t* out, float* scale) {
  alignas(64) uint8_t waiting[kNibbles];
  int64_t held = 0;
  for (int64_t at = 0; at < a.row; at += a.group) {
    const Grid g = grid_of(x.largest(at, a.group), 7.0f, 0x1.249248p+125f);
    *scale++ = g.scale;
    for (int64_t i = 0; i < a.group;) {
      const int64_t n = a.group - i < kNibbles - held ? a.group - i : kNibbles - held;
      quantize_bytes<false>(x.at(at + i, n), n, g, waiting + held);
      i += n, held += n;
      if (held == kNibbles) join_nibbles(waiting, kNibbles, out), out += kNibbles / 2, held = 0;
    }
  }
  join_nibbles(waiting, held, out);
}

FASTEE_INLINE void quantize_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_low_halves(out + i, bf16_of(load(x + i)));
  if (i < n) {
    uint16_t tail[16];
    store_low_halves(tail, bf16_of(load_n(x + i, n - i, 0.0f)));
    for (int64_t k = 0; i + k < n; ++k) out[i + k] = tail[k];
  }
}

FASTEE_PIECE void quantize_bf16_row(const QuantizeArgs& a, Floats& x, uint16_t* out) {
  for (int64_t i = 0, n; i < a.row; i += n) {
    n = a.row - i < x.step ? a.row - i : x.step;
    quantize_bf16(x.at(i, n), n, out + i);
  }
}

template <bool E4M3>
FASTEE_PIECE void quantize_byte_row(const QuantizeArgs& a, Floats& x, uint8_t* out, float* scale) {
  for (int64_t at = 0; at < a.row; at += a.group) {
    const Grid g = E4M3 ? grid_of(x.largest(at, a.group), 448.0f, 0x1.249248p+119f) : grid_of(x.largest(at, a.group), 127.0f, 0x1.020406p+121f);
    *scale++ = g.scale;
    for (int64_t i = 0, n; i < a.group; i += n) {
      n = a.group - i < x.step ? a.group - i : x.step;
      quantize_bytes<E4M3>(x.at(at + i, n), n, g, out + at + i);
    }
  }
}

static void quantize_rows(const QuantizeArgs& a) {
  const int64_t groups = a.row / a.group;
  for (int64_t b = 0; b < a.rows; ++b) {
    Floats x(a, b);
    uint8_t* out = a.data + b * a.data_stride;
    switch (a.format) {
      case kInt4: quantize_int4_row(a, x, out, a.scale + b * groups); break;
      case kE4M3: quantize_byte_row<true>(a, x, out, a.scale + b * groups); break;
      case kBf16Rows: quantize_bf16_row(a, x, reinterpret_cast<uint16_t*>(out)); break;
      default: quantize_byte_row<false>(a, x, out, a.scale + b * groups); break;
    }
  }
}

// n values that share a scale, from int8 or e4m3 bytes.
template <bool E4M3>
FASTEE_INLINE void dequantize_bytes(const uint8_t* q, int64_t n, float scale, float* out) {
  auto value = [&](const uint8_t* p) FASTEE_LAMBDA {
    if constexpr (E4M3)
      return mul(of_e4m3(load_u8(p)), set1(scale));
    else
      return mul(load_i8(reinterpret_cast<const int8_t*>(p)), set1(scale));
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, value(q + i));
  if (i < n) {
    uint8_t tail[16] = {};
    for (int64_t k = 0; i + k < n; ++k) tail[k] = q[i + k];
    store_n(out + i, value(tail), n - i);
  }
}

FASTEE_PIECE void dequantize_int4_row(const DequantizeArgs& a, const uint8_t* in, const float* scale, float* out) {
  alignas(64) int8_t bytes[kNibbles];
  for (int64_t from = 0; from < a.row; from += kNibbles) {
    const int64_t to = from + kNibbles < a.row ? from + kNibbles : a.row;
    split_nibbles(in + from / 2, to - from, bytes);
    for (int64_t i = from; i < to;) {
      const int64_t group = i / a.group, end = (group + 1) * a.group < to ? (group + 1) * a.group : to;
      dequantize_bytes<false>(reinterpret_cast<const uint8_t*>(bytes) + (i - from), end - i, scale[group], out + i);
      i = end;
    }
  }
}

template <bool E4M3>
FASTEE_PIECE void dequantize_byte_row(const DequantizeArgs& a, const uint8_t* in, const float* scale, float* out) {
  for (int64_t at = 0; at < a.row; at += a.group) dequantize_bytes<E4M3>(in + at, a.group, *scale++, out + at);
}

FASTEE_O3_PIECE void dequantize_bf16_row(const bf16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load(in + i));
  if (i < n) store_n(out + i, load_n(in + i, n - i, 0.0f), n - i);
}

static void dequantize_rows(const DequantizeArgs& a) {
  const int64_t groups = a.row / a.group;
  for (int64_t b = 0; b < a.rows; ++b) {
    const uint8_t* in = a.data + b * a.data_stride;
    float* out = a.out + b * a.out_stride;
    switch (a.format) {
      case kInt4: dequantize_int4_row(a, in, a.scale + b * groups, out); break;
      case kE4M3: dequantize_byte_row<true>(a, in, a.scale + b * groups, out); break;
      case kBf16Rows: dequantize_bf16_row(reinterpret_cast<const bf16*>(in), a.row, out); break;
      default: dequantize_byte_row<false>(a, in, a.scale + b * groups, out); break;
    }
  }
}
}  // namespace fastee::cpu::FASTEE_ISA
