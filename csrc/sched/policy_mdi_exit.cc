// MDI-Exit (Colocrese et al. 2024; the four algorithms are reconstructed): exit, keep or queue (Alg 1), offload with a probability
// from both ends' queues (Alg 2), and at the source adapt the arrival rate (Alg 3) or the exit threshold (Alg 4).
#include <cmath>

#include "sched/policies.h"
#include "sched/random.h"

namespace fastee::sched {
namespace {

enum Adapt { kNone_, kRate, kThreshold };
constexpr int kSizeClasses = 51;  // powers of two up to 2^50 bytes

int size_class(double bytes) {
  int c = 0;
  while (c + 1 < kSizeClasses && bytes >= 2.0) {
    bytes = bytes / 2.0;
    ++c;
  }
  return c;
}

class MdiExit final : public Judge {
 public:
  explicit MdiExit(const Parts& parts)
      : Judge(parts),
        p_(parts.model.config.params),
        n_(parts.model.nodes),
        me_(parts.model.me),
        source_(me_ == parts.model.config.home),
        period_(static_cast<int64_t>(p_.period * kNs)),
        random_(parts.model.config.seed),
        task_time_(n_),
        transfer_(static_cast<size_t>(n_) * kSizeClasses, kNone),
        stamp_(n_, kInt64Min),
        mu_(p_.mu) {
    for (int n = 0; n < n_; ++n) task_time_[n] = model_.mean_task_time(n);
    threshold_ = p_.t_max;
    for (double t : model_.config.thresholds)
      if (t < kInf) {
        threshold_ = std::min(std::max(t, p_.t_min), p_.t_max);
        break;
      }
  }

  bool admits() const override { return !source_ || model_.queue()[me_] + room_.size() < p_.q_max; }

  bool accepts(int64_t, int exit, const Sample& sample) const override {
    if (!model_.switched_on(exit)) return false;
    const double limit = p_.adapt == kThreshold ? threshold_ : model_.config.thresholds[exit];
    return static_cast<float>(sample.confidence) > static_cast<float>(limit);
  }

  // Alg 1. An arrival is not the end of a task: it goes to the input queue, but for raw inputs at the source.
  Choice place(const Query& q) override {
    const bool queueing = q.exit >= 0 || (q.segment == 0 && source_ && p_.raw_offload);
    if ((!queueing || model_.queue()[me_] == 0 || room_.size() > p_.t_o) && fits(q, me_)) return {Choice::kRun, me_};
    return wait_while_possible(q);
  }

  // Alg 2, one neighbour after the other from a rotating start; then the liveness rule. One call, one task.
  int64_t poll(int64_t now, Choice* choice) override {
    static constexpr Sample kNothing;
    for (; tried_ < n_ && room_.size() > 0; ++tried_) {
      const int p = (start_ + tried_) % n_;
      const int64_t queue = model_.queue()[p];
      if (p == me_ || !fresh(p, now) || !model_.link_idle(p, now) || room_.size() <= queue) continue;
      const Query q = query_of(room_.head(), now, kNothing);
      if (!fits(q, p)) continue;
      const double lhs = static_cast<double>(model_.queue()[me_]) * task_time_[me_];
      const double rhs = transfer_time(q.segment, p) + static_cast<double>(queue) * task_time_[p];
      if (!(lhs > rhs) && !(random_.uniform() * rhs < lhs)) continue;
      ++tried_;
      *choice = {Choice::kRun, p};
      return q.slot;
    }
    const bool first = tried_ <= n_;
    tried_ = n_ + 1;  // this pass is over
    if (first && idle_ && model_.queue()[me_] == 0 && room_.size() > 0) {
      const Query q = query_of(room_.head(), now, kNothing);
      if (fits(q, me_)) {
        *choice = {Choice::kRun, me_};
        return q.slot;
      }
    }
    tried_ = 0;
    start_ = (start_ + 1) % n_;
    return -1;
  }

  int64_t next_tick() const override { return source_ && p_.adapt != kNone_ ? next_ : kNever; }

  void tick(int64_t now) override {
    if (!source_ || p_.adapt == kNone_ || now < next_) return;
    const bool first = next_ == kInt64Min;
    next_ = add_saturated(now, period_);
    if (first) return;  // nothing has been seen yet: the first tick only sets the rhythm
    const int64_t q = model_.queue()[me_] + room_.size();
    if (p_.adapt == kThreshold && !limiting_) {
      const double up = q < p_.t_q1 ? 1.0 + p_.a : q < p_.t_q2 ? 1.0 + p_.b : 1.0 - p_.z;
      full_ = q >= p_.t_q2 && threshold_ == p_.t_min ? full_ + 1 : 0;
      threshold_ = std::min(std::max(threshold_ * up, p_.t_min), p_.t_max);
      limiting_ = full_ >= p_.takeover;  // nothing is left to give away: Alg 3 takes over
      return;
    }
    const double slower = q < p_.t_q1 ? 1.0 - p_.a : q < p_.t_q2 ? 1.0 - p_.b : 1.0 + p_.z;
    mu_ = std::min(std::max(mu_ * slower, p_.mu_min), p_.mu_max);
    if (p_.adapt == kThreshold && q < p_.t_q1 && mu_ == p_.mu_min) {
      limiting_ = false;
      full_ = 0;
    }
  }

  double admit_interval() const override { return source_ && (p_.adapt == kRate || limiting_) ? mu_ : 0.0; }

  void observed(int node, int64_t batch, int64_t duration) override {
    const double one = static_cast<double>(duration) / static_cast<double>(batch);
    task_time_[node] = task_time_[node] + p_.weight * (one - task_time_[node]);
  }
  void observed_link(int src, int dst, int64_t nbytes, int64_t duration) override {
    if (src != me_) return;
    double& mean = transfer_[static_cast<size_t>(dst) * kSizeClasses + size_class(static_cast<double>(nbytes))];
    mean = mean == mean ? mean + p_.weight * (static_cast<double>(duration) - mean) : static_cast<double>(duration);
  }
  void observed_queue(int node, int64_t now) override { stamp_[node] = now; }

  State state() const override { return {{"mdi_mu", {mu_}}, {"mdi_threshold", {threshold_}}, {"mdi_task_ns", task_time_}}; }

 private:
  bool fresh(int p, int64_t now) const {
    return stamp_[p] != kInt64Min && static_cast<double>(subtract_saturated(now, stamp_[p])) <= p_.report_age * static_cast<double>(period_);
  }
  // What was measured for messages of that size, else the profile's.
  double transfer_time(int s, int p) const {
    const double seen = transfer_[static_cast<size_t>(p) * kSizeClasses + size_class(model_.wire_bytes(s, p))];
    return seen == seen ? seen : model_.move_ns(s, p);
  }

  const Params& p_;
  const int n_, me_;
  const bool source_;
  const int64_t period_;
  Random random_;
  std::vector<double> task_time_;  // [N] Gamma, ns
  std::vector<double> transfer_;   // [N, size class] ns; NaN until measured
  std::vector<int64_t> stamp_;     // [N] of the last report
  double mu_, threshold_;
  int64_t next_ = kInt64Min, full_ = 0;
  bool limiting_ = false;
  int start_ = 0, tried_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_mdi_exit(const Policy::Parts& parts) { return std::make_unique<MdiExit>(parts); }

}  // namespace fastee::sched
