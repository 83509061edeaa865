// Of all places that make the next answer in time with the hit rate, the one where the task is expected to end cheapest (soonest
// without prices); EXIT instead where the gain table says that going on is not worth its cost.
#include "sched/policies.h"

namespace fastee::sched {
namespace {

constexpr double kSwitchGain = 0.9;  // hysteresis: another place must be 10 % cheaper than the last one

int gain_bin(const Config& c, double confidence) {
  const double at = (confidence - c.gain_low) / (c.gain_high - c.gain_low) * static_cast<double>(c.bins);
  return at < 1 ? 0 : at >= c.bins ? c.bins - 1 : static_cast<int>(at);
}

class Deadline final : public Policy {
 public:
  explicit Deadline(const Parts& parts) : Policy(parts), last_place_(parts.model.segments, -1) {}

  Choice place(const Query& q) override {
    const Model& m = model_;
    const double *need = m.need_mean(q.bucket, q.segment), *need_sd = m.need_sd(q.bucket, q.segment);
    const double* togo = m.togo(q.bucket, q.segment);
    const double *wait = m.wait_mean(), *wait_sd = m.wait_sd();
    const int last = last_place_[q.segment];
    int best = -1, stay = -1;
    double best_end = kInf, stay_end = kInf;
    for (int p = 0; p < m.nodes; ++p) {
      const double extra = m.delay_at(q.segment, p, q.now, q.rounds);
      const double t = (need[p] + q.z * need_sd[p]) + ((wait[p] + q.z * wait_sd[p]) + extra);
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
    const double u = q.sample->confidence;
    if (q.exit >= 0 && c.bins > 0 && m.switched_on(q.exit) && u == u) {
      const double gain = c.gain[static_cast<size_t>(q.exit) * c.bins + gain_bin(c, u)];
      const double later = best_end == kInf ? kInf : best_end - m.return_ns(m.me);
      const double cost = c.cost_weight > 0 ? c.cost_weight * (later / kNs) : 0.0;
      if (gain * q.weight <= cost && gain <= c.max_drop) return {Choice::kExit, m.me};
    }
    last_place_[q.segment] = best;
    return {Choice::kRun, best};
  }

 private:
  std::vector<int> last_place_;  // [S] the node chosen last for a segment
};

}  // namespace

std::unique_ptr<Policy> make_deadline(const Policy::Parts& parts) { return std::make_unique<Deadline>(parts); }

}  // namespace fastee::sched
