// Go on here when that makes the deadline, else offload to where the next answer is soonest.
#include "sched/policy.h"

namespace fastee::sched {

Choice place_threshold(Model& m, const Query& q) {
  const double* need = m.need(q.bucket, q.segment);
  const double* wait = m.wait_sure();
  const auto time = [&](int p) { return need[p] + (wait[p] + m.delay_at(q.segment, p, q.now, q.rounds)); };
  const double here = time(m.me);
  if (here <= q.slack && here < kInf) return {Choice::kRun, m.me};
  Choice choice;
  double best = kInf;
  for (int p = 0; p < m.nodes; ++p) {
    if (p == m.me) continue;
    const double t = time(p);
    if (t <= q.slack && t < best) {
      best = t;
      choice = {Choice::kRun, p};
    }
  }
  return choice;
}

}  // namespace fastee::sched
