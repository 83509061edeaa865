// The plan in force while links and speeds move: re-planned by one pass over prepared tables, changed only when it pays.
#pragma once
#include "plan/pipeline.h"

namespace fastee::plan {

class Replanner {
 public:
  // `hysteresis`: a plan replaces the one in force when it is better by more than this share (0.1 = 10 %).
  Replanner(Problem problem, double hysteresis);

  Pipeline& tables() { return tables_; }
  const Placement& current() const { return current_; }
  double best_value() const { return best_value_; }

  // True when the plan in force changed. Where nothing can be placed any more, current().found becomes false. No allocation unless
  // a limit on memory, accuracy or time binds (then the search under limits runs) or the objective is throughput.
  bool replan();

 private:
  Pipeline tables_;
  Placement current_, next_;
  double hysteresis_, best_value_ = kInf;
};

}  // namespace fastee::plan
