// Of all places that make the next answer in time with the hit rate, the one where the task is expected to end cheapest (soonest
// without prices); EXIT instead where the gain table says that going on is not worth its cost. Bound late: a task without an answer
// joins no line that it can watch from outside.
#include <algorithm>

#include "sched/policies.h"

namespace fastee::sched {
namespace {

constexpr double kSwitchGain = 0.9;   // hysteresis: another place must be 10 % cheaper than the last one
constexpr double kMostMessages = 2.0;  // so many messages of its own size may be before it on the way out

int gain_bin(const Config& c, double confidence) {
  const double at = (confidence - c.gain_low) / (c.gain_high - c.gain_low) * static_cast<double>(c.bins);
  return at < 1 ? 0 : at >= c.bins ? c.bins - 1 : static_cast<int>(at);
}

class Deadline final : public Policy {
 public:
  explicit Deadline(const Parts& parts)
      : Policy(parts), last_place_(parts.model.segments, -1), waits_(parts.model.wait_mean()) {}

  Choice place(const Query& q) override {
    const Model& m = model_;
    const bool answered = tasks_[q.slot].best >= 0;
    // A better answer is not worth a run during which somebody who waits for any answer at all misses the last moment.
    if (answered && room_.size() > 0 && static_cast<double>(subtract_saturated(room_.soonest(), q.now)) <= m.segment_time(q.segment, m.me, 0).mean)
      return {};
    const bool again = look(q);
    const int last = last_place_[q.segment];
    int best = last;
    if (last < 0 || !in_time(q, last))
      best = cheapest(q);
    else if (const double bar = kSwitchGain * end(last); !again || least_end(bar) < bar)
      best = cheapest(q, last, bar, [](int) { return true; });
    if (best < 0) return answered ? Choice{} : likeliest(q);
    if (!answered && q.slack < kInf && m.nodes > 1) {
      const auto open = [&](int p) { return p == m.me ? m.queue()[p] <= most_rows_ : before_[p] <= kMostMessages * m.wire_ns(q.segment, p); };
      if (!open(best)) best = cheapest(q, -1, kNone, open);
      if (best < 0) {
        const Choice wait = wait_for(q, alone(q));
        return wait.kind == Choice::kWait ? wait : likeliest(q);
      }
    }
    const Config& c = m.config;
    const double u = q.sample->confidence;
    if (q.exit >= 0 && c.bins > 0 && m.switched_on(q.exit) && u == u) {
      const double gain = c.gain[static_cast<size_t>(q.exit) * c.bins + gain_bin(c, u)], ends = end(best);
      const double later = ends == kInf ? kInf : ends - m.return_ns(m.me);
      const double cost = c.cost_weight > 0 ? c.cost_weight * (later / kNs) : 0.0;
      if (gain * q.weight <= cost && gain <= c.max_drop) return {Choice::kExit, m.me};
    }
    last_place_[q.segment] = best;
    return {Choice::kRun, best};
  }

  void observed(int node, int64_t batch, int64_t) override {
    if (node == model_.me) most_rows_ = std::max(most_rows_, batch);
  }

 private:
  // Which tables such a task reads. True where nothing but sends of this very moment has happened since the last look.
  bool look(const Query& q) {
    Model& m = model_;
    before_ = m.sent_before(q.now);
    const bool again = m.before_version() == before_version_;
    if (!again) before_version_ = m.before_version(), least_ = kUnknown;
    if (q.segment == segment_ && q.bucket == bucket_ && q.rounds == rounds_ && q.z == z_ && m.version() == version_) return again;
    least_ = kUnknown;
    segment_ = q.segment, bucket_ = q.bucket, rounds_ = q.rounds, z_ = q.z, version_ = m.version();
    togo_ = m.togo(q.bucket, q.segment);
    earlier_ = q.rounds > 0 ? q.rounds * m.segment_time(q.segment, m.me, m.buckets - 1).mean : 0.0;
    known_ = -1;
    return false;
  }
  // No place ends sooner. Sends only add, so it is asked again only once the last place has come near it.
  double least_end(double bar) {
    if (least_ < bar) {
      least_ = kInf;
      for (int p = 0; p < model_.nodes; ++p) least_ = std::min(least_, end(p));
    }
    return least_;
  }
  double earlier(int p) const { return p == model_.me ? earlier_ : 0.0; }
  double until_answer(const Query& q, int p, double z) const {
    const Model& m = model_;
    return (m.need_mean(q.bucket, q.segment)[p] + z * m.need_sd(q.bucket, q.segment)[p]) + ((m.wait_mean()[p] + z * m.wait_sd()[p]) + earlier(p));
  }
  double end(int p) const { return (togo_[p] + (waits_[p] + earlier(p))) + before_[p]; }
  // The place asked for last is remembered: the rows of a batch ask for the same one.
  bool in_time(const Query& q, int p) {
    if (p != known_) known_ = p, need_ = until_answer(q, p, q.z);
    return need_ + before_[p] <= std::min(q.slack, kMost);
  }
  // The open place in time with the least end below `bar` (NaN: any), else `best`.
  template <typename Open>
  int cheapest(const Query& q, int best, double bar, Open&& open) const {
    const double slack = std::min(q.slack, kMost);
    for (int p = 0, n = model_.nodes; p < n; ++p) {
      const double e = end(p);
      if (!(e >= bar) && until_answer(q, p, q.z) + before_[p] <= slack && open(p)) best = p, bar = e;
    }
    return best;
  }
  int cheapest(const Query& q) const {
    return cheapest(q, -1, kNone, [](int) { return true; });
  }
  // ns until the soonest next answer with nothing before it: queues are estimates, and the tasks in them exit early.
  double alone(const Query& q) const {
    const double* mean = model_.need_mean(q.bucket, q.segment);
    return *std::min_element(mean, mean + model_.nodes);
  }
  // For a task without any answer yet, no place keeps the promise, but a rejection is surely no answer. It is tried where the next
  // answer is soonest on average, if that average makes the deadline; else it waits while it would make it with nothing before it.
  Choice likeliest(const Query& q) {
    Choice choice;
    double best = kInf;
    for (int p = 0; p < model_.nodes; ++p) {
      const double t = until_answer(q, p, 0.0) + before_[p];
      if (t <= q.slack && t < best) {
        best = t;
        choice = {Choice::kRun, p};
      }
    }
    return choice.kind == Choice::kRun ? choice : wait_for(q, alone(q));
  }

  static constexpr double kUnknown = -kInf;
  static constexpr double kMost = std::numeric_limits<double>::max();

  std::vector<int> last_place_;     // [S] the node chosen last for a segment
  const double *before_ = nullptr, *togo_ = nullptr, *const waits_;  // [N] of the last look
  int64_t version_ = -1, before_version_ = -1, most_rows_ = 1;       // most_rows_: of a batch that was seen here
  int segment_ = -1, bucket_ = -1, known_ = -1;
  double rounds_ = 0.0, z_ = 0.0, least_ = kUnknown, earlier_ = 0.0, need_ = 0.0;  // earlier_: full batches of the same call; need_: of known_
};

}  // namespace

std::unique_ptr<Policy> make_deadline(const Policy::Parts& parts) { return std::make_unique<Deadline>(parts); }

}  // namespace fastee::sched
