#include "plan/spatial_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fastee::plan {
namespace {

constexpr int kBeam = 6;           // states kept per bound
constexpr int kFew = 6;            // providers that a short search takes all its means for
constexpr size_t kDescents = 4;       // starts that are descended from
constexpr double kCoarse = 0.125;  // of the rows: the first step of a descent from a start
constexpr double kFine = 0.04;     // of the rows: the step of the first window after a better plan was found
constexpr int kWindow = 16;        // cut vectors per bound in a window, for more than 3 providers
constexpr size_t kFront = 6;       // finish times per cut vector in a window
constexpr int64_t kAnneal = 400'000;  // work of one annealing
constexpr double kHot = 0.008, kCold = 1e-4;  // its temperatures, of the latency
constexpr double kStride = 0.12;              // the most rows it moves at once, of all
constexpr int kToggles = 12, kAlignments = 20;  // of 100 moves

// Cuts of `rows` rows in proportion to weights; every prefix rounded on its own, so errors do not add up.
void proportional(int rows, const std::vector<double>& weights, int* cuts) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double sum = 0;
  const size_t n = weights.size();
  cuts[0] = 0;
  for (size_t d = 0; d < n; ++d) {
    sum += weights[d];
    cuts[d + 1] = d + 1 == n ? rows : std::min(rows, static_cast<int>(std::floor(rows * (sum / total) + 0.5)));
  }
}

}  // namespace

SpatialSearch::SpatialSearch(const SpatialModel& model, const std::vector<SpatialPlan>& starts, uint64_t seed, bool beam, int64_t window)
    : model_(model), n_(model.providers()), random_(seed * 2 + 1) {
  // A short search over many providers gains most from one descent and annealing: re-plans of 16 within 300,000 units of work came out 2 %
  // above a cold plan so, 7 % with four descents and windows; of 4 it is 4 % with both and 5 % without (2026-11, 27 changes each).
  const bool brief = !beam && n_ > kFew;
  window_ = brief ? 0 : window;
  for (const SpatialPlan& p : starts) {
    State s;
    s.bounds = p.bounds;
    s.cuts = p.cuts;
    model_.latency(s.bounds, s.cuts);  // refuses what is no plan
    build(s);
    keep(s);
    if (s.latency < kNever) queue_.push_back(std::move(s));
  }
  if (beam && n_ > 1) add_beam();
  std::stable_sort(queue_.begin(), queue_.end(), [](const State& a, const State& b) { return a.score < b.score; });
  std::vector<State> distinct;
  for (State& s : queue_) {
    const bool seen = std::any_of(distinct.begin(), distinct.end(), [&](const State& o) { return o.bounds == s.bounds && o.cuts == s.cuts; });
    if (!seen && distinct.size() < (brief ? 1 : kDescents)) distinct.push_back(std::move(s));
  }
  queue_ = std::move(distinct);
}

int SpatialSearch::below(int bound) {  // splitmix64: the same numbers on every machine
  uint64_t z = random_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<int>((z ^ (z >> 31)) % static_cast<uint64_t>(bound));
}

void SpatialSearch::build(State& s) {
  const int volumes = s.volumes();
  s.parts.assign(static_cast<size_t>(volumes) * n_, {});
  s.finish.assign(static_cast<size_t>(volumes + 1) * n_, 0.0);
  for (int j = 0; j < volumes; ++j) {
    const int* e = s.cuts.data() + j * (n_ + 1);
    for (int d = 0; d < n_; ++d) s.parts[j * n_ + d] = model_.part(d, s.bounds[j], s.bounds[j + 1], {e[d], e[d + 1]});
  }
  finish_.assign(s.finish.size(), 0.0);
  s.score = recurse(s, 0, volumes, s.cuts.data(), &s.latency);
  s.finish = finish_;
}

// Recursion from volume `first` on, into finish_; s.parts must belong to `cuts`. From volume `same` on parts and cuts are those of s: the
// recursion is monotone in the finish times, so once none of them is earlier than in s the score cannot be lower, and +inf is returned.
double SpatialSearch::recurse(const State& s, int first, int same, const int* cuts, double* latency) {
  const int volumes = s.volumes();
  finish_.resize(s.finish.size());
  std::copy_n(s.finish.begin() + first * n_, n_, finish_.begin() + first * n_);
  for (int j = first; j < volumes; ++j) {
    double* next = finish_.data() + (j + 1) * n_;
    model_.advance(s.bounds[j], s.parts.data() + j * n_, j == 0 ? nullptr : cuts + (j - 1) * (n_ + 1), finish_.data() + j * n_, next);
    if (j < same) continue;
    const double* was = s.finish.data() + (j + 1) * n_;
    int d = 0;
    while (d < n_ && next[d] >= was[d]) ++d;
    if (d == n_) return kNever;
  }
  const double* last = finish_.data() + volumes * n_;
  *latency = model_.gather(cuts + (volumes - 1) * (n_ + 1), last);
  ++tried_;
  if (weight_ == 0 || *latency == kNever) return *latency;
  double sum = 0;
  for (int d = 0; d < n_; ++d) sum += last[d];
  return *latency + weight_ * (sum / n_);
}

// Takes trial_ as the cuts of s when that lowers the score, or raises it by less than `slack`.
bool SpatialSearch::offer(State& s, double slack) {
  const int volumes = s.volumes();
  int first = volumes, last = 0;
  changed_.clear();
  undo_.clear();
  for (int j = 0; j < volumes; ++j) {
    const int *was = s.cuts.data() + j * (n_ + 1), *now = trial_.data() + j * (n_ + 1);
    for (int d = 0; d < n_; ++d) {
      if (was[d] == now[d] && was[d + 1] == now[d + 1]) continue;
      first = std::min(first, j);
      last = j;
      changed_.push_back(j * n_ + d);
      undo_.push_back(s.parts[j * n_ + d]);
      s.parts[j * n_ + d] = model_.part(d, s.bounds[j], s.bounds[j + 1], {now[d], now[d + 1]});
    }
  }
  if (first == volumes) return false;
  double latency = kNever;
  const double score = recurse(s, first, slack > 0 ? volumes : last + 1, trial_.data(), &latency);
  if (score < s.score + slack) {
    s.cuts = trial_;
    std::copy(finish_.begin() + first * n_, finish_.end(), s.finish.begin() + first * n_);
    s.score = score;
    s.latency = latency;
    if (latency < best_.latency) keep(s);
    return true;
  }
  for (size_t i = 0; i < changed_.size(); ++i) s.parts[changed_[i]] = undo_[i];
  return false;
}

void SpatialSearch::keep(const State& s) {
  if (!best_.bounds.empty() && !(s.latency < best_.latency)) return;
  best_.bounds = s.bounds;
  best_.cuts = s.cuts;
  best_.latency = s.latency;
}

// Hands a share of the rows of volumes [first, last) from one provider to another, a row at least; what lies between them moves along.
bool SpatialSearch::transfer(State& s, int from, int to, int first, int last, double share, double slack) {
  trial_ = s.cuts;
  for (int j = first; j < last; ++j) {
    int* e = trial_.data() + j * (n_ + 1);
    const int step = std::min(e[from + 1] - e[from], std::max(1, static_cast<int>(height(s, j) * share)));
    if (from < to)
      for (int k = from + 1; k <= to; ++k) e[k] -= step;
    else
      for (int k = to + 1; k <= from; ++k) e[k] += step;
  }
  return offer(s, slack);
}

bool SpatialSearch::sweep(State& s, double share) {
  const int volumes = s.volumes();
  bool better = false;
  const auto go = [&](int from, int to, int first, int last) {
    for (int i = 0; i < 8 && !spent() && transfer(s, from, to, first, last, share, 0.0); ++i) better = true;
  };
  const auto both = [&](int from, int to) {
    go(from, to, 0, volumes);
    for (int j = 0; j < volumes && volumes > 1; ++j) {
      go(from, to, j, j + 1);
      if (j > 0 && j + 1 < volumes) go(from, to, j, volumes);
    }
  };
  if (n_ <= 6) {
    for (int from = 0; from < n_; ++from)
      for (int to = 0; to < n_; ++to)
        if (from != to) both(from, to);
    return better;
  }
  for (int d = 0; d + 1 < n_; ++d) {
    both(d, d + 1);
    both(d + 1, d);
  }
  // Far pairs: from who is last to finish, to anyone; all pairs would cost the square of the providers.
  const double* last = s.finish.data() + volumes * n_;
  const int late = static_cast<int>(std::max_element(last, last + n_) - last);
  for (int to = 0; to < n_; ++to)
    if (to != late) go(late, to, 0, volumes);
  return better;
}

void SpatialSearch::descend(State& s, double share) {
  int tallest = 1;
  for (int j = 0; j < s.volumes(); ++j) tallest = std::max(tallest, height(s, j));
  for (; !spent(); share *= 0.5) {
    for (int i = 0; i < 6 && !spent() && sweep(s, share); ++i) {
    }
    if (share * tallest <= 1) break;
  }
}

// The best plan with cuts near those of s, over all partitions at once: what no move of a single volume finds.
bool SpatialSearch::window(State& s, double share) {
  const std::vector<int>& points = model_.cut_points();
  std::vector<std::vector<int>> near(points.size());
  const int reach = n_ == 2 ? 16 : n_ == 3 ? 2 : 1;
  std::vector<int> e(n_ + 1), offset(n_ + 1);
  // Work grows with the square of bounds x vectors: where all cut points are too many, those in use and some others.
  const double vectors = 1 + (n_ <= 3 ? std::pow(2 * reach + 1, n_ - 1) : kWindow);
  const double most = std::sqrt(2.0 * static_cast<double>(window_) / (vectors * vectors * n_));
  const int others = static_cast<int>(points.size() - s.bounds.size());
  const double share_of_others = others > 0 ? (most - static_cast<double>(s.bounds.size())) / others : 1.0;
  for (size_t p = 1; p < points.size(); ++p) {
    if (!std::binary_search(s.bounds.begin(), s.bounds.end(), points[p]) && below(1000) >= 1000 * share_of_others) continue;
    const int h = model_.height(points[p]), step = std::max(1, static_cast<int>(h * share + 0.5));
    const size_t j = std::lower_bound(s.bounds.begin() + 1, s.bounds.end(), points[p]) - s.bounds.begin() - 1;
    const int* c = s.cuts.data() + j * (n_ + 1);
    const auto centre = [&](int d) { return d == n_ ? h : static_cast<int>(std::floor(static_cast<double>(c[d]) * h / c[n_] + 0.5)); };
    std::vector<int>& out = near[p];
    const auto put = [&] {
      e[0] = 0;
      e[n_] = h;
      for (int d = 1; d < n_; ++d) e[d] = std::clamp(centre(d) + offset[d] * step, e[d - 1], h);
      for (size_t i = 0; i < out.size(); i += n_ + 1)
        if (std::equal(e.begin(), e.end(), out.begin() + i)) return;
      out.insert(out.end(), e.begin(), e.end());
    };
    std::fill(offset.begin(), offset.end(), 0);
    put();
    for (int d = 0; d <= n_; ++d) e[d] = d > model_.root() ? h : 0;
    out.insert(out.end(), e.begin(), e.end());
    if (n_ <= 3) {
      std::fill(offset.begin() + 1, offset.end() - 1, -reach);
      for (int d = 0; d < n_;) {
        put();
        for (d = 1; d < n_ && offset[d] == reach; ++d) offset[d] = -reach;
        if (d < n_) ++offset[d];
      }
    } else {
      for (int i = 0; i < kWindow; ++i) {
        // a few providers hand rows over: a run of cuts moves together
        std::fill(offset.begin(), offset.end(), 0);
        for (int t = below(2); t >= 0; --t) {
          const int a = 1 + below(n_ - 1), b = a + (below(2) ? 0 : below(n_ - a)), by = below(2) ? 1 : -1;
          for (int d = a; d <= b; ++d) offset[d] += by;
        }
        put();
      }
    }
  }
  const SpatialPlan found = spatial_pareto(model_, near, best_.latency, kFront, model_.work + 5 * window_);
  if (found.bounds.empty()) return false;
  s.bounds = found.bounds;
  s.cuts = found.cuts;
  build(s);
  if (s.latency < best_.latency) keep(s);
  return true;
}

// A volume more that ends at cut point p, or one less.
void SpatialSearch::toggle(State& s, int p) const {
  const auto at = std::lower_bound(s.bounds.begin(), s.bounds.end(), p) - s.bounds.begin();
  const auto cuts = s.cuts.begin() + (at - 1) * (n_ + 1);
  if (s.bounds[at] == p) {
    s.bounds.erase(s.bounds.begin() + at);
    s.cuts.erase(cuts, cuts + (n_ + 1));
    return;
  }
  std::vector<int> e(cuts, cuts + (n_ + 1));
  const int h = model_.height(p), was = e[n_];
  for (int& row : e) row = static_cast<int>(std::floor(static_cast<double>(row) * h / was + 0.5));
  s.bounds.insert(s.bounds.begin() + at, p);
  s.cuts.insert(cuts, e.begin(), e.end());
}

// Walks over cut vectors and partitions, worse ones too while it is hot (simulated annealing), and leaves the best plan met in s. What no
// descent finds: device times are steps in the rows, so good plans lie apart.
void SpatialSearch::anneal(State& s, int64_t work) {
  const std::vector<int>& points = model_.cut_points();
  const int64_t start = model_.work;
  State best = s;
  while (model_.work < start + work && !spent()) {
    const double left = 1.0 - static_cast<double>(model_.work - start) / static_cast<double>(work);
    const double slack = -kHot * std::pow(kCold / kHot, 1.0 - left) * best.latency * std::log((below(1 << 30) + 0.5) / (1 << 30));
    const int volumes = s.volumes(), kind = below(100);
    ++model_.work;  // a move that changes nothing counts, too
    if (kind < kToggles && points.size() > 2) {
      State c;
      c.bounds = s.bounds;
      c.cuts = s.cuts;
      toggle(c, points[1 + below(static_cast<int>(points.size()) - 2)]);
      build(c);
      if (c.score < s.score + slack) s = std::move(c);
    } else if (kind < kToggles + kAlignments && volumes > 1) {
      // a cut where the next volume reads: one of its two providers then needs nothing from the other
      const int j = below(volumes - 1), d = 1 + below(n_ - 1);
      const bool upper = below(2) == 1;
      const Rows reads = s.parts[(j + 1) * n_ + (upper ? d : d - 1)].input;
      if (reads.empty()) continue;
      trial_ = s.cuts;
      int* e = trial_.data() + j * (n_ + 1);
      e[d] = std::clamp(upper ? reads.lo : reads.hi, e[d - 1], e[d + 1]);
      offer(s, slack);
    } else {
      const int from = below(n_), to = below(3) > 0 ? from + (below(2) ? 1 : -1) : below(n_);
      if (to < 0 || to >= n_ || to == from) continue;
      const int j = below(volumes), span = below(6);  // this volume and the rest, those before, some, or it alone
      const int last = span == 0 ? volumes : span == 1 ? j + 1 + below(volumes - j) : j + 1;
      transfer(s, from, to, span == 2 ? 0 : j, last, below(2) ? 0.0 : kStride * left * below(1000) / 1000.0, slack);
    }
    if (s.latency < best.latency) best = s;
  }
  s = std::move(best);
  if (s.latency < best_.latency) keep(s);
}

bool SpatialSearch::run(int64_t work) {
  limit_ = model_.work + work;
  if (n_ == 1 || queue_.empty()) return false;
  while (!spent()) {
    if (next_ < queue_.size()) {
      State& s = queue_[next_];
      descend(s, kCoarse);
      if (next_ == 0 || s.latency < home_.latency) home_ = s;
      ++next_;
    } else if (window_ > 0 && share_ * model_.height(model_.cut_points()[1]) >= 0.5) {
      if (!window(home_, share_)) share_ *= 0.5;
    } else {
      State s = home_;
      anneal(s, std::min(kAnneal, limit_ - model_.work));
      if (window_ > 0) window(s, kFine / (1 + below(8)));
      if (s.latency < home_.latency) {
        home_ = std::move(s);
        share_ = kFine;
      }
    }
  }
  return true;
}

// Partitions and coarse splits together: per bound the best few (finish times, cuts) over every volume that can end there and every
// split of a small family: the k best providers, in proportion to speed, to speed and link, or equally.
void SpatialSearch::add_beam() {
  const std::vector<int>& points = model_.cut_points();
  std::vector<std::vector<double>> family;
  const SpatialLinks& links = model_.links();
  const double wire = 8.0 * (model_.row_bytes(0) * model_.height(0) + model_.row_bytes(model_.layers()) * model_.height(model_.layers()));
  for (int kind = 0; kind < 2; ++kind) {
    std::vector<double> cost(n_);
    std::vector<int> order;
    for (int d = 0; d < n_; ++d) {
      cost[d] = model_.whole_seconds(d) + (kind == 1 ? wire / std::max(0.0, links.rates[d]) : 0.0);
      if (links.up[d] && links.rates[d] > 0 && cost[d] > 0) order.push_back(d);
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] < cost[b]; });
    std::vector<double> by_cost(n_, 0.0), equal(n_, 0.0);
    for (size_t k = 0; k < order.size(); ++k) {
      by_cost[order[k]] = 1.0 / cost[order[k]];
      equal[order[k]] = 1.0;
      if (k + 1 < order.size() && ((k >= 4 && k % 2 == 0) || (k >= 8 && k % 4 != 3))) continue;  // 1..4, 6, 8, 12, 16 ... and all
      for (const auto& weights : {by_cost, equal})
        if (std::find(family.begin(), family.end(), weights) == family.end()) family.push_back(weights);
    }
  }
  if (family.empty()) return;
  struct Node {
    std::vector<double> finish;
    std::vector<int> cuts;
    double rank;
    int point = -1, index = -1;  // where it came from
  };
  std::vector<std::vector<Node>> at(points.size());
  at[0].push_back({std::vector<double>(n_, 0.0), {}, 0.0, -1, -1});
  std::vector<Part> parts(n_);
  std::vector<double> next(n_);
  std::vector<int> cuts(n_ + 1);
  for (size_t p = 1; p < points.size(); ++p) {
    const bool last = p + 1 == points.size();
    std::vector<Node>& here = at[p];
    for (const auto& weights : family) {
      proportional(model_.height(points[p]), weights, cuts.data());
      for (size_t q = 0; q < p; ++q) {
        for (int d = 0; d < n_; ++d) parts[d] = model_.part(d, points[q], points[p], {cuts[d], cuts[d + 1]});
        for (size_t i = 0; i < at[q].size(); ++i) {
          const Node& from = at[q][i];
          model_.advance(points[q], parts.data(), q == 0 ? nullptr : from.cuts.data(), from.finish.data(), next.data());
          double latest = 0, sum = 0;
          for (double t : next) {
            latest = std::max(latest, t);
            sum += t;
          }
          if (last) latest = model_.gather(cuts.data(), next.data());
          const double rank = latest + 0.1 * (sum / n_);
          if (!(rank < kNever)) continue;
          // The best state per split is kept apart, then the kBeam best splits: otherwise one split would fill the beam.
          auto same = std::find_if(here.begin(), here.end(), [&](const Node& o) { return o.cuts == cuts; });
          if (same == here.end())
            here.push_back({next, cuts, rank, static_cast<int>(q), static_cast<int>(i)});
          else if (rank < same->rank)
            *same = {next, cuts, rank, static_cast<int>(q), static_cast<int>(i)};
        }
      }
    }
    std::stable_sort(here.begin(), here.end(), [](const Node& a, const Node& b) { return a.rank < b.rank; });
    if (here.size() > kBeam) here.resize(kBeam);
  }
  for (size_t i = 0; i < at.back().size() && i < 3; ++i) {
    State s;
    for (int p = static_cast<int>(points.size()) - 1, k = static_cast<int>(i); p >= 0 && k >= 0;) {
      const Node& node = at[p][k];
      s.bounds.insert(s.bounds.begin(), points[p]);
      s.cuts.insert(s.cuts.begin(), node.cuts.begin(), node.cuts.end());
      k = node.index;
      p = node.point;
    }
    build(s);
    keep(s);
    if (s.latency < kNever) queue_.push_back(std::move(s));
  }
}

}  // namespace fastee::plan
