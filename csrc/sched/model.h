// Profile plus what was observed, condensed into the tables that a decision scans.
#pragma once
#include <algorithm>
#include <vector>

#include "sched/estimator.h"
#include "sched/records.h"
#include "sched/tasks.h"
#include "sched/types.h"

namespace fastee::sched {

// Tables are rebuilt by whoever changes an estimate, never by a scan. No method allocates after construction.
class Model {
 public:
  struct Spread {
    double mean, var;
  };

  explicit Model(const Config& config);

  const Config config;
  const int segments, nodes, buckets, exits, me;
  Counters counters;

  // Tables of one batch bucket, rows of `nodes`: mean and deviation of the ns until the next answer is at home, and expected ns
  // (with prices: ns' worth) until the task ends; +inf where impossible. Without queues and without what this node has sent already.
  const double* need_mean(int bucket, int s) const { return &need_[row(bucket, s)]; }
  const double* need_sd(int bucket, int s) const { return &need_sd_[row(bucket, s)]; }
  const double* togo(int bucket, int s) const { return &togo_[row(bucket, s)]; }
  int codec(int s, int p) const { return moves_[at(s, p)].codec; }
  double return_ns(int n) const { return return_[n]; }  // from there to home
  const double* wait_mean() const { return wait_.data(); }
  const double* wait_sd() const { return wait_sd_.data(); }
  // What stands before node p beside its queue: this node's earlier sends on that link, or the earlier batches here.
  double delay_at(int s, int p, int64_t now, double rounds) const {
    if (p == me) return rounds > 0 ? rounds * segment_time(s, p, buckets - 1).mean : 0.0;
    return link_wait(p, now);
  }
  // [N] what this node has sent over each link's medium and is not through yet; 0 for this node. Kept for one `now`: a batch asks per row.
  const double* sent_before(int64_t now) {
    if (now != before_now_) {
      before_now_ = now;
      if (now <= busy_until_) renew_before(now);  // else all of it is 0 and was so the last time
    }
    return before_.data();
  }
  // Between two equal numbers sent_before() has only grown.
  int64_t before_version() const { return before_version_; }
  // ns until the next answer is at home with quantile z, if the task goes to p now.
  double time_at(int bucket, int s, int p, int64_t now, double rounds, double z) const {
    const size_t i = row(bucket, s) + p;
    return (need_[i] + z * need_sd_[i]) + ((wait_[p] + z * wait_sd_[p]) + delay_at(s, p, now, rounds));
  }
  int bucket_of(int64_t rows) const;
  bool switched_on(int exit) const { return config.thresholds[exit] < kInf; }
  // u >= threshold in fp32, as the exit-head kernels compare; NaN never.
  bool accepts(int exit, double confidence) const { return static_cast<double>(static_cast<float>(confidence)) >= config.thresholds[exit]; }
  const TenantClass& tenant_class(int tenant) const { return classes_[tenant]; }
  int num_classes() const { return static_cast<int>(classes_.size()); }

  Spread segment_time(int s, int n, int b) const {
    const Estimator& e = time_[at(s, n)];
    const size_t i = at(s, n) * buckets + b;
    const double mean = config.mean[i] * kNs * e.used_ratio;
    const double sd = config.spread[i] * kNs * e.used_ratio;
    return {mean, e.used_kept * (sd * sd) + e.used_seen * (mean * mean)};
  }
  bool hosts(int s, int n) const { return config.hosts[at(s, n)] && node_up_[n]; }
  bool link_idle(int p, int64_t now) const { return reachable(me, p) && free_at_of(p, now) <= now; }
  double mean_task_time(int n) const { return turn_[n].mean; }  // ns, over the segments hosted there, one row
  double move_ns(int s, int p) const { return moves_[at(s, p)].mean; }
  double wire_ns(int s, int p) const { return moves_[at(s, p)].wire; }  // what it takes of the link
  double wire_bytes(int s, int p) const {
    return moves_[at(s, p)].codec < 0 ? 0.0 : config.wire_bytes[static_cast<size_t>(s) * config.codecs + moves_[at(s, p)].codec];
  }
  // Whether two groups of rows that wait here for segment s are sooner through as one batch, the merge itself included.
  bool rebatch_pays(int s, int64_t rows, int64_t others, int64_t merge_ns) const;

  StatsRecord stats_record(int exit, const Sample& sample) const;
  NodeRecord node_record(int bucket, int s, int p, int64_t now, double rounds, double z, double slack, bool idle) const;

  bool observe(int s, int n, int64_t batch, int64_t duration);  // false: ignored
  bool observe_link(int src, int dst, int64_t nbytes, int64_t duration);
  bool observe_queue(int n, int64_t length, int64_t out_length);
  void set_node_up(int n, bool up);
  void set_link_up(int src, int dst, bool up);
  void learn_exit(int exit, bool accepted) {
    if (config.thresholds[exit] == kInf) return;
    const int64_t n = ++reached_[exit];
    accepted_[exit] += accepted;
    // A rebuild costs microseconds, so the share is looked at after 1, 2, 4, 8, ... answers, later every 4096.
    if ((n & (n - 1)) == 0 || n % 4096 == 0) renew_exit(exit);
  }
  // A message for segment s goes to p now; returns the ns that it takes of the medium.
  int64_t sent(int s, int p, int64_t now) {
    const int64_t wire = static_cast<int64_t>(std::min(moves_[at(s, p)].wire, 1e15));
    Medium& m = media_[medium_[p]];
    if (told_ && subtract_saturated(now, m.busy_until) > Medium::kForgotten) arrived_[p] = sent_[p];  // long there, or lost
    m.busy_until = add_saturated(std::max(m.busy_until, now), wire);
    busy_until_ = kInt64Max;
    ++sent_[p];
    if (told_) watch(p, wire, now);
    before_[p] = link_wait(p, now);
    for (int q = medium_[p]; shared_ && q < nodes; ++q)
      if (medium_[q] == medium_[p]) before_[q] = before_[p];
    return wire;
  }
  void unsent(int p, int64_t wire) {
    Medium& m = media_[medium_[p]];
    m.busy_until = subtract_saturated(m.busy_until, wire);
    --sent_[p];
    if (told_) unwatch(p, wire);
    before_now_ = kUnknown;
    busy_until_ = kInt64Max;
  }
  void arrived(int p, int64_t now);  // the oldest message to p that is under way

  // Large worlds (S * N * N above Config.eager_limit): what follows the next answer is brought up by rebuild_step, one segment
  // per call, while stale(); everything that the deadline depends on is always current.
  bool stale() const { return level_ >= 0; }
  void rebuild_step();

  // Counts every change of what a decision reads, but for what was sent.
  int64_t version() const { return version_; }

  // for snapshots
  const std::vector<Estimator>& time_estimators() const { return time_; }
  const std::vector<Estimator>& rate_estimators() const { return rate_; }
  const std::vector<uint8_t>& node_up() const { return node_up_; }
  const std::vector<uint8_t>& link_up() const { return link_up_; }
  const std::vector<int64_t>& queue() const { return queue_; }
  const std::vector<double>& exit_probability() const { return exit_probability_; }

 private:
  struct Move {
    double mean = kInf, var = 0.0, cost = kInf;  // cost: mean, and what the bytes cost
    double wire = 0.0;
    int codec = -1;
  };
  // Links from here that pass one message after another: mostly one link, or several over one radio. Its clock runs by the estimated
  // rates; one message at a time is watched, and as long as that is not there, the clock cannot have gone on: a radio that fades
  // is seen at once, not when the late message tells its rate.
  struct Medium {
    static constexpr int64_t kForgotten = 1'000'000'000;  // ns behind its time after which a watched message counts as lost
    int64_t busy_until = kInt64Min, last = kInt64Min;     // last: the end of the last message, had it not had to wait
    int64_t due = 0, after = 0, number = 0;               // of the watched message: expected end, ns sent after it, count on its link
    int watched = -1;                                     // node it goes to
  };
  int64_t free_at_of(int p, int64_t now) const {
    const Medium& m = media_[medium_[p]];
    if (m.watched < 0 || subtract_saturated(now, m.due) > Medium::kForgotten) return m.busy_until;
    return std::max(m.busy_until, add_saturated(subtract_saturated(now, delay_ns(m.watched)), m.after));
  }
  int64_t delay_ns(int p) const { return static_cast<int64_t>(config.delay[at(me, p)] * kNs); }
  void watch(int p, int64_t wire, int64_t now);
  void unwatch(int p, int64_t wire);
  double link_wait(int p, int64_t now) const {
    if (now > busy_until_) return 0.0;
    const int64_t free_at = free_at_of(p, now);
    return free_at > now ? static_cast<double>(subtract_saturated(free_at, now)) : 0.0;
  }
  void renew_before(int64_t now);
  void renew_exit(int exit);
  size_t at(int s, int n) const { return static_cast<size_t>(s) * nodes + n; }
  size_t row(int bucket, int s) const { return (static_cast<size_t>(s) * buckets + bucket) * nodes; }
  bool reachable(int a, int b) const { return link_up_[at(a, b)] && node_up_[b]; }
  Move best_move(int s, int a, int b) const;
  double return_time(int n) const;
  double expected(int s, int n, int64_t batch) const;
  double surcharge(int n) const { return config.surcharge.empty() ? 1.0 : 1.0 + config.surcharge[n]; }
  void place(int b, int s, int p);
  void after(int b, int s, int p);
  void renew(int s, int p);
  double onward_of(int b, int s, const double* costs) const;
  void onward_row(int s, int n);
  void renew_nearest(int s, int p);
  void rebuild_level(int s);
  void follow(int from);
  void refresh_all();
  void refresh_times(int s, int n);
  void refresh_link(int a, int b);
  void refresh_node(int n);
  void refresh_queue(int n);
  void refresh_wait(int n);
  void renew_alone(int s, int n);

  std::vector<TenantClass> classes_;
  std::vector<Estimator> time_, rate_;        // [S, N], [N, N]
  std::vector<uint8_t> node_up_, link_up_;    // [N], [N, N]
  std::vector<int64_t> queue_;               // [N]
  std::vector<int> medium_;                  // [N] index into media_: the first node over that medium
  std::vector<Medium> media_;                // [N]
  std::vector<int64_t> sent_, arrived_;      // [N] messages to a node; arrived_ follows where the host tells
  bool shared_ = false, told_ = false;       // any two links over one medium; the host tells when a message is there
  std::vector<int64_t> reached_, accepted_;   // [K]
  std::vector<double> exit_probability_;      // [K]
  std::vector<double> need_, need_sd_, togo_;  // [S, NB, N]
  std::vector<double> run_, there_, onward_;   // [S, NB, N]: with prices; of s on p alone, of all from its start there, C(s, n)
  std::vector<double> wait_, wait_sd_;         // [N]
  std::vector<double> before_;                 // [N] sent_before(before_now_)
  int64_t busy_until_ = kInt64Min;             // after it every medium is free: mostly so, and then nothing of them is read
  static constexpr int64_t kUnknown = kInt64Min;  // no clock's time: of before_now_ where something was taken back
  int64_t before_now_ = kUnknown, before_version_ = 0;
  std::vector<Spread> alone_;                  // [N, S] of a single row; {0, 0} where not hosted
  std::vector<Spread> turn_;                   // [N] mean segment there, one row: what each task in the queue costs
  std::vector<double> return_;                // [N]
  std::vector<Move> moves_;                   // [S, N] from this node
  std::vector<double> costs_;                 // [S, N, N] of every move, where that is small enough; else one row of N
  std::vector<double> nearest_;               // [S, N] the least cost of a move there; only with all of costs_
  // follow(): places whose there_ and nodes whose row of costs_ may have moved [S, N], and whether any of the latter has; the places that did.
  std::vector<uint8_t> moved_, new_costs_;
  bool any_costs_ = false;
  std::vector<int> list_;
  int64_t version_ = 0;
  const bool eager_;
  int level_ = -1;
};

TaskRecord task_record(const Model& model, const Tasks& tasks, int64_t slot, double slack, double weight);

}  // namespace fastee::sched
