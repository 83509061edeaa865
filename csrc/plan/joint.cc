#include "plan/joint.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastee::plan {

Replanner::Replanner(Problem problem, double hysteresis) : tables_(std::move(problem)), hysteresis_(hysteresis) {
  if (!(hysteresis >= 0 && hysteresis < 1)) throw std::invalid_argument("plan: hysteresis must be in [0, 1), got " + std::to_string(hysteresis));
  replan();
}

bool Replanner::replan() {
  const Objective objective = tables_.problem().objective;
  if (objective == Objective::kThroughput)
    next_ = tables_.solve();
  else if (tables_.recurse(next_) && !tables_.fits(next_))
    next_ = tables_.solve();
  best_value_ = next_.value;
  const bool same = current_.found == next_.found && current_.place == next_.place && current_.codec == next_.codec && current_.on == next_.on;
  if (same || (!current_.found && !next_.found)) {
    current_.value = next_.value;
    current_.bound = next_.bound;
    current_.exact = next_.exact;
    return false;
  }
  if (current_.found && next_.found) {
    current_.value = objective == Objective::kThroughput ? tables_.account(current_).bottleneck : tables_.value_of(current_);
    current_.bound = next_.bound;
    current_.exact = false;
    if (next_.value >= (1.0 - hysteresis_) * current_.value && tables_.fits(current_)) return false;
  }
  std::swap(current_, next_);
  return true;
}

}  // namespace fastee::plan
