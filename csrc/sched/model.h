// Profile plus what was observed, condensed into the tables that a decision scans.
#pragma once
#include <vector>

#include "sched/estimator.h"
#include "sched/types.h"

namespace fastee::sched {

// Tables are rebuilt by whoever changes an estimate, never by a scan. No method allocates after construction.
class Model {
 public:
  explicit Model(const Config& config);

  const Config config;
  const int segments, nodes, buckets, exits, me;
  Counters counters;

  // Tables of one batch bucket, rows of `nodes`: ns until the next answer is at home with the hit rate, and expected ns until
  // the task ends; +inf where impossible. Without queues and without what this node has sent already.
  const double* need(int bucket, int s) const { return &need_[(static_cast<size_t>(bucket) * segments + s) * nodes]; }
  const double* togo(int bucket, int s) const { return &togo_[(static_cast<size_t>(bucket) * segments + s) * nodes]; }
  int codec(int s, int p) const { return codec_[at(s, p)]; }
  double return_ns() const { return return_[me]; }  // from this node to home
  const double* wait_mean() const { return wait_.data(); }
  const double* wait_sure() const { return wait_sure_.data(); }
  // What stands before node p beside its queue: this node's earlier sends on that link, or the earlier batches here.
  double delay_at(int s, int p, int64_t now, double rounds) const {
    if (p == me) return rounds > 0 ? rounds * segment_time(s, p, buckets - 1).mean : 0.0;
    return busy_until_[p] > now ? static_cast<double>(subtract_saturated(busy_until_[p], now)) : 0.0;
  }
  int bucket_of(int64_t rows) const;
  // u >= threshold in fp32, as the exit-head kernels compare; NaN never.
  bool accepts(int exit, double confidence) const {
    return exit >= 0 && exit < exits && static_cast<double>(static_cast<float>(confidence)) >= config.thresholds[exit];
  }

  void observe(int s, int n, int64_t batch, int64_t duration);
  void observe_link(int src, int dst, int64_t nbytes, int64_t duration);
  void observe_queue(int n, int64_t length, int64_t out_length);
  void set_node_up(int n, bool up);
  void set_link_up(int src, int dst, bool up);
  void learn_exit(int exit, bool accepted);
  void sent(int s, int p, int64_t now);

  std::vector<int> last_place;  // [S] the node chosen last for a segment: hysteresis of the policies

  // for snapshots
  const std::vector<Estimator>& time_estimators() const { return time_; }
  const std::vector<Estimator>& rate_estimators() const { return rate_; }
  const std::vector<uint8_t>& node_up() const { return node_up_; }
  const std::vector<uint8_t>& link_up() const { return link_up_; }
  const std::vector<int64_t>& queue() const { return queue_; }
  const std::vector<double>& exit_probability() const { return exit_probability_; }

 private:
  struct Spread {
    double mean, var;
  };
  struct Move {
    double mean = kInf, var = 0.0;
    int codec = -1;
    double wire = 0.0;
  };
  size_t at(int s, int n) const { return static_cast<size_t>(s) * nodes + n; }
  Spread segment_time(int s, int n, int b) const {
    const Estimator& e = time_[at(s, n)];
    const size_t i = at(s, n) * buckets + b;
    const double mean = config.mean[i] * kNs * e.used_ratio;
    const double sd = config.spread[i] * kNs * e.used_ratio;
    return {mean, e.used_kept * (sd * sd) + e.used_seen * (mean * mean)};
  }
  bool reachable(int a, int b) const { return link_up_[at(a, b)] && node_up_[b]; }
  Move best_move(int s, int a, int b) const;
  double return_time(int n) const;
  double expected(int s, int n, int64_t batch) const;
  void refresh();
  void refresh_queues();

  std::vector<Estimator> time_, rate_;        // [S, N], [N, N]
  std::vector<uint8_t> node_up_, link_up_;    // [N], [N, N]
  std::vector<int64_t> queue_, out_queue_, busy_until_;  // [N]
  std::vector<int64_t> reached_, accepted_;   // [K]
  std::vector<double> exit_probability_;      // [K]
  std::vector<double> need_, togo_;           // [NB, S, N]
  std::vector<double> wait_, wait_sure_;      // [N]
  std::vector<double> return_, wire_;         // [N], [S, N]
  std::vector<int> codec_;                    // [S, N]
  std::vector<Move> moves_;                   // [S, N, N]
  std::vector<double> there_, onward_;        // [N] scratch of refresh
};

}  // namespace fastee::sched
