// Of all places that make the next answer in time with the hit rate, the one where the task is expected to end cheapest (soonest
// without prices); EXIT instead where the gain table says that going on is not worth its cost.
#include <algorithm>

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
  explicit Deadline(const Parts& parts)
      : Policy(parts), last_place_(parts.model.segments, -1), need_(parts.model.nodes), end_(parts.model.nodes) {}

  Choice place(const Query& q) override {
    const Model& m = model_;
    // While others wait for any answer at all, a better one is not worth the place that it would take from them.
    if (room_.size() > 0 && tasks_[q.slot].best >= 0) return {};
    look(q);
    // Nearly always the cheapest place of all makes the deadline, and no other has to be looked at.
    int best = best_;
    if (!(best >= 0 && need_[best] <= q.slack)) {
      best = -1;
      for (int p = 0; p < m.nodes; ++p)
        if (need_[p] <= q.slack && need_[p] < kInf && (best < 0 || end_[p] < end_[best])) best = p;
    }
    if (best < 0) return tasks_[q.slot].best < 0 ? likeliest(q) : Choice{};
    const int last = last_place_[q.segment];
    if (last >= 0 && need_[last] <= q.slack && need_[last] < kInf && !(end_[best] < kSwitchGain * end_[last])) best = last;
    const double best_end = end_[best];
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
  // need_ and end_ of every node for such a task, and the cheapest of all. The rows of a batch differ in their slack alone, so
  // that most of it stands from row to row.
  void look(const Query& q) {
    const Model& m = model_;
    const bool same = q.now == now_ && q.segment == segment_ && q.bucket == bucket_ && q.rounds == rounds_ && q.z == z_;
    if (same && m.version() == version_) return;
    if (same && m.version() == version_ + 1 && m.last_sent() >= 0) {
      one(q, m.last_sent());
    } else {
      now_ = q.now, segment_ = q.segment, bucket_ = q.bucket, rounds_ = q.rounds, z_ = q.z;
      for (int p = 0; p < m.nodes; ++p) one(q, p);
    }
    version_ = m.version();
    best_ = -1;
    double best_end = 0.0;
    for (int p = 0; p < m.nodes; ++p)
      if (need_[p] < kInf && (best_ < 0 || end_[p] < best_end)) {
        best_ = p;
        best_end = end_[p];
      }
  }
  void one(const Query& q, int p) {
    need_[p] = until_answer(q, p, q.z);
    end_[p] = model_.togo(q.bucket, q.segment)[p] + (model_.wait_mean()[p] + model_.delay_at(q.segment, p, q.now, q.rounds));
  }
  double until_answer(const Query& q, int p, double z) const {
    const Model& m = model_;
    const double extra = m.delay_at(q.segment, p, q.now, q.rounds);
    return (m.need_mean(q.bucket, q.segment)[p] + z * m.need_sd(q.bucket, q.segment)[p]) + ((m.wait_mean()[p] + z * m.wait_sd()[p]) + extra);
  }
  // For a task without any answer yet, no place keeps the promise, but a rejection is surely no answer. It is tried where the next
  // answer is soonest on average, if that average makes the deadline; else it waits while it would make it with nothing before it:
  // queues are estimates, and the tasks in them exit early.
  Choice likeliest(const Query& q) {
    Choice choice;
    double best = kInf, alone = kInf;
    for (int p = 0; p < model_.nodes; ++p) {
      const double t = until_answer(q, p, 0.0);
      alone = std::min(alone, model_.need_mean(q.bucket, q.segment)[p]);
      if (t <= q.slack && t < best) {
        best = t;
        choice = {Choice::kRun, p};
      }
    }
    return choice.kind == Choice::kRun ? choice : wait_for(q, alone);
  }

  std::vector<int> last_place_;     // [S] the node chosen last for a segment
  std::vector<double> need_, end_;  // [N] of the last look
  int64_t now_ = kInt64Min, version_ = -1;
  int segment_ = -1, bucket_ = -1, best_ = -1;
  double rounds_ = 0.0, z_ = 0.0;
};

}  // namespace

std::unique_ptr<Policy> make_deadline(const Policy::Parts& parts) { return std::make_unique<Deadline>(parts); }

}  // namespace fastee::sched
