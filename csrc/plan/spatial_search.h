// Our planner for spatial splits: a beam over partitions, descents over cut vectors, windows and annealing over both, resumable by budget.
#pragma once
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "plan/spatial.h"

namespace fastee::plan {

class SpatialSearch {
 public:
  // Starts are plans for this model; those that cannot run are left aside. `window`: work that one window may take, about.
  SpatialSearch(const SpatialModel& model, const std::vector<SpatialPlan>& starts, uint64_t seed, bool beam, int64_t window);

  // Goes on for about `work` units (see SpatialModel::work); false when nothing is left to try.
  bool run(int64_t work);
  const SpatialPlan& best() const { return best_; }
  int64_t tried() const { return tried_; }

 private:
  struct State {
    std::vector<int> bounds, cuts;
    std::vector<Part> parts;     // [volumes][N]
    std::vector<double> finish;  // [volumes + 1][N]
    // [volumes + 1][N] the longest way from a finish time to the end, the answer's tail included; known from level `known` on: a move in
    // volumes before that leaves it as it is.
    std::vector<double> ahead;
    int known = 0;
    std::vector<std::pair<int, int>> critical;  // (volume, provider) that the latency waits for, last first; empty: not traced
    double latency = kNever;
    int volumes() const { return static_cast<int>(bounds.size()) - 1; }
  };

  struct Span {
    int lo = 0, hi = -1;  // [lo, hi]
    bool empty() const { return lo > hi; }
    bool has(int d) const { return d >= lo && d <= hi; }
    void add(int d) { *this = empty() ? Span{d, d} : Span{d < lo ? d : lo, d > hi ? d : hi}; }
  };

  const SpatialModel& model_;
  const int n_;
  uint64_t random_;
  int64_t limit_ = 0, tried_ = 0, window_ = 0;
  std::vector<int> usable_;  // providers that are up and reachable
  std::vector<State> queue_;
  size_t next_ = 0;
  size_t turn_ = 0;
  double share_ = 0.06;  // of the rows: the step of the next window
  State home_, other_;
  SpatialPlan best_;
  std::vector<int> trial_;  // the cuts of the state under search, but where a move tries others
  std::vector<double> finish_;
  std::vector<std::pair<int, Part>> undo_;
  std::vector<Span> changed_;  // [volumes] providers whose part a move changed

  bool spent() const { return model_.work >= limit_; }
  int height(const State& s, int volume) const { return model_.height(s.bounds[volume + 1]); }
  int below(int bound);
  void build(State& s);
  void look_ahead(State& s, int level) const;
  bool touches(State& s, int from, int to, int first, int last) const;
  bool too_late(State& s, int to, int first, int last, double slack);
  double recurse(State& s, int first, int same, double slack);
  bool offer(State& s, int first, int last, double slack);
  void keep(const State& s);
  bool transfer(State& s, int from, int to, int first, int last, double share, double slack);
  bool sweep(State& s, double share);
  void descend(State& s, double share);
  bool window(State& s, double share);
  void trace(State& s) const;
  void shift(State& s, double share, double slack);
  void toggle(State& s, int p) const;
  void anneal(State& s, int64_t work);
  void add_beam(size_t width);
};

// A lower bound of T_end from the finish times at a bound, over every way to go on.
struct SpatialBound {
  explicit SpatialBound(const SpatialModel& model);
  double fluid(double spent) const { return (spent / total) * (1 - 1e-12) + tail; }  // rounding may not cut off the optimum
  double at(int bound, const double* finish, double* spent) const {
    double latest = 0;
    *spent = 0;
    for (size_t d = 0; d < weight.size(); ++d) {
      *spent += weight[d] * finish[d];
      latest = finish[d] > latest ? finish[d] : latest;
    }
    const double least = fluid(left[bound] + *spent);
    return least > latest + tail ? least : latest + tail;
  }
  std::vector<double> left, weight;
  double total = 0, tail = 0;
};

// The best plan over all partitions with cut vectors from `cuts` ([cut point][vectors][N + 1]), by dynamic programming over volumes with
// Pareto sets of at most `cap` finish times per vector; only plans below `bound` are looked for, and nothing more once model.work reaches
// `limit`. Bounds stay empty when there is none.
SpatialPlan spatial_pareto(const SpatialModel& model, const std::vector<std::vector<int>>& cuts, double bound, size_t cap, int64_t limit);

// The optimum over all partitions and all cut vectors: exact because the recursion is monotone in the finish times. Empty when more than
// `max_steps` units of work would be needed. `bound`: a latency already had. With a `front` of finish times kept per cut vector it is near
// the optimum only, for a fraction of the work: with four of them it was at most 0.5 % above it for VGG-16 on two devices.
std::optional<SpatialPlan> spatial_exact(const SpatialModel& model, double bound, int64_t max_steps, size_t front = static_cast<size_t>(-1));

}  // namespace fastee::plan
