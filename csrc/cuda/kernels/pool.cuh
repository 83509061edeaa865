// pool and norm: rows of an activation to rows of fp32 features in shared or global memory, by all threads of a block.
#pragma once
#include "cuda/device.cuh"

namespace fastee::cuda {

__host__ __device__ constexpr int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }

// Rows [first, first + rows) of x to out, `stride` apart; what lies between a row's end and the next multiple of sixteen becomes 0 when
// `pad` says so. The order of every sum is that of cpu/pool-inl.h.
template <typename T>
__device__ __forceinline__ void pool_rows(const cpu::Activation& x, int64_t first, int rows, float* out, int64_t stride, bool pad) {
  const int threads = static_cast<int>(blockDim.x), rank = static_cast<int>(threadIdx.x);
  const T* base = static_cast<const T*>(x.data) + first * x.row_stride;
  constexpr int kValues = Vector<T>::kValues;
  const int features = static_cast<int>(x.features);
  const bool wide =
      x.feature_stride == 1 && features % kValues == 0 && aligned16(base) && x.row_stride % kValues == 0 && x.inner_stride % kValues == 0;
  if (x.inner == 1 && !x.mask && x.feature_stride == 1) {  // one vector: widened and nothing else, so that -0 stays -0
    const int steps = wide ? features / kValues : features;
#pragma unroll 4
    for (int i = rank; i < rows * steps; i += threads) {
      const int r = i / steps, d = i % steps;
      if (!wide) {
        out[r * stride + d] = widen(base[r * x.row_stride + d]);
        continue;
      }
      const Vector<T> v = load16(base + r * x.row_stride + d * kValues);
#pragma unroll
      for (int k = 0; k < kValues; ++k) out[r * stride + d * kValues + k] = widen(v.values[k]);
    }
  } else if (x.feature_stride == 1) {
    const int steps = wide ? features / kValues : features, step = wide ? kValues : 1;
    for (int i = rank; i < rows * steps; i += threads) {
      const int r = i / steps, d = i % steps * step;
      const uint8_t* mask = x.mask ? x.mask + (first + r) * x.mask_stride : nullptr;
      const T* p = base + r * x.row_stride + d;
      float sums[kValues] = {};
      int64_t kept = x.inner;
      if (mask) kept = 0;
#pragma unroll 4
      for (int64_t j = 0; j < x.inner; ++j) {
        if (mask && !mask[j]) continue;
        if (mask) ++kept;
        if (wide) {
          const Vector<T> v = load16(p + j * x.inner_stride);
#pragma unroll
          for (int k = 0; k < kValues; ++k) sums[k] += widen(v.values[k]);
        } else {
          sums[0] += widen(p[j * x.inner_stride]);
        }
      }
      const float scale = 1.0f / static_cast<float>(kept);  // no token: 0 * inf = NaN, a row that never exits
#pragma unroll
      for (int k = 0; k < kValues; ++k)
        if (k < step) out[r * stride + d + k] = sums[k] * scale;
    }
  } else {  // inner contiguous: a half warp per feature, four features in flight
    const float scale = 1.0f / static_cast<float>(x.inner);
    const int lane = rank & 15, half = rank / 16, halves = threads / 16, all = rows * features;
    for (int from = half & ~1; from < all; from += 4 * halves) {  // both halves of a warp take the same number of turns
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int f = from + (half & 1) + k * halves;
        if (f >= all) continue;
        const T* p = base + (f / features) * x.row_stride + (f % features) * x.feature_stride;
        for (int64_t i = lane; i < x.inner; i += 16) sums[k] += widen(p[i]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int f = from + (half & 1) + k * halves;
        const float sum = sum16(sums[k]);
        if (f < all && lane == 0) out[(f / features) * stride + f % features] = sum * scale;
      }
    }
  }
  if (pad) {
    const int gap = static_cast<int>(round16(features)) - features;
    for (int i = rank; i < rows * gap; i += threads) out[i / gap * stride + features + i % gap] = 0.0f;
  }
}

__device__ __forceinline__ void pool_rows(const cpu::Activation& x, int64_t first, int rows, float* out, int64_t stride, bool pad) {
  with_float(x.element,
             [&](auto* of) { pool_rows<std::remove_cv_t<std::remove_pointer_t<decltype(of)>>>(x, first, rows, out, stride, pad); });
}

// Rows of features in shared memory, normalised where they lie; a half warp per row.
__device__ __forceinline__ void normalize_rows(const cpu::HeadArgs& a, float* features, int64_t stride, int rows) {
  const int lane = static_cast<int>(threadIdx.x & 15), half = static_cast<int>(threadIdx.x / 16),
            halves = static_cast<int>(blockDim.x / 16);
  const int n = static_cast<int>(a.x.features);
  for (int from = half & ~1; from < rows; from += halves) {
    const int r = from + (half & 1);
    float* x = features + (r < rows ? r : rows - 1) * stride;
    float shift = 0.0f, scale = 1.0f;
    if (a.norm == 1 || a.norm == 2) {
      const float count = static_cast<float>(n);
      if (a.norm == 1) {
        float total = 0.0f;
        for (int i = lane; i < n; i += 16) total += x[i];
        shift = sum16(total) / count;
      }
      float squares = 0.0f;
      for (int i = lane; i < n; i += 16) {
        const float d = x[i] - shift;  // a second pass: one pass loses digits when the mean is large
        squares = __fmaf_rn(d, d, squares);
      }
      scale = 1.0f / sqrtf(sum16(squares) / count + a.norm_eps);
    }
    if (r >= rows) continue;
    for (int i = lane; i < n; i += 16) {
      float v = (x[i] - shift) * scale;
      if (a.norm_weight) v *= a.norm_weight[i];
      if (a.norm_bias) v += a.norm_bias[i];
      x[i] = v;
    }
  }
}

// The pool alone, for a head whose classes are divided over blocks: it is then read once, not once a slice. One row per block.
struct PoolArgs {
  cpu::Activation x;
  float* out;
  int64_t out_stride;
};
static __global__ void __launch_bounds__(256) pool(const __grid_constant__ PoolArgs a) {
  pool_rows(a.x, blockIdx.x, 1, a.out + blockIdx.x * a.out_stride, a.out_stride, false);
}
}  // namespace fastee::cuda
