// Products of rows with classes. Every dot product is summed the same way wherever it stands: sixteen lanes walk the features in
// order with fused multiply-adds, then one fixed tree. Tiles, blocks and batch sizes change only which products share loads,
// never a product's value; that is what makes a row's decision independent of its batch.
#pragma once
#include "cpu/element.h"

namespace fastee::cpu::FASTEE_ISA {

// How many bytes ahead weights are prefetched into the L2 cache; 0 for few weights. The machine's own prefetchers follow each row of a
// group but stop at its end, or its page's; rows that come from memory spend their time waiting there: 40 MB of fp32 weights take 1.5
// instead of 1.9 ms, 20 MB of bf16 1.1 instead of 1.5 ms. From the L3 cache fp32, which waits for nothing else, loses a quarter by it; narrow
// types, which wait for their products, lose nothing up to 32 KB (Zen 4, 32 MB of L3 cache). `python -m benchmarks run large_head` measures
// them (rows "weights").
template <typename T>
FASTEE_INLINE int64_t prefetch_distance(int64_t classes, int64_t ws) {
  const int64_t weights = classes * ws * static_cast<int64_t>(sizeof(T));
  if (sizeof(T) < 4) return weights >= 512 << 10 ? 32 << 10 : 0;
  return weights >= 24 << 20 ? 64 << 10 : 0;
}

// Accumulate features [k, k + n) of R rows x C classes into acc (sixteen lanes each).
template <int R, int C, typename T>
FASTEE_INLINE void accumulate(const float* x, int64_t xs, const T* w, int64_t ws, int64_t n, int64_t ahead, V (&acc)[R][C]) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (ahead && i * static_cast<int64_t>(sizeof(T)) % 64 == 0)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) __builtin_prefetch(reinterpret_cast<const char*>(w + c * ws + i) + ahead, 0, 2);
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
constexpr int kFewStreams = 4;  // as many chains as hide the latency of a multiply-add on AVX-512

// What becomes of a finished product: scaled (int8 weights) and shifted, one number per class, either null.
struct Finish {
  const float *scale, *bias;
  FASTEE_LAMBDA float operator()(float dot, int64_t c) const { return (scale ? dot * scale[c] : dot) + (bias ? bias[c] : 0.0f); }
  FASTEE_LAMBDA V operator()(V dots, int64_t c) const {  // of sixteen classes
    return add(scale ? mul(dots, load(scale + c)) : dots, bias ? load(bias + c) : set1(0.0f));
  }
  FASTEE_LAMBDA Finish from(int64_t c) const { return {scale ? scale + c : nullptr, bias ? bias + c : nullptr}; }
};

template <int R, int C, typename T>
FASTEE_INLINE void tile(const float* x, int64_t xs, const T* w, int64_t ws, int64_t n, int64_t ahead, float* lanes, bool first, bool last,
                        Finish finish, float* z, int64_t zs) {
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = first ? set1(0.0f) : load(lanes + 16 * (r * C + c));
  accumulate<R, C>(x, xs, w, ws, n, ahead, acc);
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

// The products of one row with sixteen classes, reduced together. Few streams at a time from the caches, where sixteen rows a power of two
// apart would share eight ways; from memory more of them keep more lines on their way (6 and 10 % of fp32, Zen 4). Out of line: within
// linear() GCC 12 keeps the addresses of its loops on the stack (48 instead of 45 us for fp32 1024 -> 1000).
template <int Streams, typename T>
FASTEE_PIECE V row_tile(const float* x, const T* w, int64_t ws, int64_t features, int64_t ahead) {
  V all[16];
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += Streams) {
    V acc[1][Streams];
#pragma GCC unroll 8
    for (int i = 0; i < Streams; ++i) acc[0][i] = set1(0.0f);
    accumulate<1, Streams>(x, 0, w + c * ws, ws, features, ahead, acc);
#pragma GCC unroll 8
    for (int i = 0; i < Streams; ++i) all[c + i] = acc[0][i];
  }
  return sums(all);
}

template <int>
struct Chains {};

template <int C, typename T>
FASTEE_INLINE void class_block(const float* x, int64_t rows, int64_t xs, const T* w, int64_t ws, int64_t features, int64_t ahead,
                               Finish finish, float* z, int64_t zs, float* lanes) {
  for (int64_t k = 0; k < features; k += kFeatureBlock) {
    const bool first = k == 0, last = k + kFeatureBlock >= features;
    const int64_t n = last ? features - k : kFeatureBlock;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      tile<kTileRows, C>(x + r * xs + k, xs, w + k, ws, n, r ? 0 : ahead, lanes + 16 * r * C, first, last, finish, z + r * zs, zs);
    for (; r < rows; ++r)
      tile<1, C>(x + r * xs + k, xs, w + k, ws, n, r ? 0 : ahead, lanes + 16 * r * C, first, last, finish, z + r * zs, zs);
  }
}

// z[r, c] = finish(x[r] . w[c]); `ahead` is the prefetch_distance of all weights, `lanes` holds 16 * rows * kTileClasses floats.
template <typename T>
FASTEE_PIECE void linear(const float* x, int64_t rows, int64_t xs, const T* w, int64_t classes, int64_t ws, int64_t features, int64_t ahead,
                         Finish finish, float* z, int64_t zs, float* lanes) {
  int64_t c = 0;
  if (rows == 1) {
    for (; c + 16 <= classes; c += 16)
      if (kFewStreams < kRowClasses && sizeof(T) == 4 && !ahead)
        store(z + c, finish(row_tile<kFewStreams>(x, w + c * ws, ws, features, 0), c));
      else
        store(z + c, finish(row_tile<kRowClasses>(x, w + c * ws, ws, features, ahead), c));
    // What is left, with as many chains under way as hide a multiply-add's latency: ten classes as five and five, not eight and two.
    auto rest = [&]<int N>(Chains<N>) FASTEE_LAMBDA {
      for (; c + N <= classes; c += N) tile<1, N>(x, xs, w + c * ws, ws, features, ahead, lanes, true, true, finish.from(c), z + c, zs);
    };
    if (classes - c == 10) rest(Chains<5>{});
    rest(Chains<kRowClasses>{});
    if (kRowClasses > 4) rest(Chains<4>{});
    rest(Chains<2>{});
  } else {
    for (; c + kTileClasses <= classes; c += kTileClasses)
      class_block<kTileClasses>(x, rows, xs, w + c * ws, ws, features, ahead, finish.from(c), z + c, zs, lanes);
  }
  for (; c < classes; ++c) class_block<1>(x, rows, xs, w + c * ws, ws, features, ahead, finish.from(c), z + c, zs, lanes);
}

// Many rows and many classes: the same sums with classes instead of features in the registers' lanes. Step j of lane l is feature
// 16 j + l: rows and weights are rearranged lane by lane, a tile walks the steps of one lane, and the sixteen lanes meet in the tree
// of sum(). On AVX2 a tile reads 0.67 registers per multiply-add where the form above reads 0.83, and of each row only what its lane
// needs. Rearranging the weights costs once per chunk what a few rows do not earn back; `python -m benchmarks run large_head` measures
// both against BLAS.

// in[i][j] -> out[j][i]: kPartLanes rows of sixteen.
template <typename T>
FASTEE_INLINE void transpose_strip(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
#pragma GCC unroll 2
  for (int j = 0; j < 16; j += kPartLanes) {
    Part p[kPartLanes];
#pragma GCC unroll 16
    for (int k = 0; k < kPartLanes; ++k) p[k] = load_part(in + k * in_stride + j);
    transpose(p);
#pragma GCC unroll 16
    for (int k = 0; k < kPartLanes; ++k) store_part(out + (j + k) * out_stride, p[k]);
  }
}

constexpr int kPanel = 16 * kPanelVectors;  // classes of a panel
constexpr int64_t packed_lane(int64_t features) { return kPanel * steps_of(features) + 16; }

// out[r][l][j] = x[r][16 j + l]
FASTEE_PIECE void pack_rows(const float* x, int64_t rows, int64_t xs, int64_t features, float* out) {
  const int64_t steps = steps_of(features), lane = round16(steps);
  for (int64_t r = 0; r < rows; ++r, x += xs, out += packed_row(features))
    for (int64_t j = 0; j < steps; j += 16) {
      float edge[256] = {};
      const float* in = x + 16 * j;
      if (16 * (j + 16) > features)
        in = static_cast<const float*>(__builtin_memcpy(edge, in, sizeof(float) * static_cast<uint64_t>(features - 16 * j)));
      for (int i = 0; i < 16; i += kPartLanes) transpose_strip(in + 16 * i, 16, out + j + i, lane);
    }
}

// out[l][j][c] = w[c][16 j + l] of kPanel classes
template <typename T>
FASTEE_PIECE void pack_panel(const T* w, int64_t ws, int64_t features, float* out) {
  const int64_t whole = features / 16, lane = packed_lane(features);
  constexpr int64_t kBlock = 16;  // lines per row at a time: rows whose length is a power of two share the sets of the L1 cache
  for (int64_t first = 0; first < whole; first += kBlock)
    for (int64_t c = 0; c < kPanel; c += kPartLanes)
      for (int64_t j = first; j < whole && j < first + kBlock; ++j) transpose_strip(w + c * ws + 16 * j, ws, out + kPanel * j + c, lane);
  if (16 * whole < features)
    for (int64_t c = 0; c < kPanel; c += kPartLanes) {
      float strip[16 * kPartLanes];
      for (int i = 0; i < kPartLanes; ++i) store(strip + 16 * i, load_n(w + (c + i) * ws + 16 * whole, features - 16 * whole, 0.0f));
      transpose_strip(strip, 16, out + kPanel * whole + c, lane);
    }
}

template <int R>
FASTEE_INLINE void panel_tile(const float* x, int64_t xs, const float* w, int64_t steps, float* lanes) {
  V acc[R][kPanelVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = set1(0.0f);
  for (int64_t j = 0; j < steps; ++j) {
    V b[kPanelVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load(w + kPanel * j + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V a = set1(x[r * xs + j]);
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) store(lanes + 16 * kPanel * r + 16 * v, acc[r][v]);
}

// z[r, c] = finish(x[r] . w[c]) with rows from pack_rows() and whole panels of classes.
template <typename T>
FASTEE_PIECE void linear_panels(const float* x, int64_t rows, const T* w, int64_t classes, int64_t ws, int64_t features, Finish finish,
                                float* z, int64_t zs, float* memory) {
  const int64_t xs = packed_row(features), steps = steps_of(features), x_lane = round16(steps), w_lane = packed_lane(features);
  float *panel = memory, *lanes = memory + 16 * w_lane;  // lanes[r][l][c]
  for (int64_t c = 0; c < classes; c += kPanel) {
    pack_panel(w + c * ws, ws, features, panel);
    for (int64_t first = 0; first < rows; first += kPanelGroup) {
      const int64_t group = rows - first < kPanelGroup ? rows - first : kPanelGroup;
      for (int l = 0; l < 16; ++l)
        for (int64_t r = 0; r < group;) {
          const float* at = x + (first + r) * xs + l * x_lane;
          const float* from = panel + l * w_lane;
          float* to = lanes + 16 * kPanel * r + kPanel * l;
          const int64_t left = group - r;
          if (left >= kPanelRows && left != kPanelRows + 2)
            panel_tile<kPanelRows>(at, xs, from, steps, to), r += kPanelRows;
          else if (left >= 4)
            panel_tile<4>(at, xs, from, steps, to), r += 4;
          else if (left >= 2)
            panel_tile<2>(at, xs, from, steps, to), r += 2;
          else
            panel_tile<1>(at, xs, from, steps, to), r += 1;
        }
      for (int64_t r = 0; r < group; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kPanel; v += 16) {
          const float* at = lanes + 16 * kPanel * r + v;
          V s[8];
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) s[i] = add(load(at + kPanel * i), load(at + kPanel * (i + 8)));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) s[i] = add(s[i], s[i + 4]);
          store(z + (first + r) * zs + c + v, finish(add(add(s[0], s[2]), add(s[1], s[3])), c + v));
        }
    }
  }
}
}  // namespace fastee::cpu::FASTEE_ISA
