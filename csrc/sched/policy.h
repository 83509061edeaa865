// The seam for policies: one function and one name, one file each (policy_<name>.cc); listed in policy.cc.
#pragma once
#include <string>
#include <string_view>

#include "sched/model.h"

namespace fastee::sched {

struct Query {
  int segment;        // the next one to run, 0..K
  int exit;           // the exit just evaluated, -1 on arrival
  double confidence;  // its score; below the threshold or NaN
  double slack;       // ns left, +inf without a deadline
  int64_t now;
  int bucket;     // batch bucket of the rows that travel together
  double rounds;  // full batches that run before the last one
};

struct Choice {
  enum Kind { kNothingFits, kExit, kRun } kind = kNothingFits;
  int node = -1;  // of kRun: this node or the one to offload to
};

// Called where the exit rule did not accept and a segment is left to run. Must not allocate, lock or read a clock.
// An answer of kNothingFits becomes a forced EXIT of the best head reached, or REJECT.
struct Policy {
  std::string_view name;
  Choice (*place)(Model& model, const Query& query);
};

const Policy* find_policy(std::string_view name);  // nullptr when unknown
std::string policy_names();

Choice place_deadline(Model& model, const Query& query);
Choice place_threshold(Model& model, const Query& query);

}  // namespace fastee::sched
