// Which node runs which segments, with which codec per cut and which exits: exact recursion over (segment, node), and a search
// with bounds where limits on memory, time or accuracy, or the throughput objective, make the recursion alone insufficient.
#pragma once
#include <cstddef>
#include <vector>

#include "plan/problem.h"

namespace fastee::plan {

// Tables of one problem, kept so that a change of a link, a speed or an exit costs one pass. Latency and cost:
//   value(s, n) = min over p, c of  move(s, n, p, c) + there(s, p)         the carry entering s is at n
//   there(s, p) = run(s, p) + min(off: value(s+1, p),  on: head + leave * home(p) + (1 - leave) * value(s+1, p))
class Pipeline {
 public:
  explicit Pipeline(Problem problem);

  const Problem& problem() const { return p_; }

  void set_link(int src, int dst, double bandwidth, double delay);
  void set_speed(int node, double factor);  // > 0: seconds of that node times factor, from the seconds given at construction
  void set_leave(int exit, double share);

  // The best plan under every limit; not found: infeasible says why.
  Placement solve();
  // The recursion alone, into `out` without allocation once its vectors have their size; false when nothing can be placed.
  bool recurse(Placement& out);
  Account account(const Placement& plan) const;
  // The objective of a plan under the present numbers, without allocation; latency and cost only.
  double value_of(const Placement& plan) const;
  bool fits(const Placement& plan) const;

 private:
  struct Search;
  size_t at(int s, int n) const { return static_cast<size_t>(s) * p_.nodes + n; }
  size_t pair(int a, int b) const { return static_cast<size_t>(a) * p_.nodes + b; }
  void price_link(int a, int b);
  double move_seconds(int s, int a, int b, int c) const;
  double move_cost(int s, int a, int b, int c) const;
  double home_seconds(int n) const;
  double home_cost(int n) const;

  Problem p_;
  std::vector<double> speed_;                            // [N]
  std::vector<double> per_byte_, per_codec_, fixed_;     // [N, N] objective of a byte, a codec second, a message
  std::vector<double> home_;                             // [N]
  std::vector<double> value_, there_;                    // [S + 1, N], [S, N]
  std::vector<int> next_;                                // [S, N] where value_ goes
  std::vector<uint8_t> codec_;                           // [S, N]
  std::vector<uint8_t> on_;                              // [K, N]
};

}  // namespace fastee::plan
