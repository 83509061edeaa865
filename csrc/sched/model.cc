#include "sched/model.h"

#include <cmath>

namespace fastee::sched {
namespace {

// p * a + (1 - p) * b, also where one of them is infinite and has no weight.
double mix(double p, double a, double b) { return p <= 0 ? b : p >= 1 ? a : p * a + (1.0 - p) * b; }

const Config& checked(const Config& config) {
  config.check();
  return config;
}

}  // namespace

Model::Model(const Config& c)
    : config(checked(c)),
      segments(c.segments),
      nodes(c.nodes),
      buckets(static_cast<int>(c.batch_sizes.size())),
      exits(c.segments - 1),
      me(c.node),
      last_place(c.segments, -1),
      time_(static_cast<size_t>(c.segments) * c.nodes),
      rate_(static_cast<size_t>(c.nodes) * c.nodes),
      node_up_(c.nodes, 1),
      link_up_(static_cast<size_t>(c.nodes) * c.nodes),
      queue_(c.nodes, 0),
      out_queue_(c.nodes, 0),
      busy_until_(c.nodes, kInt64Min),
      reached_(exits, 0),
      accepted_(exits, 0),
      exit_probability_(exits),
      need_(static_cast<size_t>(buckets) * segments * nodes),
      togo_(need_.size()),
      wait_(nodes),
      wait_sure_(nodes),
      return_(nodes),
      wire_(static_cast<size_t>(segments) * nodes),
      codec_(wire_.size(), -1),
      moves_(wire_.size() * nodes),
      there_(nodes),
      onward_(nodes) {
  for (size_t i = 0; i < link_up_.size(); ++i) link_up_[i] = config.bandwidth[i] > 0;
  for (int e = 0; e < exits; ++e) exit_probability_[e] = config.thresholds[e] == kInf ? 0.0 : 0.5;
  refresh();
}

int Model::bucket_of(int64_t rows) const {
  int b = 0;
  while (b + 1 < buckets && config.batch_sizes[b] < rows) ++b;
  return b;
}

Model::Move Model::best_move(int s, int a, int b) const {
  Move best;
  if (!reachable(a, b)) return best;
  const Estimator& e = rate_[at(a, b)];
  double best_sure = 0.0;
  for (int codec = 0; codec < config.codecs; ++codec) {
    const size_t i = static_cast<size_t>(s) * config.codecs + codec;
    const double wire = config.wire_bytes[i] * 8.0 * kNs / config.bandwidth[at(a, b)] * e.used_ratio;
    const double mean = config.delay[at(a, b)] * kNs + wire + config.codec_seconds[i] * kNs;
    const double var = e.used_seen * (wire * wire);
    const double sure = mean + config.quantile * std::sqrt(var);
    if (codec == 0 || sure < best_sure) {
      best_sure = sure;
      best = {mean, var, codec, wire};
    }
  }
  return best;
}

double Model::return_time(int n) const {
  if (n == config.home) return 0.0;
  if (!reachable(n, config.home)) return kInf;
  const size_t link = at(n, config.home);
  const double wire = static_cast<double>(config.answer_bytes) * 8.0 * kNs / config.bandwidth[link] * rate_[link].used_ratio;
  return config.delay[link] * kNs + wire;
}

void Model::refresh() {
  const double z = config.quantile;
  for (int n = 0; n < nodes; ++n) return_[n] = return_time(n);
  for (int s = 0; s < segments; ++s)
    for (int a = 0; a < nodes; ++a)
      for (int b = 0; b < nodes; ++b)
        if (a != b) moves_[at(s, a) * nodes + b] = best_move(s, a, b);
  for (int s = 0; s < segments; ++s)
    for (int p = 0; p < nodes; ++p) {
      codec_[at(s, p)] = -1;
      wire_[at(s, p)] = 0.0;
    }
  for (int b = 0; b < buckets; ++b) {
    for (double& v : onward_) v = 0.0;
    for (int s = segments - 1; s >= 0; --s) {
      double* need = &need_[(static_cast<size_t>(b) * segments + s) * nodes];
      double* togo = &togo_[(static_cast<size_t>(b) * segments + s) * nodes];
      for (int p = 0; p < nodes; ++p) {
        need[p] = togo[p] = there_[p] = kInf;  // there_: from the start of segment s on node p to the answer at home
        if (!config.hosts[at(s, p)] || !node_up_[p]) continue;
        const Spread run = segment_time(s, p, b);
        there_[p] = run.mean + (s == exits ? return_[p] : mix(exit_probability_[s], return_[p], onward_[p]));
        if (p == me) {
          need[p] = run.mean + return_[p] + z * std::sqrt(run.var);
          togo[p] = there_[p];
        } else {
          const Move& go = moves_[at(s, me) * nodes + p];
          codec_[at(s, p)] = go.codec;
          wire_[at(s, p)] = go.wire;
          need[p] = go.mean + run.mean + return_[p] + z * std::sqrt(go.var + run.var);
          togo[p] = go.mean + there_[p];
        }
      }
      for (int n = 0; n < nodes; ++n) {
        double best = kInf;
        for (int p = 0; p < nodes; ++p) {
          const double t = p == n ? there_[p] : moves_[at(s, n) * nodes + p].mean + there_[p];
          if (t < best) best = t;
        }
        onward_[n] = best;
      }
    }
  }
  refresh_queues();
}

void Model::refresh_queues() {
  for (int n = 0; n < nodes; ++n) {
    double total = 0.0, total_var = 0.0, hosted = 0.0;
    for (int s = 0; s < segments; ++s)
      if (config.hosts[at(s, n)]) {
        const Spread run = segment_time(s, n, 0);
        total += run.mean;
        total_var += run.var;
        hosted += 1.0;
      }
    const double length = static_cast<double>(queue_[n]);
    wait_[n] = hosted > 0 ? length * (total / hosted) : 0.0;
    wait_sure_[n] = hosted > 0 ? wait_[n] + config.quantile * std::sqrt(length * (total_var / hosted)) : 0.0;
  }
}

double Model::expected(int s, int n, int64_t batch) const {
  const auto& sizes = config.batch_sizes;
  const double* mean = &config.mean[at(s, n) * buckets];
  if (batch <= sizes.front()) return mean[0] * kNs;
  if (batch >= sizes.back()) return mean[buckets - 1] * kNs * (static_cast<double>(batch) / static_cast<double>(sizes.back()));
  const int b = bucket_of(batch);
  const double part = static_cast<double>(batch - sizes[b - 1]) / static_cast<double>(sizes[b] - sizes[b - 1]);
  return (mean[b - 1] + part * (mean[b] - mean[b - 1])) * kNs;
}

void Model::observe(int s, int n, int64_t batch, int64_t duration) {
  if (s < 0 || s >= segments || n < 0 || n >= nodes) {
    ++counters.ignored;
    return;
  }
  const double expect = expected(s, n, batch);
  if (!(expect > 0) || duration <= 0)
    ++counters.ignored;
  else if (time_[at(s, n)].update(static_cast<double>(duration) / expect, counters))
    refresh();
}

void Model::observe_link(int src, int dst, int64_t nbytes, int64_t duration) {
  if (src < 0 || src >= nodes || dst < 0 || dst >= nodes) {
    ++counters.ignored;
    return;
  }
  const double bandwidth = config.bandwidth[at(src, dst)], delay = config.delay[at(src, dst)] * kNs;
  const double wire = bandwidth > 0 && src != dst ? static_cast<double>(nbytes) * 8.0 * kNs / bandwidth : 0.0;
  if (duration <= 0 || !(wire > 0) || wire < 0.25 * delay)  // a short message tells the delay, not the rate
    ++counters.ignored;
  else if (rate_[at(src, dst)].update((static_cast<double>(duration) - delay) / wire, counters))
    refresh();
}

void Model::observe_queue(int n, int64_t length, int64_t out_length) {
  if (n < 0 || n >= nodes || length < 0 || out_length < 0) {
    ++counters.ignored;
    return;
  }
  queue_[n] = length;
  out_queue_[n] = out_length;
  refresh_queues();
}

void Model::set_node_up(int n, bool up) {
  if (n < 0 || n >= nodes || static_cast<bool>(node_up_[n]) == up) return;
  node_up_[n] = up;
  refresh();
}

void Model::set_link_up(int src, int dst, bool up) {
  if (src < 0 || src >= nodes || dst < 0 || dst >= nodes) return;
  up = up && config.bandwidth[at(src, dst)] > 0;
  if (static_cast<bool>(link_up_[at(src, dst)]) == up) return;
  link_up_[at(src, dst)] = up;
  refresh();
}

void Model::learn_exit(int exit, bool accepted) {
  if (config.thresholds[exit] == kInf) return;
  const int64_t n = ++reached_[exit];
  accepted_[exit] += accepted;
  // A rebuild costs microseconds, so the share is looked at after 1, 2, 4, 8, ... answers, later every 4096.
  if ((n & (n - 1)) != 0 && n % 4096 != 0) return;
  const double p = (static_cast<double>(accepted_[exit]) + 1.0) / (static_cast<double>(n) + 2.0);
  if (std::fabs(p - exit_probability_[exit]) <= Estimator::kPublishChange) return;
  exit_probability_[exit] = p;
  refresh();
}

void Model::sent(int s, int p, int64_t now) {
  const int64_t wire = static_cast<int64_t>(std::min(wire_[at(s, p)], 1e15));
  busy_until_[p] = add_saturated(std::max(busy_until_[p], now), wire);
}

}  // namespace fastee::sched
