#include "plan/spatial_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

namespace fastee::plan {
namespace {

constexpr size_t kBeam = 6, kSmallBeam = 1;  // states kept per bound, from nothing and for a re-plan
constexpr int kFew = 4;                // providers that a short search has windows for
constexpr size_t kDescents = 4, kBriefDescents = 3;  // starts that are descended from, from nothing and without windows
constexpr double kCoarse = 0.125;      // of the rows: the first step of a descent from a start
constexpr double kFine = 0.04;         // of the rows: the step of the first window after a better plan was found
constexpr int kWindow = 16;            // cut vectors per bound in a window, for more than 3 providers
constexpr size_t kFront = 1;           // finish times per cut vector in a window: more cost more than they find
constexpr int64_t kAnneal = 500'000;   // work of one annealing
constexpr int kTurns = 3;              // annealings in turn from the best plan and from the kTurns - 1 first starts
constexpr double kHot = 0.03, kCold = 1e-4;     // their temperatures, of the latency
constexpr double kStride = 0.12;                // the most rows moved at once, of all
constexpr int kToggles = 6, kAlignments = 20;   // of 100 moves
constexpr int kPolish = 60;            // moves that a plan with other volumes may take before it is judged
constexpr double kNear = 0.15;         // of the latency: what is further off is not polished
constexpr double kShift = 0.05;        // of the rows: the most rows moved at once while polishing
constexpr int kWaited = 70;            // of 100 moves take rows from a provider that is waited for
constexpr double kRounding = 1 + 1e-12;  // a sum along the way back may differ from one along the way there by its roundings
constexpr int kOffer = 2;              // units of work that a move costs beside what it computes

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
  // Within 200,000 units of work re-plans of few providers came out as near to the best plan known with one descent as with more; over
  // many, windows take what annealing needs: 2.3 % above it on average instead of 3.4 % (7 groups, 14 changes each, 2 seeds).
  const bool brief = !beam && n_ > kFew;
  window_ = brief ? 0 : window;
  for (int d = 0; d < n_; ++d)
    if (model.links().up[d] && model.links().rates[d] > 0) usable_.push_back(d);
  for (const SpatialPlan& p : starts) {
    State s;
    s.bounds = p.bounds;
    s.cuts = p.cuts;
    model_.latency(s.bounds, s.cuts);  // refuses what is no plan
    build(s);
    keep(s);
    if (s.latency < kNever) queue_.push_back(std::move(s));
  }
  if (n_ > 1) add_beam(beam ? kBeam : kSmallBeam);
  const auto sooner = [](const State& a, const State& b) { return a.latency < b.latency; };
  if (!queue_.empty() && n_ > 2) {  // the best start without each of its providers: nobody gives up all rows in single steps
    const State first = *std::min_element(queue_.begin(), queue_.end(), sooner);
    State fewer;
    for (int d : usable_) {
      State s;
      s.bounds = first.bounds;
      s.cuts.resize(first.cuts.size());
      std::vector<double> rows(n_);
      for (int j = 0; j < first.volumes(); ++j) {
        const int* e = first.cuts.data() + j * (n_ + 1);
        for (int k = 0; k < n_; ++k) rows[k] = k == d ? 0 : e[k + 1] - e[k];
        if (e[d + 1] - e[d] == e[n_]) rows[model_.root() == d ? (d + 1) % n_ : model_.root()] = 1;
        proportional(e[n_], rows, s.cuts.data() + j * (n_ + 1));
      }
      build(s);
      if (s.latency < fewer.latency) fewer = std::move(s);
    }
    keep(fewer);
    if (fewer.latency < kNever) queue_.push_back(std::move(fewer));
  }
  std::stable_sort(queue_.begin(), queue_.end(), sooner);
  std::vector<State> distinct;
  for (State& s : queue_) {
    const bool seen = std::any_of(distinct.begin(), distinct.end(), [&](const State& o) { return o.bounds == s.bounds && o.cuts == s.cuts; });
    if (!seen && distinct.size() < (beam ? kDescents : brief ? kBriefDescents : 1)) distinct.push_back(std::move(s));
  }
  queue_ = std::move(distinct);
}

int SpatialSearch::below(int bound) {  // splitmix64: the same numbers on every machine
  uint64_t z = random_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<int>(((z ^ (z >> 31)) >> 32) * static_cast<uint64_t>(bound) >> 32);
}

void SpatialSearch::build(State& s) {
  const int volumes = s.volumes();
  s.parts.assign(static_cast<size_t>(volumes) * n_, {});
  finish_.assign(static_cast<size_t>(volumes + 1) * n_, 0.0);
  for (int j = 0; j < volumes; ++j) {
    const int* e = s.cuts.data() + j * (n_ + 1);
    Part* parts = s.parts.data() + j * n_;
    for (int d = 0; d < n_; ++d) parts[d] = model_.part(d, s.bounds[j], s.bounds[j + 1], {e[d], e[d + 1]});
    model_.advance(s.bounds[j], parts, j == 0 ? nullptr : e - (n_ + 1), finish_.data() + j * n_, finish_.data() + (j + 1) * n_);
  }
  s.latency = model_.gather(s.cuts.data() + (volumes - 1) * (n_ + 1), finish_.data() + volumes * n_);
  ++tried_;
  s.finish = finish_;
  s.critical.clear();
  s.ahead.assign(s.finish.size(), 0.0);
  s.known = volumes + 1;
}

// Fills s.ahead from `level` on.
void SpatialSearch::look_ahead(State& s, int level) const {
  const int volumes = s.volumes();
  for (; s.known > level; --s.known) {
    const int j = s.known - 1;  // the level to be filled: finish times of volume j - 1, read by volume j
    model_.work += 1 + n_ / 8;
    double* here = s.ahead.data() + j * n_;
    if (j == volumes) {
      model_.gather_ahead(s.cuts.data() + (j - 1) * (n_ + 1), here);
      continue;
    }
    const Part* parts = s.parts.data() + j * n_;
    const double* next = here + n_;
    for (int d = 0; d < n_; ++d) here[d] = next[d] + (parts[d].used ? parts[d].seconds : 0.0);
    for (int d = 0; d < n_; ++d)
      if (parts[d].used) model_.ready_ahead(d, s.bounds[j], parts[d].input, s.cuts.data() + (j - 1) * (n_ + 1), next[d] + parts[d].seconds, here);
  }
}

// Whether provider `to` alone, with its rows in trial_, ends after the latency of s + slack: what it computes itself follows upon each
// other. Most moves are refused so, for the price of the parts of one provider.
bool SpatialSearch::too_late(State& s, int to, int first, int last, double slack) {
  if (model_.links().contention) return false;
  const int volumes = s.volumes();
  double at = s.finish[first * n_ + to];
  for (int j = first; j < last; ++j) {
    const int* e = trial_.data() + j * (n_ + 1);
    const Part part = model_.part(to, s.bounds[j], s.bounds[j + 1], {e[to], e[to + 1]});
    if (j == first) at = model_.ready(to, s.bounds[j], part.input, j == 0 ? nullptr : e - (n_ + 1), s.finish.data() + j * n_);
    at += part.seconds;
  }
  if (last == volumes) {
    const int* e = trial_.data() + (volumes - 1) * (n_ + 1);
    at += model_.gather_seconds(to, e[to + 1] - e[to]) + model_.tail_seconds(model_.root());
  } else {
    look_ahead(s, last + 1);
    const Part& part = s.parts[last * n_ + to];
    at += (part.used ? part.seconds : 0.0) + s.ahead[(last + 1) * n_ + to];
  }
  return at > (s.latency + slack) * kRounding;
}

// Recursion from volume `first` on, into finish_; s.parts belong to trial_, changed_ says which differ from those of s, none from volume
// `same` on. Only who reads rows of a provider that changed is computed again. The recursion is monotone in the finish times, so once
// none of them is earlier than in s the latency cannot be lower, and without `slack` +inf is returned.
double SpatialSearch::recurse(State& s, int first, int same, double slack) {
  const int volumes = s.volumes();
  std::copy_n(s.finish.begin() + first * n_, n_, finish_.begin() + first * n_);
  Span moved;  // whose finish time or rows changed in the volume before
  for (int j = first; j < volumes; ++j) {
    const int begin = s.bounds[j], *before = j == 0 ? nullptr : trial_.data() + (j - 1) * (n_ + 1);
    const Part* parts = s.parts.data() + j * n_;
    const double *finish = finish_.data() + j * n_, *was = s.finish.data() + (j + 1) * n_;
    double* next = finish_.data() + (j + 1) * n_;
    model_.work += n_ / 8;  // who is not moved is looked at, too
    const bool all = model_.links().contention;
    if (all) model_.advance(begin, parts, before, finish, next);
    const Rows theirs = moved.empty() ? Rows{} : Rows{before[moved.lo], before[moved.hi + 1]};
    Span now = changed_[j];
    bool earlier = false;
    for (int d = 0; d < n_; ++d) {
      const Part& part = parts[d];
      if (!all) {
        const bool reads = part.input.lo < theirs.hi && part.input.hi > theirs.lo;
        if (!reads && !moved.has(d) && !changed_[j].has(d)) {
          next[d] = was[d];
          continue;
        }
        ++model_.work;
        next[d] = part.used ? model_.ready(d, begin, part.input, before, finish) + part.seconds : finish[d];
      }
      if (next[d] != was[d]) now.add(d);
      earlier = earlier || next[d] < was[d];
    }
    moved = now;
    if (j >= same && !earlier && slack == 0) return kNever;
    if (j == same && !all && j + 1 < volumes) {  // from here on everything is as it was: how late will it be?
      look_ahead(s, j + 1);
      double end = 0;
      for (int d = 0; d < n_; ++d) end = std::max(end, next[d] + s.ahead[(j + 1) * n_ + d]);
      if (end > (s.latency + slack) * kRounding) return kNever;
    }
  }
  ++tried_;
  return model_.gather(trial_.data() + (volumes - 1) * (n_ + 1), finish_.data() + volumes * n_);
}

// Takes trial_, which differs from the cuts of s in volumes [first, last) alone, when that lowers the latency, or raises it by less than
// `slack`; else trial_ becomes the cuts of s again.
bool SpatialSearch::offer(State& s, int first, int last, double slack) {
  model_.work += kOffer;
  undo_.clear();
  changed_.assign(s.volumes(), {});
  int from = last, to = first;
  for (int j = first; j < last; ++j) {
    const int *was = s.cuts.data() + j * (n_ + 1), *now = trial_.data() + j * (n_ + 1);
    for (int d = 0; d < n_; ++d) {
      if (was[d] == now[d] && was[d + 1] == now[d + 1]) continue;
      from = std::min(from, j);
      to = j;
      changed_[j].add(d);
      Part& part = s.parts[j * n_ + d];
      undo_.emplace_back(j * n_ + d, part);
      part = model_.part(d, s.bounds[j], s.bounds[j + 1], {now[d], now[d + 1]});
    }
  }
  if (undo_.empty()) return false;
  finish_.resize(s.finish.size());
  const double latency = recurse(s, from, to + 1, slack);
  const auto begin = first * (n_ + 1), end = last * (n_ + 1);
  if (latency < s.latency + slack) {
    std::copy(trial_.begin() + begin, trial_.begin() + end, s.cuts.begin() + begin);
    std::copy(finish_.begin() + from * n_, finish_.end(), s.finish.begin() + from * n_);
    s.latency = latency;
    s.critical.clear();
    s.known = std::max(s.known, to + 2);
    if (latency < best_.latency) keep(s);
    return true;
  }
  std::copy(s.cuts.begin() + begin, s.cuts.begin() + end, trial_.begin() + begin);
  for (const auto& [at, part] : undo_) s.parts[at] = part;
  return false;
}

void SpatialSearch::keep(const State& s) {
  if (!best_.bounds.empty() && !(s.latency < best_.latency)) return;
  best_.bounds = s.bounds;
  best_.cuts = s.cuts;
  best_.latency = s.latency;
}

// Whether rows of volumes [first, last) that move between two providers change a part that the latency waits for. Nothing else lowers it.
bool SpatialSearch::touches(State& s, int from, int to, int first, int last) const {
  if (model_.links().contention) return true;  // then it waits for more than the way traced
  if (s.critical.empty()) trace(s);
  for (const auto& [j, d] : s.critical)
    if (j >= first && j < last && d >= std::min(from, to) && d <= std::max(from, to)) return true;
  return false;
}

// Hands a share of the rows of volumes [first, last) from one provider to another, a row at least; what lies between them moves along.
bool SpatialSearch::transfer(State& s, int from, int to, int first, int last, double share, double slack) {
  if (slack == 0 && !touches(s, from, to, first, last)) return false;
  for (int j = first; j < last; ++j) {
    int* e = trial_.data() + j * (n_ + 1);
    const int step = std::min(e[from + 1] - e[from], std::max(1, static_cast<int>(height(s, j) * share)));
    if (from < to)
      for (int k = from + 1; k <= to; ++k) e[k] -= step;
    else
      for (int k = to + 1; k <= from; ++k) e[k] += step;
  }
  if (too_late(s, to, first, last, slack)) {
    std::copy(s.cuts.begin() + first * (n_ + 1), s.cuts.begin() + last * (n_ + 1), trial_.begin() + first * (n_ + 1));
    return false;
  }
  return offer(s, first, last, slack);
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
    for (int from : usable_)
      for (int to : usable_)
        if (from != to) both(from, to);
    return better;
  }
  for (size_t i = 0; i + 1 < usable_.size(); ++i) {
    both(usable_[i], usable_[i + 1]);
    both(usable_[i + 1], usable_[i]);
  }
  // Far pairs: from who is last to finish, to anyone; all pairs would cost the square of the providers.
  const double* last = s.finish.data() + volumes * n_;
  const int late = static_cast<int>(std::max_element(last, last + n_) - last);
  for (int to : usable_)
    if (to != late) go(late, to, 0, volumes);
  return better;
}

void SpatialSearch::descend(State& s, double share) {
  trial_ = s.cuts;
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
      for (int d = 0; d < n_; ++d)  // nothing for who cannot be used: its rows go to the next one, or to the one before
        if (!std::binary_search(usable_.begin(), usable_.end(), d)) (d < usable_.back() ? e[d + 1] : e[d]) = d < usable_.back() ? e[d] : h;
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
  const SpatialPlan found = spatial_pareto(model_, near, best_.latency, kFront, std::min(limit_, model_.work + 5 * window_));
  if (found.bounds.empty()) return false;
  s.bounds = found.bounds;
  s.cuts = found.cuts;
  build(s);
  if (s.latency < best_.latency) keep(s);
  return true;
}

// The parts that the latency waits for: nothing else can lower it.
void SpatialSearch::trace(State& s) const {
  int d = 0;
  s.critical.clear();
  model_.gather(s.cuts.data() + (s.volumes() - 1) * (n_ + 1), s.finish.data() + s.volumes() * n_, &d);
  for (int j = s.volumes() - 1; j >= 0; --j) {
    const Part& part = s.parts[j * n_ + d];
    if (!part.used) continue;
    s.critical.emplace_back(j, d);
    if (j > 0) model_.ready(d, s.bounds[j], part.input, s.cuts.data() + (j - 1) * (n_ + 1), s.finish.data() + j * n_, &d);
  }
}

// Hands at most `share` of the rows of some volumes over, mostly from a provider that is waited for.
void SpatialSearch::shift(State& s, double share, double slack) {
  const int volumes = s.volumes();
  const int usable = static_cast<int>(usable_.size());
  int from = usable_[below(usable)], j = below(volumes);
  if (below(100) < kWaited) {
    if (s.critical.empty()) trace(s);
    if (!s.critical.empty()) std::tie(j, from) = s.critical[below(static_cast<int>(s.critical.size()))];
  }
  const int at = static_cast<int>(std::lower_bound(usable_.begin(), usable_.end(), from) - usable_.begin());
  const int next = below(3) > 0 ? at + (below(2) ? 1 : -1) : below(usable);
  if (next < 0 || next >= usable || next == at) return;
  const int to = usable_[next];
  const int span = below(6);  // this volume and the rest, those before, some, or it alone
  const int last = span == 0 ? volumes : span == 1 ? j + 1 + below(volumes - j) : j + 1;
  transfer(s, from, to, span == 2 ? 0 : j, last, below(2) ? 0.0 : share * below(1000) / 1000.0, slack);
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
  trial_ = s.cuts;
  double left = 1.0, heat = kHot;
  for (int i = 0; model_.work < start + work && !spent(); ++i) {
    if (i % 16 == 0) {
      left = 1.0 - static_cast<double>(model_.work - start) / static_cast<double>(work);
      heat = kHot * std::pow(kCold / kHot, 1.0 - left);
    }
    const double slack = -heat * best.latency * std::log((below(1 << 30) + 0.5) / (1 << 30));
    const int volumes = s.volumes(), kind = below(100);
    ++model_.work;  // a move that changes nothing counts, too
    if (kind < kToggles && points.size() > 2) {
      State& c = other_;
      c.bounds = s.bounds;
      c.cuts = s.cuts;
      const int p = 1 + below(static_cast<int>(points.size()) - 2), q = p + (below(2) ? 1 : -1);
      const auto has = [&](int k) { return std::binary_search(c.bounds.begin(), c.bounds.end(), points[k]); };
      toggle(c, points[p]);
      if (below(2) && q > 0 && q + 1 < static_cast<int>(points.size()) && has(p) != has(q)) toggle(c, points[q]);  // a bound moves
      build(c);
      trial_ = c.cuts;
      for (int i = 0; i < kPolish && c.latency < s.latency * (1 + kNear); ++i) shift(c, 2 * i < kPolish ? kShift : 0.0, 0.0);
      if (c.latency < s.latency + slack) std::swap(s, c);
      trial_ = s.cuts;
    } else if (kind < kToggles + kAlignments && volumes > 1) {
      // a cut where the next volume reads: one of its two providers then needs nothing from the other
      const int j = below(volumes - 1), d = 1 + below(n_ - 1);
      const bool upper = below(2) == 1;
      const Rows reads = s.parts[(j + 1) * n_ + (upper ? d : d - 1)].input;
      if (reads.empty()) continue;
      int* e = trial_.data() + j * (n_ + 1);
      e[d] = std::clamp(upper ? reads.lo : reads.hi, e[d - 1], e[d + 1]);
      offer(s, j, j + 1, slack);
    } else {
      shift(s, kStride * left, slack);
    }
    if (s.latency < best.latency) best = s;
  }
  s = std::move(best);
  if (s.latency < best_.latency) keep(s);
}

bool SpatialSearch::run(int64_t work) {
  limit_ = model_.work + work;
  if (usable_.size() < 2 || queue_.empty()) return false;
  while (!spent()) {
    if (next_ < queue_.size()) {
      State& s = queue_[next_];
      descend(s, kCoarse);
      if (next_ == 0 || s.latency < home_.latency) home_ = s;
      ++next_;
    } else if (window_ > 0 && share_ * model_.height(model_.cut_points()[1]) >= 0.5) {
      if (!window(home_, share_)) share_ *= 0.5;
    } else {
      const size_t turn = turn_++ % kTurns;
      State s = turn > 0 && turn <= queue_.size() ? queue_[turn - 1] : home_;
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
// split of a small family: the k best providers, in proportion to speed, to speed and link, or equally. A small beam takes half of them: its
// plans were worse by 1 %, those of the search after it were not.
void SpatialSearch::add_beam(size_t width) {
  const std::vector<int>& points = model_.cut_points();
  std::vector<std::vector<double>> family;
  const SpatialLinks& links = model_.links();
  const double wire = 8.0 * (model_.row_bytes(0) * model_.height(0) + model_.row_bytes(model_.layers()) * model_.height(model_.layers()));
  const bool small = width == kSmallBeam;
  for (int kind = small ? 1 : 0; kind < 2; ++kind) {
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
      const size_t count = k + 1;  // 1..4, 6, 8, 12, 16 ... and all; few of them where time is short
      const bool some = small ? (count & k) == 0 : count <= 4 || (count % 2 == 0 && count <= 8) || count % 4 == 0;
      if (count < order.size() && !some) continue;
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
    if (here.size() > width) here.resize(width);
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
