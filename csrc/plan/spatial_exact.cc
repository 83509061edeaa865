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

// Plans that reach a bound with one cut vector and do not dominate each other.
struct Front {
  std::vector<double> finish;  // [members][n]
  std::vector<double> spent;   // [members] see SpatialBound
  std::vector<double> least;   // [members] lower bounds of T_end
  std::vector<int> from;       // [members][3]: point, split, member
  size_t size() const { return least.size(); }
};

}  // namespace

// No plan ends before (work left at the best rate of every provider + what each has spent already) / all rates: with c(d,l) the least
// seconds a row of layer l takes on d at any row count, weights s(d) and c(l) = min over d of s(d) c(d,l), the rows of the layers left
// need sum over d of s(d) (T_end - T_d) >= sum over l of c(l) H(l).
SpatialBound::SpatialBound(const SpatialModel& model) : left(model.layers() + 1, 0.0), tail(model.tail_seconds(model.root())) {
  const int n = model.providers();
  for (int d = 0; d < n; ++d) {
    const bool usable = model.links().up[d] && model.links().rates[d] > 0;
    weight.push_back(usable ? 1.0 / std::max(model.whole_seconds(d), 1e-12) : 0.0);
    total += weight[d];
  }
  for (int i = model.layers() - 1; i >= 0; --i) {
    const int h = model.height(i + 1);
    double least = kNever;
    for (int d = 0; d < n; ++d)
      for (int r = 1; r <= h && weight[d] > 0; ++r) least = std::min(least, weight[d] * model.layer_seconds(d, i, r) / r);
    // At strides above 1 rows of a layer may be read by nobody; only what its consumers need is sure to be computed.
    left[i] = left[i + 1] + (least < kNever ? least * model.sure_rows(i) : 0.0);
  }
}

SpatialPlan spatial_pareto(const SpatialModel& model, const std::vector<std::vector<int>>& cuts, double bound, size_t cap, int64_t limit) {
  const int n = model.providers();
  const std::vector<int>& points = model.cut_points();
  const int count = static_cast<int>(points.size());
  const SpatialBound rest(model);
  std::vector<std::vector<Front>> fronts(count);
  for (int p = 0; p < count; ++p) fronts[p].resize(cuts[p].size() / (n + 1));
  double best = bound;
  int best_split = -1;
  std::vector<double> zero(n, 0.0), next(n);
  std::vector<Part> parts(n);
  const auto reach = [&](int q, int split, int member, const double* finish, int p, int e) {
    const int* now = cuts[p].data() + static_cast<size_t>(e) * (n + 1);
    model.advance(points[q], parts.data(), q == 0 ? nullptr : cuts[q].data() + static_cast<size_t>(split) * (n + 1), finish, next.data());
    Front& f = fronts[p][e];
    if (p + 1 == count) {
      const double end = model.gather(now, next.data());
      if (!(end < best)) return;
      best = end;
      best_split = e;
      f.from.assign({q, split, member});
      return;
    }
    double spent;
    const double least = rest.at(points[p], next.data(), &spent);
    if (!(least < best)) return;
    size_t kept = 0;
    for (size_t m = 0; m < f.size(); ++m) {
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
        f.spent[kept] = f.spent[m];
        f.least[kept] = f.least[m];
      }
      ++kept;
    }
    if (kept >= cap) {  // the least promising member goes
      const size_t worst = std::max_element(f.least.begin(), f.least.begin() + kept) - f.least.begin();
      if (!(least < f.least[worst])) return;
      std::copy_n(next.begin(), n, f.finish.begin() + worst * n);
      f.from[worst * 3] = q;
      f.from[worst * 3 + 1] = split;
      f.from[worst * 3 + 2] = member;
      f.spent[worst] = spent;
      f.least[worst] = least;
      return;
    }
    f.finish.resize(kept * n);
    f.from.resize(kept * 3);
    f.spent.resize(kept);
    f.least.resize(kept);
    f.finish.insert(f.finish.end(), next.begin(), next.end());
    f.from.insert(f.from.end(), {q, split, member});
    f.spent.push_back(spent);
    f.least.push_back(least);
  };
  for (int p = 1; p < count; ++p) {
    const int splits = static_cast<int>(fronts[p].size());
    for (int q = 0; q < p; ++q) {
      for (int e = 0; e < splits && model.work < limit; ++e) {
        const int* now = cuts[p].data() + static_cast<size_t>(e) * (n + 1);
        for (int d = 0; d < n; ++d) parts[d] = model.part(d, points[q], points[p], {now[d], now[d + 1]});
        if (q == 0) {
          reach(0, 0, 0, zero.data(), p, e);
          continue;
        }
        double onward = rest.left[points[p]];  // what is surely spent after q: a bound before any finish time is known
        for (int d = 0; d < n; ++d)
          if (rest.weight[d] > 0) onward += rest.weight[d] * parts[d].seconds;
        for (size_t s = 0; s < fronts[q].size(); ++s) {
          const Front& f = fronts[q][s];
          for (size_t m = 0; m < f.size(); ++m)
            if (f.least[m] < best && rest.fluid(f.spent[m] + onward) < best) reach(q, static_cast<int>(s), static_cast<int>(m), f.finish.data() + m * n, p, e);
        }
      }
    }
  }
  SpatialPlan plan;
  plan.latency = best;
  if (best_split < 0) return plan;  // nothing beats the bound
  for (int p = count - 1, e = best_split, m = 0; p > 0;) {
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

std::optional<SpatialPlan> spatial_exact(const SpatialModel& model, double bound, int64_t max_steps, size_t front) {
  const std::vector<int>& points = model.cut_points();
  const int n = model.providers(), count = static_cast<int>(points.size());
  double vectors = 0;
  for (int p = 1; p < count; ++p) vectors += count_cuts(model.height(points[p]), n);
  if (vectors * 200 > static_cast<double>(max_steps)) return std::nullopt;  // not even the parts of all vectors would be done in time
  std::vector<std::vector<int>> cuts(count);
  for (int p = 1; p < count; ++p) cuts[p] = all_cuts(model.height(points[p]), n);
  const int64_t limit = model.work + max_steps;
  SpatialPlan plan = spatial_pareto(model, cuts, bound, front, limit);
  if (model.work >= limit) return std::nullopt;
  return plan;
}

}  // namespace fastee::plan
