#include <algorithm>
#include <cmath>

#include "plan/spatial_search.h"

namespace fastee::plan {
namespace {

// All vectors 0 = e_0 <= ... <= e_n = rows, in lexicographic order.
std::vector<int> all_cuts(int rows, int n) {
  std::vector<int> out, e(n + 1, 0);
  e[n] = rows;
  for (;;) {
    out.insert(out.end(), e.begin(), e.end());
    int k = n - 1;
    while (k >= 1 && e[k] == rows) --k;
    if (k < 1) return out;
    const int v = e[k] + 1;
    for (int i = k; i < n; ++i) e[i] = v;
  }
}

double count_cuts(int rows, int n) {  // C(rows + n - 1, n - 1)
  double c = 1;
  for (int i = 1; i < n; ++i) c = c * (rows + i) / i;
  return c;
}

struct Front {
  std::vector<double> finish;  // [members][n]
  std::vector<int> from;       // [members][3]: point, split, member
};

}  // namespace

std::optional<SpatialPlan> spatial_exact(const SpatialModel& model, double bound, int64_t max_steps) {
  const int n = model.providers();
  const std::vector<int>& points = model.cut_points();
  const int count = static_cast<int>(points.size());
  double steps = 0;
  for (int p = 1; p < count; ++p)
    for (int q = 0; q < p; ++q) steps += count_cuts(model.height(points[p]), n) * (q == 0 ? 1.0 : count_cuts(model.height(points[q]), n));
  if (steps > static_cast<double>(max_steps)) return std::nullopt;

  std::vector<std::vector<int>> cuts(count);
  std::vector<std::vector<Front>> fronts(count);
  for (int p = 1; p < count; ++p) {
    cuts[p] = all_cuts(model.height(points[p]), n);
    fronts[p].resize(cuts[p].size() / (n + 1));
  }
  const double tail = model.tail_seconds(model.root());
  double best = bound;
  int best_split = -1, best_member = -1;
  std::vector<double> zero(n, 0.0), next(n);
  std::vector<Part> parts(n), table;
  const auto reach = [&](int q, int split, int member, const double* finish, int p, int e) {
    const int* now = cuts[p].data() + static_cast<size_t>(e) * (n + 1);
    model.advance(points[q], parts.data(), q == 0 ? nullptr : cuts[q].data() + static_cast<size_t>(split) * (n + 1), finish, next.data());
    const bool last = p + 1 == count;
    const double end = last ? model.gather(now, next.data()) : *std::max_element(next.begin(), next.end()) + tail;
    if (!(end < best)) return;
    Front& f = fronts[p][e];
    if (last) {
      best = end;
      best_split = e;
      best_member = 0;
      f.from.assign({q, split, member});
      return;
    }
    size_t kept = 0;
    for (size_t m = 0; m * n < f.finish.size(); ++m) {
      const double* t = f.finish.data() + m * n;
      bool worse = true, better = true;  // than the new one, everywhere
      for (int d = 0; d < n; ++d) {
        worse = worse && next[d] <= t[d];
        better = better && t[d] <= next[d];
      }
      if (better) return;  // before anything was dropped: members do not dominate each other
      if (worse) continue;
      if (kept != m) {
        std::copy_n(f.finish.begin() + m * n, n, f.finish.begin() + kept * n);
        std::copy_n(f.from.begin() + m * 3, 3, f.from.begin() + kept * 3);
      }
      ++kept;
    }
    f.finish.resize(kept * n);
    f.from.resize(kept * 3);
    f.finish.insert(f.finish.end(), next.begin(), next.end());
    f.from.insert(f.from.end(), {q, split, member});
  };
  for (int p = 1; p < count; ++p) {
    const int h = model.height(points[p]), splits = static_cast<int>(fronts[p].size());
    for (int q = 0; q < p; ++q) {
      table.assign(static_cast<size_t>(n) * (h + 1) * (h + 1), {});
      for (int d = 0; d < n; ++d)
        for (int lo = 0; lo < h; ++lo)
          for (int hi = lo + 1; hi <= h; ++hi) table[(static_cast<size_t>(d) * (h + 1) + lo) * (h + 1) + hi] = model.part(d, points[q], points[p], {lo, hi});
      for (int e = 0; e < splits; ++e) {
        const int* now = cuts[p].data() + static_cast<size_t>(e) * (n + 1);
        for (int d = 0; d < n; ++d) parts[d] = table[(static_cast<size_t>(d) * (h + 1) + now[d]) * (h + 1) + now[d + 1]];
        if (q == 0) {
          reach(0, 0, 0, zero.data(), p, e);
          continue;
        }
        for (size_t s = 0; s < fronts[q].size(); ++s) {
          const Front& f = fronts[q][s];
          for (size_t m = 0; m * n < f.finish.size(); ++m) reach(q, static_cast<int>(s), static_cast<int>(m), f.finish.data() + m * n, p, e);
        }
      }
    }
  }
  SpatialPlan plan;
  plan.latency = best;
  if (best_split < 0) return plan;  // nothing beats the bound
  for (int p = count - 1, e = best_split, m = best_member; p > 0;) {
    plan.bounds.insert(plan.bounds.begin(), points[p]);
    plan.cuts.insert(plan.cuts.begin(), cuts[p].begin() + static_cast<size_t>(e) * (n + 1), cuts[p].begin() + static_cast<size_t>(e + 1) * (n + 1));
    const int* from = fronts[p][e].from.data() + m * 3;
    p = from[0];
    e = from[1];
    m = from[2];
  }
  plan.bounds.insert(plan.bounds.begin(), 0);
  return plan;
}

}  // namespace fastee::plan
