// row_stats: the mergeable state of a row of logits that lies in shared memory, by the sixteen lanes of a half warp; operation for
// operation what cpu/row_stats-inl.h does. Both halves of a warp must call together, each with its own row.
#pragma once
#include "cuda/device.cuh"

namespace fastee::cuda {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even, in the low bits

// exp(u) for u <= 0; below -87.33 it is 0. The polynomial of cpu/simd.h.
__device__ __forceinline__ float exp_negative(float u) {
  const float n = u * 1.44269504088896341f + kRound;
  const float k = n - kRound;
  float r = __fmaf_rn(k, -0.693359375f, u);
  r = __fmaf_rn(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fmaf_rn(r * r, p, r) + 1.0f;
  return u > -87.33f ? __uint_as_float(__float_as_uint(p) + (__float_as_uint(n) << 23)) : 0.0f;
}

struct State {
  float top, top2, s, t, s2, t2;
  int arg;
  bool bad;  // NaN or +inf seen
};

__device__ __forceinline__ State tile_state(const float* z, int n, float inverse_temperature, bool second) {
  const int lane = static_cast<int>(threadIdx.x & 15);
  float m = -kInf, m2 = m, index = 0.0f, bad = 0.0f;
  for (int i = lane; i < n; i += 16) {
    const float v = z[i] * inverse_temperature;
    bad = !(v < kInf) ? 1.0f : bad;
    index = v > m ? static_cast<float>(i) : index;
    m2 = larger(m2, smaller(v, m));
    m = larger(m, v);
  }
  State r{tree16(m, larger), -kInf, 0.0f, 0.0f, 0.0f, 0.0f, 0, tree16(bad, larger) > 0.0f};
  const float first = -tree16(0.0f - (m == r.top ? index : 2.0f * cpu::kClassTile), larger);  // lanes hold different indices
  const float top2 = tree16(index == first ? (m == r.top ? m2 : m) : m, larger);
  const bool valid = !r.bad && r.top != -kInf;
  float s = 0.0f, t = 0.0f, s2 = 0.0f, t2 = 0.0f;
  if (valid)
    for (int i = lane; i < n; i += 16) {
      const float u = larger(z[i] * inverse_temperature - r.top, -104.0f);  // -inf would give 0 * inf in t; e^-104 is 0 anyway
      const float e = exp_negative(u);
      s += e;
      t = __fmaf_rn(u, e, t);
      if (second) {
        const float e2 = e * e;
        s2 += e2;
        t2 = __fmaf_rn(u, e2, t2);
      }
    }
  s = sum16(s), t = sum16(t);
  if (second) s2 = sum16(s2), t2 = sum16(t2);
  if (valid) r.arg = static_cast<int>(first), r.top2 = top2, r.s = s, r.t = t, r.s2 = s2, r.t2 = t2;
  return r;
}

// b stands to the right of a: its indices are offset by `base`.
__device__ __forceinline__ State merge(State a, State b, int base) {
  b.arg += base;
  if (a.bad || b.bad) return a.bad ? a : b;
  if (b.s == 0.0f) return a;
  if (a.s == 0.0f) return b;
  const bool right = b.top > a.top;
  State w = right ? b : a;
  const State l = right ? a : b;
  const float d = l.top - w.top, f = exp_negative(d < -104.0f ? -104.0f : d);
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

__device__ __forceinline__ Stats finish(const State& r, bool second) {
  const float nan = __uint_as_float(0x7fc00000);
  if (r.bad || r.top == -kInf) return {-1, nan, nan, nan, nan, nan};
  const double s = r.s, log_s = log(s);
  const float apart = r.top2 - r.top;
  const double gap = r.top2 == -kInf ? 0.0 : exp_negative(apart < -104.0f ? -104.0f : apart);
  const double h2 = second ? log(static_cast<double>(r.s2)) - 2.0 * r.t2 / r.s2 : 0.0;
  const double h = log_s - r.t / s;
  return {r.arg,
          static_cast<float>(1.0 / s),
          static_cast<float>((1.0 - gap) / s),
          static_cast<float>(h > 0 ? h : 0),
          static_cast<float>(r.top + log_s),
          static_cast<float>(h2 > 0 ? h2 : 0)};
}
}  // namespace fastee::cuda
