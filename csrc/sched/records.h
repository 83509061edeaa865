// What a compiled rule or policy of the user reads: plain structs, mirrored field by field in fastee/scheduling/rules.py.
// Times are seconds; NaN and -1 stand for "not given".
#pragma once
#include <cstdint>

namespace fastee::sched {

struct StatsRecord {  // of the exit just evaluated
  double confidence, threshold, max_prob, margin, entropy, lse, gate, delta;
  int64_t label, exit;  // exit -1: on arrival or out of the waiting room
};

struct TaskRecord {
  double slack;   // until its deadline; +inf without one
  double weight;  // of its class of tenants
  int64_t segment, exits, best, pool, tenant;  // next segment, K, deepest exit that has answered (-1: none)
};

struct NodeRecord {
  double next;  // until the next answer would be at home, with the hit rate; +inf where impossible
  double end;   // expected, until the task ends, if it goes there
  double wait;  // its queue
  int64_t index, here, fits, queue, idle, action;  // action: what a policy returns to send the task there
};

// Other things that a policy may return; the actions of the nodes are kRunAction + index.
inline constexpr int64_t kExitAction = 0, kWaitAction = 3, kRejectAction = 4, kRunAction = 8;

}  // namespace fastee::sched
