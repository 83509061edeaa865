// Products of rows with classes. Every dot product is summed the same way wherever it stands: sixteen lanes walk the features in
// order with fused multiply-adds, then one fixed tree. Tiles, blocks and batch sizes change only which products share loads,
// never a product's value; that is what makes a row's decision independent of its batch.
#pragma once
#include "cpu/element.h"

namespace fastee::cpu::FASTEE_ISA {

// Accumulate features [k, k + n) of R rows x C classes into acc (sixteen lanes each).
template <int R, int C, typename T>
FASTEE_INLINE void accumulate(const float* x, int64_t xs, const T* w, int64_t ws, int64_t n, V (&acc)[R][C]) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const float* xp = x + i + part * kPartLanes;
      const T* wp = w + i + part * kPartLanes;
      Part a[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] = load_part(xp + r * xs);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Part b = load_part(wp + c * ws);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) fma_part(acc[r][c], part, a[r], b);
      }
    }
  if (i < n) {
    V a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load_n(x + r * xs + i, n - i, 0.0f);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V b = load_n(w + c * ws + i, n - i, 0.0f);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] = fma(a[r], b, acc[r][c]);
    }
  }
}

// Features are walked in blocks of 1024 (4 KB a row) so that a block of classes stays in the L1 cache while all rows of the
// chunk pass; between blocks the lanes rest in `lanes`, unreduced, so the order of summation stays the same.
constexpr int64_t kFeatureBlock = 1024;

// What becomes of a finished product: scaled (int8 weights) and shifted, one number per class, either null.
struct Finish {
  const float *scale, *bias;
  FASTEE_LAMBDA float operator()(float dot, int64_t c) const { return (scale ? dot * scale[c] : dot) + (bias ? bias[c] : 0.0f); }
  FASTEE_LAMBDA Finish from(int64_t c) const { return {scale ? scale + c : nullptr, bias ? bias + c : nullptr}; }
};

template <int R, int C, typename T>
FASTEE_INLINE void tile(const float* x, int64_t xs, const T* w, int64_t ws, int64_t n, float* lanes, bool first, bool last, Finish finish, float* z,
                        int64_t zs) {
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = first ? set1(0.0f) : load(lanes + 16 * (r * C + c));
  accumulate<R, C>(x, xs, w, ws, n, acc);
  if constexpr (R * C == 16) {
    if (last) {
      V all[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) all[i] = acc[i / C][i % C];
      float dots[16];
      store(dots, sums(all));
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) z[i / C * zs + i % C] = finish(dots[i], i % C);
      return;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (last)
        z[r * zs + c] = finish(sum(acc[r][c]), c);
      else
        store(lanes + 16 * (r * C + c), acc[r][c]);
    }
}

template <int C, typename T>
FASTEE_INLINE void class_block(const float* x, int64_t rows, int64_t xs, const T* w, int64_t ws, int64_t features, Finish finish, float* z, int64_t zs,
                               float* lanes) {
  for (int64_t k = 0; k < features; k += kFeatureBlock) {
    const bool first = k == 0, last = k + kFeatureBlock >= features;
    const int64_t n = last ? features - k : kFeatureBlock;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      tile<kTileRows, C>(x + r * xs + k, xs, w + k, ws, n, lanes + 16 * r * C, first, last, finish, z + r * zs, zs);
    for (; r < rows; ++r) tile<1, C>(x + r * xs + k, xs, w + k, ws, n, lanes + 16 * r * C, first, last, finish, z + r * zs, zs);
  }
}

// z[r, c] = finish(x[r] . w[c]); `lanes` holds 16 * rows * kTileClasses floats.
template <typename T>
FASTEE_PIECE void linear(const float* x, int64_t rows, int64_t xs, const T* w, int64_t classes, int64_t ws, int64_t features, Finish finish, float* z,
                          int64_t zs, float* lanes) {
  int64_t c = 0;
  if (rows == 1) {
    for (; c + kRowClasses <= classes; c += kRowClasses)
      tile<1, kRowClasses>(x, xs, w + c * ws, ws, features, lanes, true, true, finish.from(c), z + c, zs);
  } else {
    for (; c + kTileClasses <= classes; c += kTileClasses)
      class_block<kTileClasses>(x, rows, xs, w + c * ws, ws, features, finish.from(c), z + c, zs, lanes);
  }
  for (; c < classes; ++c) class_block<1>(x, rows, xs, w + c * ws, ws, features, finish.from(c), z + c, zs, lanes);
}
}  // namespace fastee::cpu::FASTEE_ISA
