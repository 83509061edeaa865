// exit_head and exit_step in one launch: pool, norm, product, statistics, rule and compaction of a small head.
//
// A block takes a tile of rows and a slice of classes. Its rows' features stand in shared memory as fp32; the slice's weights stream
// through two stages of asynchronous 16-byte copies, so that up to 66 KB a block are in flight. Four threads own a class's sixteen
// logical lanes, four each, and walk the features in order: every product has the bits of cpu/linear-inl.h, whatever the tile. int8
// weights meet whole numbers, and their exact sums have the bits of cpu/linear_int8-inl.h. The last slice of a row tile to finish
// condenses the logits, which went through L2, and looks back over the row tiles for the survivors' places.
// Floor: one read of the activation (per slice) and of the weights (per row tile).
#pragma once
#include "cuda/kernels/look_back.cuh"
#include "cuda/kernels/pool.cuh"
#include "cuda/kernels/row_stats.cuh"

namespace fastee::cuda {

constexpr int kHeadThreads = 256, kHeadWarps = kHeadThreads / 32;
constexpr int kStageValues = 8192;  // classes of a slice x features of a chunk
constexpr int kStagePad = 16;       // values behind a class's chunk: without them eight classes would share their banks

struct HeadTile {
  cpu::HeadArgs head;  // x.rows, x.features ...; logits may be null
  int64_t* index;      // null: no compaction
  int64_t* count;
  void* sync;              // sync_bytes(tiles)
  float* exchange;         // [rows, classes] between slices: the logits' own memory where the caller wants them; unused with one slice
  int tiles, slices;       // of rows, of classes; the grid is their product
  int class_warps;         // warps side by side over classes; the others stand over rows
  int tile_rows, classes;  // of one block
  int chunk, width;        // features of a stage, bytes of a weight
  bool aligned;            // weights can be copied in 16 bytes
};

// Where things stand in a block's shared memory; stages give way to logits.
__host__ __device__ constexpr int64_t features_bytes(int rows, int64_t features) { return 4 * rows * round16(features); }
__host__ __device__ constexpr int64_t stage_bytes(int classes, int chunk, int width) {
  return static_cast<int64_t>(classes) * (chunk + kStagePad) * width;
}
__host__ __device__ constexpr int64_t tile_bytes(int rows, int64_t classes) {
  return 4 * rows * round16(classes < cpu::kClassTile ? classes : cpu::kClassTile);
}
constexpr int64_t head_shared(int rows, int64_t features, int64_t head_classes, int classes, int chunk, int width) {
  const int64_t work = features_bytes(rows, features) + 2 * stage_bytes(classes, chunk, width), after = tile_bytes(rows, head_classes);
  return (work > after ? work : after) + 64;
}

__device__ __forceinline__ float score(const cpu::HeadArgs& a, const Stats& s) {
  return a.measure == 1 ? s.margin : a.measure == 2 ? -s.entropy : a.measure == 3 ? s.lse * a.temperature : s.max_prob;
}

__device__ __forceinline__ bool write(const cpu::HeadArgs& a, int64_t b, const Stats& s) {
  const float u = score(a, s);
  const bool exits = u >= a.threshold && a.threshold != kInf;  // NaN compares false: it never exits
  a.label[b] = s.label;
  if (a.max_prob) a.max_prob[b] = s.max_prob;
  if (a.margin) a.margin[b] = s.margin;
  if (a.entropy) a.entropy[b] = s.entropy;
  if (a.lse) a.lse[b] = s.lse;
  if (a.entropy_p2) a.entropy_p2[b] = s.entropy_p2;
  if (a.confidence) a.confidence[b] = u;
  if (a.exits) a.exits[b] = exits;
  return exits;
}

// One stage: features [from, from + chunk) of the slice's classes as they lie in memory; zeros where there are none.
__device__ __forceinline__ void load_stage(const HeadTile& t, int64_t first_class, int from, unsigned char* stage) {
  const cpu::HeadArgs& a = t.head;
  const int values = 16 / t.width, per_class = t.chunk / values, features = static_cast<int>(a.x.features);
  const unsigned char* weight = static_cast<const unsigned char*>(a.weight) + (first_class * a.weight_stride + from) * t.width;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < t.classes * per_class; i += kHeadThreads) {
    const int c = i / per_class, k = i % per_class * values, left = first_class + c < a.classes ? features - from - k : 0;
    unsigned char* to = stage + (c * (t.chunk + kStagePad) + k) * t.width;
    const unsigned char* row = weight + (c * a.weight_stride + k) * t.width;
    if (left >= values && t.aligned) {
      copy_async(to, row);
    } else {
      for (int j = 0; j < 16; ++j) to[j] = j < left * t.width ? row[j] : 0;
    }
  }
  close_copies();
}

template <typename T>
struct Quad {  // four neighbouring values of shared memory, in one load
  alignas(4 * sizeof(T)) T values[4];
};

// What a thread sums of one logit: its four of the sixteen lanes, with the CPU's trees over them ...
struct Lanes {
  float sums[4];
  template <typename T>
  __device__ __forceinline__ void add(const Quad<float>& x, const Quad<T>& w) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = __fmaf_rn(x.values[j], widen(w.values[j]), sums[j]);
  }
  __device__ __forceinline__ float dot(float) {
#pragma unroll
    for (int w = 2; w; w /= 2)  // lanes 8, then 4 apart
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += __shfl_xor_sync(kAll, sums[j], w);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }
};

// ... or, for int8 weights, the exact sum of whole numbers, which has no order (cpu/linear_int8-inl.h); `unit` takes it back.
struct Whole {
  int64_t sum;
  __device__ __forceinline__ void add(const Quad<float>& x, const Quad<int8_t>& w) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += static_cast<int64_t>(static_cast<int>(__float_as_uint(x.values[j]))) * w.values[j];
  }
  __device__ __forceinline__ float dot(float unit) {
#pragma unroll
    for (int w = 2; w; w /= 2) sum += __shfl_xor_sync(kAll, sum, w);
    return static_cast<float>(static_cast<double>(sum) * static_cast<double>(unit));
  }
};

// Rows of features in shared memory, brought to the fixed point of cpu/linear_int8-inl.h where they lie: bits of int32. A half warp per row.
__device__ __forceinline__ void fix_rows(float* features, int64_t stride, int rows, int n, float* units) {
  const int lane = static_cast<int>(threadIdx.x & 15), half = static_cast<int>(threadIdx.x / 16);
  for (int from = half & ~1; from < rows; from += kHeadThreads / 16) {
    const int r = from + (half & 1);
    float* x = features + (r < rows ? r : rows - 1) * stride;
    unsigned top = 0;
    for (int i = lane; i < n; i += 16) {
      const unsigned bits = __float_as_uint(x[i]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
#pragma unroll
    for (int w = 8; w; w /= 2) {
      const unsigned other = __shfl_xor_sync(kAll, top, w);
      top = other > top ? other : top;
    }
    if (r >= rows) continue;
    const bool finite = top < 0x7f800000u;
    const unsigned exponent = top >> 23 ? top >> 23 : 1;
    const float tiny = exponent < 64 ? 0x1p64f : 1.0f, lift = __uint_as_float((275 - exponent - (exponent < 64 ? 64 : 0)) << 23);
    constexpr float kRound = 12582912.0f;  // adding it rounds to a whole number, half to even
    for (int i = lane; i < n; i += 16)
      x[i] = __uint_as_float(finite ? __float_as_uint(x[i] * tiny * lift + kRound) - __float_as_uint(kRound) : 0u);
    // 2^(exponent - 148): below 2^-126 a denormal, which holds it exactly.
    if (lane == 0) units[r] = !finite ? kNaN : __uint_as_float(exponent > 21 ? (exponent - 21) << 23 : 1u << (exponent + 1));
  }
}

// One stage's part of the products: N classes eight apart, R rows, four of the sixteen lanes.
template <typename T, int N, int R, typename Sum>
__device__ __forceinline__ void accumulate(const T* w, int w_stride, const float* x, int x_stride, int n, Sum (&acc)[N][R]) {
#pragma unroll 4
  for (int k = 0; k < n; k += 16) {
    Quad<T> q[N];
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = *reinterpret_cast<const Quad<T>*>(w + i * 8 * w_stride + k);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Quad<float> v = *reinterpret_cast<const Quad<float>*>(x + r * x_stride + k);
#pragma unroll
      for (int i = 0; i < N; ++i) acc[i][r].add(v, q[i]);
    }
  }
}

// The logits of the block's rows and classes into z[r * stride + c], global or shared.
template <typename Sum, int N, int R>
__device__ __forceinline__ void products(const HeadTile& t, int64_t first_class, const float* features, const float* units,
                                         unsigned char* stages, float* z, int64_t z_stride, int rows) {
  const cpu::HeadArgs& a = t.head;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x & 31), quad = lane & 3;
  const int class_at = warp % t.class_warps * 8 * N + lane / 4, row_at = warp / t.class_warps * R, w_stride = t.chunk + kStagePad;
  const bool works = row_at < t.tile_rows;
  const int padded = static_cast<int>(round16(a.x.features)), chunks = (padded + t.chunk - 1) / t.chunk;
  const int64_t other = stage_bytes(t.classes, t.chunk, t.width);
  Sum acc[N][R] = {};
  load_stage(t, first_class, 0, stages);
  for (int c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) {
      load_stage(t, first_class, (c + 1) * t.chunk, stages + ((c + 1) & 1) * other);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const int n = padded - c * t.chunk < t.chunk ? padded - c * t.chunk : t.chunk;
    const unsigned char* w = stages + (c & 1) * other + (class_at * w_stride + 4 * quad) * t.width;
    const float* x = features + static_cast<int64_t>(row_at) * padded + c * t.chunk + 4 * quad;
    if (works) {
      auto add = [&](auto* of) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(of)>>;
        accumulate<T>(reinterpret_cast<const T*>(w), w_stride, x, padded, n, acc);
      };
      if constexpr (std::is_same_v<Sum, Whole>)
        add(static_cast<const int8_t*>(nullptr));
      else
        with_float(a.weight_element, add);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float dot = acc[i][r].dot(works ? units[row_at + r] : 0.0f);
      const int64_t c = first_class + class_at + 8 * i;
      if (works && quad == 0 && row_at + r < rows && c < a.classes) {
        const float scaled = a.weight_scale ? dot * a.weight_scale[c] : dot;
        z[(row_at + r) * z_stride + c] = scaled + (a.bias ? a.bias[c] : 0.0f);
      }
    }
}

// Statistics and rule of the block's rows, whose logits stand in `global` or, when that is null, already in `tile`. -> bit r: row r leaves.
__device__ __forceinline__ void judge(const HeadTile& t, int64_t first, int rows, const float* global, float* tile, unsigned* leaving) {
  const cpu::HeadArgs& a = t.head;
  const int stride = static_cast<int>(round16(a.classes < cpu::kClassTile ? a.classes : cpu::kClassTile));
  const int half = static_cast<int>(threadIdx.x / 16);  // one row each: a tile has at most as many rows as a block half warps
  const int row = half < rows ? half : rows - 1;
  const bool second = a.entropy_p2 != nullptr;
  State state{};
  for (int64_t c = 0; c < a.classes; c += cpu::kClassTile) {
    const int n = static_cast<int>(a.classes - c < cpu::kClassTile ? a.classes - c : cpu::kClassTile);
    if (global) {
      __syncthreads();
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.x); i < rows * n; i += kHeadThreads) {
        const int r = i / n, k = i % n;
        tile[r * stride + k] = __ldcg(global + (first + r) * a.classes + c + k);
      }
    }
    __syncthreads();
    if (half / 2 * 2 < rows) {
      const State s = tile_state(tile + row * stride, n, a.inverse_temperature, second);
      state = c ? merge(state, s, static_cast<int>(c)) : s;
    }
  }
  if (threadIdx.x == 0) *leaving = 0;
  __syncthreads();
  if (half < rows && (threadIdx.x & 15) == 0 && write(a, first + half, finish(state, second))) atomicOr(leaving, 1u << half);
  __syncthreads();
}

// What a block knows when it has judged its rows; only the last slice of a row tile gets that far.
struct Judged {
  bool here;
  int rows;          // of this tile
  unsigned leaving;  // bit r: row r
  int64_t first;     // row
  int64_t stay_before, stay;
  unsigned* words;  // shared memory of the block's own words
};

template <int N, int R>
__device__ __forceinline__ Judged head_tile(const HeadTile& t) {
  const cpu::HeadArgs& a = t.head;
  unsigned char* memory = shared_memory();
  unsigned* words = reinterpret_cast<unsigned*>(memory);  // 64 bytes; the rows' units are their second half
  memory += 64;
  float* features = reinterpret_cast<float*>(memory);
  unsigned char* stages = memory + features_bytes(t.tile_rows, a.x.features);
  const int64_t tile = blockIdx.x / t.slices, slice = blockIdx.x % t.slices;
  const int64_t first = tile * t.tile_rows, first_class = slice * t.classes;
  const int rows = static_cast<int>(a.x.rows - first < t.tile_rows ? a.x.rows - first : t.tile_rows);
  const int64_t padded = round16(a.x.features);

  pool_rows(a.x, first, rows, features, padded, true);
  for (int i = static_cast<int>(threadIdx.x); i < (t.tile_rows - rows) * padded; i += kHeadThreads) features[rows * padded + i] = 0.0f;
  if (a.norm) {
    __syncthreads();
    normalize_rows(a, features, padded, rows);
  }
  float* units = reinterpret_cast<float*>(words + 8);
  const bool whole = a.weight_element == kI8;
  if (whole) {
    __syncthreads();
    fix_rows(features, padded, rows, static_cast<int>(a.x.features), units);
  }
  // The barrier before the first product, in products(), covers the features too.
  Judged j{true, rows, 0, first, 0, 0, words};
  float* z = t.slices > 1 ? t.exchange + first * a.classes : a.logits ? a.logits + first * a.classes : nullptr;
  const int64_t z_stride = z ? a.classes : round16(a.classes);
  float* own = reinterpret_cast<float*>(memory);  // products() ends with a barrier before any thread writes: the features may go
  if (whole)
    products<Whole, N, R>(t, first_class, features, units, stages, z ? z : own, z_stride, rows);
  else
    products<Lanes, N, R>(t, first_class, features, units, stages, z ? z : own, z_stride, rows);
  const Sync sync = sync_at(t.sync, t.tiles);
  if (t.slices > 1 && !last_to_leave(sync.tickets + tile, static_cast<unsigned>(t.slices), words)) {
    j.here = false;
    return j;
  }
  judge(t, first, rows, z ? z - first * a.classes : nullptr, own, words);
  j.leaving = words[0];
  j.stay = rows - __popc(j.leaving);
  if (!t.index) return j;
  int64_t* before = reinterpret_cast<int64_t*>(words + 2);
  if (threadIdx.x < 32) {
    const unsigned long long b = t.tiles > 1 ? look_back(sync.amounts, tile, static_cast<unsigned long long>(j.stay)) : 0;
    const int r = static_cast<int>(threadIdx.x);
    const bool stays = !(j.leaving >> r & 1);
    const int64_t at = static_cast<int64_t>(b) + __popc(~j.leaving & ((1u << r) - 1));
    if (r < rows) place(t.index, a.x.rows, first + r, at, stays);
    if (r == 0) *before = static_cast<int64_t>(b);
    if (r == 0 && tile == t.tiles - 1) *t.count = static_cast<int64_t>(b) + j.stay;
  }
  __syncthreads();
  j.stay_before = *before;
  return j;
}
}  // namespace fastee::cuda
