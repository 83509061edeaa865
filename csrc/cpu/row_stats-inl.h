// row_stats: the mergeable state of a row of logits. Two passes over a tile that is in the L1 cache: top, its index and the runner-up;
// then s = sum e^u and t = sum u e^u with u = z - top (s2, t2 for e^2u). Tiles have a fixed size and merge left to right.
#pragma once
#include "cpu/element.h"

namespace fastee::cpu::FASTEE_ISA {

using State = RowState;

template <bool Second, typename T>
FASTEE_PIECE State tile_state(const T* z, int64_t n, float inverse_temperature) {
  const V scale = set1(inverse_temperature);
  V m = set1(-kInf), m2 = m, index = set1(0.0f), at = iota(), bad = set1(0.0f);
  auto look = [&](V raw) FASTEE_LAMBDA {
    const V v = mul(raw, scale);
    bad = select_not_lt(v, set1(kInf), set1(1.0f), bad);
    index = select_gt(v, m, at, index);
    m2 = max(m2, min(v, m));
    m = max(m, v);
    at = add(at, set1(16.0f));
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) look(load(z + i));
  if (i < n) look(load_n(z + i, n - i, -kInf));
  State r{highest(m), -kInf, 0.0f, 0.0f, 0.0f, 0.0f, 0, highest(bad) > 0.0f};
  if (r.bad || r.top == -kInf) return r;
  const V top = set1(r.top);
  const float first = lowest(select_eq(m, top, index, set1(2.0f * kClassTile)));  // lanes hold different indices
  r.arg = static_cast<int64_t>(first);
  r.top2 = highest(select_eq(index, set1(first), select_eq(m, top, m2, m), m));

  V s = set1(0.0f), t = s, s2 = s, t2 = s;
  auto gather = [&](V raw) FASTEE_LAMBDA {
    const V u = max(sub(mul(raw, scale), top), set1(-104.0f));  // -inf would give 0 * inf in t; e^-104 is 0 anyway
    const V e = exp_negative(u);
    s = add(s, e);
    t = fma(u, e, t);
    if (Second) {
      const V e2 = mul(e, e);
      s2 = add(s2, e2);
      t2 = fma(u, e2, t2);
    }
  };
  for (i = 0; i + 16 <= n; i += 16) gather(load(z + i));
  if (i < n) gather(load_n(z + i, n - i, -kInf));
  r.s = sum(s);
  r.t = sum(t);
  if (Second) r.s2 = sum(s2), r.t2 = sum(t2);
  return r;
}

FASTEE_INLINE float exp_negative_scalar(float u) {
  float lanes[16];
  store(lanes, exp_negative(set1(u < -104.0f ? -104.0f : u)));
  return lanes[0];
}

// b stands to the right of a: its indices are offset by `base`.
FASTEE_PIECE State merge(State a, State b, int64_t base) {
  b.arg += base;
  if (a.bad || b.bad) return a.bad ? a : b;
  if (b.s == 0.0f) return a;
  if (a.s == 0.0f) return b;
  const bool right = b.top > a.top;
  State &w = right ? b : a, &l = right ? a : b;
  const float d = l.top - w.top, f = exp_negative_scalar(d);
  w.top2 = w.top2 > l.top ? w.top2 : l.top;
  w.t = w.t + f * (l.t + d * l.s);
  w.s = w.s + f * l.s;
  w.t2 = w.t2 + f * f * (l.t2 + d * l.s2);
  w.s2 = w.s2 + f * f * l.s2;
  return w;
}

struct Stats {
  int64_t label;
  float max_prob, margin, entropy, lse, entropy_p2;
};

// The formulas of the state, in double: the logarithm of libm is then the same float everywhere.
FASTEE_PIECE Stats finish(const State& r, bool second) {
  const float nan = __builtin_nanf("");
  if (r.bad || r.top == -kInf) return {-1, nan, nan, nan, nan, nan};
  const double s = r.s, log_s = __builtin_log(s);
  const double gap = r.top2 == -kInf ? 0.0 : exp_negative_scalar(r.top2 - r.top);
  const double h2 = second ? __builtin_log(static_cast<double>(r.s2)) - 2.0 * r.t2 / r.s2 : 0.0;
  const double h = log_s - r.t / s;
  return {r.arg, static_cast<float>(1.0 / s), static_cast<float>((1.0 - gap) / s), static_cast<float>(h > 0 ? h : 0), static_cast<float>(r.top + log_s),
          static_cast<float>(h2 > 0 ? h2 : 0)};
}

template <bool Second, typename T>
FASTEE_INLINE State row_state(const T* z, int64_t classes, float inverse_temperature) {
  State r = tile_state<Second>(z, classes < kClassTile ? classes : kClassTile, inverse_temperature);
  for (int64_t c = kClassTile; c < classes; c += kClassTile)
    r = merge(r, tile_state<Second>(z + c, classes - c < kClassTile ? classes - c : kClassTile, inverse_temperature), c);
  return r;
}

template <bool Second, typename T>
FASTEE_INLINE void stats_of_rows(const RowStatsArgs& a) {
  for (int64_t b = 0; b < a.rows; ++b) {
    const Stats s = finish(row_state<Second>(static_cast<const T*>(a.logits) + b * a.row_stride, a.classes, a.inverse_temperature), Second);
    a.label[b] = s.label;
    if (a.max_prob) a.max_prob[b] = s.max_prob;
    if (a.margin) a.margin[b] = s.margin;
    if (a.entropy) a.entropy[b] = s.entropy;
    if (a.lse) a.lse[b] = s.lse;
    if (Second) a.entropy_p2[b] = s.entropy_p2;
  }
}

static void row_stats(const RowStatsArgs& a) {
  with_float(a.element, [&]<typename T>(const T*) FASTEE_LAMBDA {
    if (a.entropy_p2)
      stats_of_rows<true, T>(a);
    else
      stats_of_rows<false, T>(a);
  });
}
}  // namespace fastee::cpu::FASTEE_ISA
