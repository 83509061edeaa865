// quantize_rows: max|x| of a group, then every value on the format's grid; the bits of cpu/quantize_rows-inl.h, from fp32, bf16 or fp16.
// A row per block; it is brought into shared memory by 16-byte copies, so that memory is read once although the row is walked twice. A
// large group takes all threads, a small one a warp. Floor: read the row, write its codes and scales.
#pragma once
#include "cuda/device.cuh"

namespace fastee::cuda {

constexpr int kLargeGroup = 1024;  // values from which all threads take a group together

struct RowFormat {
  int format;
  int64_t row, group;
};

// How a group is brought onto the grid [-limit, limit]: x * lift * inverse. `blank`: NaN or inf in it, or nothing but zeros.
struct Grid {
  float lift, inverse, scale;
  bool blank;
};
__device__ __forceinline__ Grid grid_of(unsigned bits, int format) {
  const float limit = format == cpu::kE4M3 ? 448.0f : format == cpu::kInt4 ? 7.0f : 127.0f;
  const float largest = format == cpu::kE4M3 ? 0x1.249248p+119f : format == cpu::kInt4 ? 0x1.249248p+125f : 0x1.020406p+121f;
  if (bits >= 0x7f800000) return {1.0f, 0.0f, __uint_as_float(0x7fc00000), true};
  const float top = __uint_as_float(bits), step = top / limit, lift = top < 0x1p-100f ? 0x1p64f : 1.0f;
  return {lift, bits == 0 ? 0.0f : limit / (top * lift), step < largest ? step : largest, bits == 0};
}

__device__ __forceinline__ unsigned e4m3_of(float v) {
  const unsigned bits = __float_as_uint(v), magnitude = bits & 0x7fffffff;
  const unsigned normal = (magnitude + (0x7ffff - (120u << 23)) + (magnitude >> 20 & 1)) >> 20;
  const unsigned tiny = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) & 0xff;
  return ((__uint_as_float(magnitude) < 0x1p-6f ? tiny : normal) | (bits >> 24 & 0x80)) & 0xff;
}
__device__ __forceinline__ unsigned bf16_of(float v) {
  const unsigned bits = __float_as_uint(v);
  return v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}
__device__ __forceinline__ unsigned code_of(float v, Grid g, int format) {
  if (g.blank) return format == cpu::kE4M3 && g.scale == 0.0f ? __float_as_uint(v) >> 24 & 0x80 : 0;  // zeros keep their sign
  const float y = v * g.lift * g.inverse;
  if (format == cpu::kE4M3) return e4m3_of(y);
  return __float_as_uint(y + 12582912.0f) & (format == cpu::kInt4 ? 15 : 255);  // 1.5 * 2^23 rounds, half to even
}

// A row's values; which type they have is asked at every load, the same answer for all threads, so that there is one copy of the code.
struct Row {
  const void* x;
  int element;
  bool whole;  // loads of four neighbouring values are aligned at the beginning of every group

  __device__ __forceinline__ float at(int64_t i) const {
    return element == kF32    ? static_cast<const float*>(x)[i]
           : element == kBF16 ? widen(static_cast<const bf16*>(x)[i])
                              : widen(static_cast<const f16*>(x)[i]);
  }
  // Values [i, i + 4); zeros from `end` on.
  __device__ __forceinline__ void four(int64_t i, int64_t end, bool wide, float* v) const {
    if (wide && i + 4 <= end) {
      if (element == kF32) {
        const float4 f = *reinterpret_cast<const float4*>(static_cast<const float*>(x) + i);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
      } else {
        const uint2 u = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x) + i);
        const unsigned pairs[2] = {u.x, u.y};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint16_t bits = static_cast<uint16_t>(pairs[k / 2] >> (16 * (k & 1)));
          v[k] = element == kBF16 ? widen(bf16{bits}) : widen(f16{bits});
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = i + k < end ? at(i + k) : 0.0f;
    }
  }
};

// The bits of max|x| over [from, end) as `size` threads see it, this one being `rank`; not yet reduced over them.
__device__ __forceinline__ unsigned own_largest(const Row& x, int64_t from, int64_t end, int rank, int size, bool wide) {
  unsigned top = 0;
#pragma unroll 4
  for (int64_t i = from + 4 * rank; i < end; i += 4 * size) {
    float v[4];
    x.four(i, end, wide, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned bits = __float_as_uint(v[k]) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
  }
  return top;
}

// Codes of values [from, end), the first group's up to `middle` on grid g, the rest on h. For int4 `from` is even.
__device__ __forceinline__ void write_codes(const Row& x, int64_t from, int64_t middle, int64_t end, const Grid& g, const Grid& h,
                                            int format, uint8_t* data, int rank, int size, bool wide) {
#pragma unroll 2
  for (int64_t i = from + 4 * rank; i < end; i += 4 * size) {
    float v[4];
    x.four(i, end, wide, v);
    unsigned q[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool one = i + k < middle;
      const Grid here{one ? g.lift : h.lift, one ? g.inverse : h.inverse, one ? g.scale : h.scale, one ? g.blank : h.blank};
      q[k] = i + k < end ? code_of(v[k], here, format) : 0;
    }
    if (format == cpu::kInt4) {
      const unsigned pair = q[0] | q[1] << 4 | q[2] << 8 | q[3] << 12;
      if (i + 4 <= end && (reinterpret_cast<uintptr_t>(data + i / 2) & 1) == 0) {
        *reinterpret_cast<uint16_t*>(data + i / 2) = static_cast<uint16_t>(pair);
      } else {
        data[i / 2] = static_cast<uint8_t>(pair);
        if (i + 2 < end) data[i / 2 + 1] = static_cast<uint8_t>(pair >> 8);
      }
    } else if (i + 4 <= end && (reinterpret_cast<uintptr_t>(data + i) & 3) == 0) {
      *reinterpret_cast<unsigned*>(data + i) = q[0] | q[1] << 8 | q[2] << 16 | q[3] << 24;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + k < end) data[i + k] = static_cast<uint8_t>(q[k]);
    }
  }
}

// One row by all threads of a block. `words`: 32 words of shared memory.
__device__ __forceinline__ void quantize_row(const Row& x, const RowFormat& f, uint8_t* data, float* scale, unsigned* words) {
  const int rank = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x), lane = rank & 31, warp = rank / 32,
            warps = size / 32;
  if (f.format == cpu::kBf16Rows) {
    for (int64_t i = 4 * rank; i < f.row; i += 4 * size) {
      float v[4];
      x.four(i, f.row, x.whole, v);
      if (i + 4 <= f.row && (reinterpret_cast<uintptr_t>(data + 2 * i) & 7) == 0) {
        *reinterpret_cast<uint2*>(data + 2 * i) = uint2{bf16_of(v[0]) | bf16_of(v[1]) << 16, bf16_of(v[2]) | bf16_of(v[3]) << 16};
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (i + k < f.row) reinterpret_cast<uint16_t*>(data)[i + k] = static_cast<uint16_t>(bf16_of(v[k]));
      }
    }
    return;
  }
  const int step = f.format == cpu::kInt4 && f.group % 2 ? 2 : 1;  // two groups of odd length share a byte
  const bool large = f.group >= kLargeGroup;
  const int64_t groups = f.row / f.group;
  for (int64_t at = large ? 0 : warp * step; at < groups; at += large ? step : warps * step) {
    const int64_t from = at * f.group, middle = from + f.group, end = at + step <= groups ? from + step * f.group : middle;
    const int r = large ? rank : lane, n = large ? size : 32;
    auto grid_over = [&](int64_t begin, int64_t stop, bool wide) {  // called by all who take the group together
      unsigned top = __reduce_max_sync(kAll, own_largest(x, begin, stop, r, n, wide));
      if (large) {
        __syncthreads();
        if (lane == 0) words[warp] = top;
        __syncthreads();
        for (int w = 0; w < warps; ++w) top = words[w] > top ? words[w] : top;
      }
      return grid_of(top, f.format);
    };
    const Grid g = grid_over(from, middle, x.whole), h = end > middle ? grid_over(middle, end, false) : g;
    if (r == 0) {
      scale[at] = g.scale;
      if (end > middle) scale[at + 1] = h.scale;
    }
    write_codes(x, from, middle, end, g, h, f.format, data, r, n, x.whole && step == 1);
  }
}

// Whether loads of four neighbouring values may be used at the beginning of every row and group.
inline bool whole_rows(const void* x, int element, int64_t row_stride, const RowFormat& f) {
  const uintptr_t four = element == kF32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(x) % four == 0 && row_stride % 4 == 0 && (f.group == f.row || f.group % 4 == 0);
}
}  // namespace fastee::cuda
