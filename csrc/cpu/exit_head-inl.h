// exit_head: pool + norm + linear + statistics + rule, a chunk of rows at a time. Nothing of size [B, D] or [B, C] leaves the cache
// unless the caller asked for the logits. Floor: one read of the activation and of the weights (per chunk of rows).
#pragma once
#include "cpu/linear-inl.h"
#include "cpu/linear_int8-inl.h"
#include "cpu/pool-inl.h"
#include "cpu/row_stats-inl.h"

namespace fastee::cpu::FASTEE_ISA {

FASTEE_PIECE void normalize(const HeadArgs& a, float* x, int64_t n) {
  float shift = 0.0f, scale = 1.0f;
  if (a.norm == 1 || a.norm == 2) {
    const float count = static_cast<float>(n);
    if (a.norm == 1) {
      V total = set1(0.0f);
      for (int64_t i = 0; i < n; i += 16) total = add(total, load_n(x + i, n - i < 16 ? n - i : 16, 0.0f));
      shift = sum(total) / count;
    }
    V squares = set1(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t k = n - i < 16 ? n - i : 16;
      const V d = sub(load_n(x + i, k, shift), set1(shift));  // a second pass: one pass loses digits when the mean is large
      squares = fma(d, d, squares);
    }
    scale = 1.0f / __builtin_sqrtf(sum(squares) / count + a.norm_eps);
  }
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t k = n - i < 16 ? n - i : 16;
    V v = mul(sub(load_n(x + i, k, 0.0f), set1(shift)), set1(scale));
    if (a.norm_weight) v = mul(v, load_n(a.norm_weight + i, k, 0.0f));
    if (a.norm_bias) v = add(v, load_n(a.norm_bias + i, k, 0.0f));
    store_n(x + i, v, k);
  }
}

FASTEE_INLINE float score(const HeadArgs& a, const Stats& s) {
  switch (a.measure) {
    case 1: return s.margin;
    case 2: return -s.entropy;
    case 3: return s.lse * a.temperature;
    default: return s.max_prob;
  }
}

FASTEE_INLINE void write(const HeadArgs& a, int64_t b, const Stats& s) {
  a.label[b] = s.label;
  if (a.max_prob) a.max_prob[b] = s.max_prob;
  if (a.margin) a.margin[b] = s.margin;
  if (a.entropy) a.entropy[b] = s.entropy;
  if (a.lse) a.lse[b] = s.lse;
  if (a.entropy_p2) a.entropy_p2[b] = s.entropy_p2;
  const float u = score(a, s);
  if (a.confidence) a.confidence[b] = u;
  if (a.exits) a.exits[b] = u >= a.threshold && a.threshold != kInf;  // NaN compares false: it never exits
}

template <bool Second>
FASTEE_INLINE void head_rows(const HeadArgs& a, const float* features, int64_t fs, int64_t first, int64_t rows, float* memory, State* states, float* lanes) {
  const bool int8 = a.weight_element == kI8, panels = !int8 && rows >= kPanelLeastRows && a.classes >= kPanel;
  const int64_t classes = round16(a.classes < kClassTile ? a.classes : kClassTile);
  float *tile_memory = memory, *packed = memory + rows * classes, *panel = packed + rows * packed_row(a.x.features);
  if (panels) pack_rows(features, rows, fs, a.x.features, packed);
  if (int8) fix_rows(features, rows, fs, a.x.features, packed);
  const int64_t end = a.states && a.last_tile * kClassTile < a.classes ? a.last_tile * kClassTile : a.classes;
  for (int64_t c = a.states ? a.first_tile * kClassTile : 0; c < end; c += kClassTile) {
    const int64_t n = a.classes - c < kClassTile ? a.classes - c : kClassTile;
    float* z = a.logits ? a.logits + first * a.classes + c : tile_memory;
    const int64_t zs = a.logits ? a.classes : round16(n);
    const Finish finish = Finish{a.weight_scale, a.bias}.from(c);
    const int64_t whole = panels ? n / kPanel * kPanel : 0;
    if (int8)
      linear_int8(packed, rows, static_cast<const int8_t*>(a.weight) + c * a.weight_stride, n, a.weight_stride, a.x.features,
                  prefetch_distance<int8_t>(a.classes, a.weight_stride), finish, z, zs);
    else
      with_float(a.weight_element, [&]<typename T>(const T*) FASTEE_LAMBDA {
        const T* w = static_cast<const T*>(a.weight) + c * a.weight_stride;
        if (whole) linear_panels(packed, rows, w, whole, a.weight_stride, a.x.features, finish, z, zs, panel);
        if (whole < n)
          linear(features, rows, fs, w + whole * a.weight_stride, n - whole, a.weight_stride, a.x.features, prefetch_distance<T>(a.classes, a.weight_stride),
                 finish.from(whole), z + whole, zs, lanes);
      });
    for (int64_t r = 0; r < rows; ++r) {
      const State s = tile_state<Second>(z + r * zs, n, a.inverse_temperature);
      if (a.states)
        a.states[c / kClassTile * a.x.rows + first + r] = s;
      else
        states[r] = c ? merge(states[r], s, c) : s;
    }
  }
  if (a.states) return;
  for (int64_t r = 0; r < rows; ++r) write(a, first + r, finish(states[r], Second));
}

static void finish_head(const HeadArgs& a) {
  for (int64_t b = 0; b < a.x.rows; ++b) {
    State s = a.states[b];
    for (int64_t t = 1; t * kClassTile < a.classes; ++t) s = merge(s, a.states[t * a.x.rows + b], t * kClassTile);
    write(a, b, finish(s, a.entropy_p2));
  }
}

static void exit_head(const HeadArgs& a) {
  const int64_t chunk = chunk_of(a.x.rows, a.x.features, a.classes), fs = a.direct ? a.x.row_stride : round16(a.x.features);
  static_assert(kTileClasses <= 8 && kRowClasses <= 8 && sizeof(State) <= 16 * sizeof(float));
  State states[kRowChunk];
  alignas(64) float lanes[16 * kRowChunk * kTileClasses];
  float* pooled = a.scratch;
  float* tile_memory = a.scratch + (a.direct ? 0 : chunk * fs);
  for (int64_t first = 0; first < a.x.rows; first += chunk) {
    const int64_t rows = a.x.rows - first < chunk ? a.x.rows - first : chunk;
    const float* features = pooled;
    if (a.direct) {
      features = static_cast<const float*>(a.x.data) + first * a.x.row_stride;
    } else {
      pool_rows(a.x, first, rows, pooled, fs, a.largest);
      if (a.norm)
        for (int64_t r = 0; r < rows; ++r) normalize(a, pooled + r * fs, a.x.features);
    }
    if (a.entropy_p2)
      head_rows<true>(a, features, fs, first, rows, tile_memory, states, lanes);
    else
      head_rows<false>(a, features, fs, first, rows, tile_memory, states, lanes);
  }
}
}  // namespace fastee::cpu::FASTEE_ISA
