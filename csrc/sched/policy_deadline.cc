// Of all places that make the next answer in time with the hit rate, the one where the task is expected to end soonest;
// EXIT instead where the gain table says that going on is not worth its time.
#include "sched/policy.h"

namespace fastee::sched {
namespace {

constexpr double kSwitchGain = 0.9;  // hysteresis: another place must be 10 % sooner than the last one

int gain_bin(const Config& c, double confidence) {
  const double at = (confidence - c.gain_low) / (c.gain_high - c.gain_low) * static_cast<double>(c.bins);
  return at < 1 ? 0 : at >= c.bins ? c.bins - 1 : static_cast<int>(at);
}

}  // namespace

Choice place_deadline(Model& m, const Query& q) {
  const double* need = m.need(q.bucket, q.segment);
  const double* togo = m.togo(q.bucket, q.segment);
  const double *wait = m.wait_mean(), *wait_sure = m.wait_sure();
  const int last = m.last_place[q.segment];
  int best = -1, stay = -1;
  double best_end = kInf, stay_end = kInf;
  for (int p = 0; p < m.nodes; ++p) {
    const double extra = m.delay_at(q.segment, p, q.now, q.rounds);
    const double t = need[p] + (wait_sure[p] + extra);
    if (!(t <= q.slack && t < kInf)) continue;
    const double end = togo[p] + (wait[p] + extra);
    if (best < 0 || end < best_end) {
      best = p;
      best_end = end;
    }
    if (p == last) {
      stay = p;
      stay_end = end;
    }
  }
  if (best < 0) return {};
  if (stay >= 0 && !(best_end < kSwitchGain * stay_end)) {
    best = stay;
    best_end = stay_end;
  }
  const Config& c = m.config;
  if (q.exit >= 0 && c.bins > 0 && c.thresholds[q.exit] < kInf && q.confidence == q.confidence) {
    const double gain = c.gain[static_cast<size_t>(q.exit) * c.bins + gain_bin(c, q.confidence)];
    const double later = best_end == kInf ? kInf : best_end - m.return_ns();
    const double cost = c.cost_weight > 0 ? c.cost_weight * (later / kNs) : 0.0;
    if (gain <= cost && gain <= c.max_drop) return {Choice::kExit, m.me};
  }
  m.last_place[q.segment] = best;
  return {Choice::kRun, best};
}

}  // namespace fastee::sched
