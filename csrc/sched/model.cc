#include "sched/model.h"

#include <algorithm>
#include <cmath>

namespace fastee::sched {
namespace {

constexpr int64_t kMaxQueue = int64_t{1} << 40;

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
      classes_(1, {c.deadline, c.quantile, c.weight}),
      time_(static_cast<size_t>(c.segments) * c.nodes),
      rate_(static_cast<size_t>(c.nodes) * c.nodes),
      node_up_(c.nodes, 1),
      link_up_(static_cast<size_t>(c.nodes) * c.nodes),
      queue_(c.nodes, 0),
      medium_(c.nodes),
      media_(c.nodes),
      sent_(c.nodes, 0),
      arrived_(c.nodes, 0),
      reached_(exits, 0),
      accepted_(exits, 0),
      exit_probability_(exits),
      need_(static_cast<size_t>(buckets) * segments * nodes),
      need_sd_(need_.size()),
      togo_(need_.size()),
      run_(need_.size()),
      there_(need_.size()),
      onward_(need_.size()),
      wait_(nodes),
      wait_sd_(nodes),
      before_(nodes, 0.0),
      alone_(static_cast<size_t>(segments) * nodes),
      turn_(nodes),
      return_(nodes),
      moves_(static_cast<size_t>(segments) * nodes),
      moved_(moves_.size(), 0),
      new_costs_(moves_.size(), 0),
      eager_(static_cast<int64_t>(segments) * nodes * nodes <= c.eager_limit) {
  list_.reserve(nodes);
  for (int p = 0; p < nodes; ++p) {
    medium_[p] = p;
    for (int q = p; !c.medium.empty() && q-- > 0;)
      if (p != me && q != me && c.medium[q] == c.medium[p]) medium_[p] = q;
    shared_ = shared_ || medium_[p] != p;
  }
  classes_.insert(classes_.end(), c.classes.begin(), c.classes.end());
  costs_.resize(eager_ ? moves_.size() * nodes : nodes);
  nearest_.resize(eager_ ? moves_.size() : 0);
  for (size_t i = 0; i < link_up_.size(); ++i) link_up_[i] = config.bandwidth[i] > 0;
  for (int e = 0; e < exits; ++e) exit_probability_[e] = config.thresholds[e] == kInf ? 0.0 : 0.5;
  refresh_all();
}

int Model::bucket_of(int64_t rows) const {
  int b = 0;
  while (b + 1 < buckets && config.batch_sizes[b] < rows) ++b;
  return b;
}

Model::Move Model::best_move(int s, int a, int b) const {
  Move best;
  if (!reachable(a, b)) return best;
  const size_t link = at(a, b);
  const Estimator& e = rate_[link];
  const double per_byte = 8.0 * kNs / config.bandwidth[link] * e.used_ratio, delay = config.delay[link] * kNs;
  double best_sure = 0.0, best_bytes = 0.0;
  for (int codec = 0; codec < config.codecs; ++codec) {
    const size_t i = static_cast<size_t>(s) * config.codecs + codec;
    const double wire = config.wire_bytes[i] * per_byte;
    const double mean = delay + wire + config.codec_seconds[i] * kNs;
    const double sure = mean + config.quantile * (wire * e.used_root);
    if (codec == 0 || sure < best_sure) {
      best_sure = sure;
      best.mean = mean;
      best.codec = codec;
      best.wire = wire;
      best_bytes = config.wire_bytes[i];
    }
  }
  best.var = e.used_seen * (best.wire * best.wire);
  best.cost = config.send_ns.empty() ? best.mean : best.mean + best_bytes * config.send_ns[a];
  return best;
}

double Model::return_time(int n) const {
  if (n == config.home) return 0.0;
  if (!reachable(n, config.home)) return kInf;
  const size_t link = at(n, config.home);
  const double per_byte = 8.0 * kNs / config.bandwidth[link] * rate_[link].used_ratio;
  return config.delay[link] * kNs + static_cast<double>(config.answer_bytes) * per_byte;
}

// What of a place rests on its own time and on the move there.
void Model::place(int b, int s, int p) {
  const size_t i = row(b, s) + p;
  need_[i] = run_[i] = kInf;
  need_sd_[i] = 0.0;
  if (!hosts(s, p)) return;
  const Spread run = segment_time(s, p, b);
  run_[i] = run.mean * surcharge(p);
  if (p == me) {
    need_[i] = run.mean + return_[p];
    need_sd_[i] = std::sqrt(run.var);
  } else {
    const Move& go = moves_[at(s, p)];
    need_[i] = go.mean + run.mean + return_[p];
    need_sd_[i] = std::sqrt(go.var + run.var);
  }
}

// What rests on the rest of the task: there and togo of one place, from the onward table of the segment after it.
void Model::after(int b, int s, int p) {
  const size_t i = row(b, s) + p;
  there_[i] = run_[i] + (s == exits ? return_[p] : mix(exit_probability_[s], return_[p], onward_[row(b, s + 1) + p]));
  togo_[i] = p == me ? there_[i] : moves_[at(s, p)].cost + there_[i];
}

// Both, of a place of which something has moved; follow() does the second where the tables are eager.
void Model::renew(int s, int p) {
  for (int b = 0; b < buckets; ++b) {
    place(b, s, p);
    if (!eager_) after(b, s, p);
  }
  moved_[at(s, p)] = 1;
}

double Model::onward_of(int b, int s, const double* costs) const {
  const double* there = &there_[row(b, s)];
  double best = kInf;
  for (int p = 0; p < nodes; ++p) {
    const double t = costs[p] + there[p];
    best = t < best ? t : best;
  }
  return best;
}

// C(s, n) for every bucket, from there_ of that segment.
void Model::onward_row(int s, int n) {
  double* costs = eager_ ? &costs_[at(s, n) * nodes] : costs_.data();
  if (!eager_)
    for (int p = 0; p < nodes; ++p) costs[p] = p == n ? 0.0 : best_move(s, n, p).cost;
  for (int b = 0; b < buckets; ++b) onward_[row(b, s) + n] = onward_of(b, s, costs);
}

void Model::renew_nearest(int s, int p) {
  double best = kInf;
  for (int n = 0; n < nodes; ++n)
    if (n != p) best = std::min(best, costs_[at(s, n) * nodes + p]);
  nearest_[at(s, p)] = best;
}

void Model::rebuild_level(int s) {
  for (int b = 0; b < buckets; ++b)
    for (int p = 0; p < nodes; ++p) after(b, s, p);
  for (int n = 0; n < nodes && s > 0; ++n) onward_row(s, n);
}

void Model::rebuild_step() {
  if (level_ < 0) return;
  ++version_;
  rebuild_level(level_--);
}

// The same tables as a rebuild, from the marks of what moved: a new estimate of one segment on one node mostly moves no minimum of
// the segment before, and the walk ends there.
void Model::follow(int from) {
  ++version_;
  if (!eager_) {
    level_ = std::max(level_, from);
    return;
  }
  constexpr size_t kFew = 8;  // of more, every minimum is made anew
  for (int s = from; s >= 0; --s) {
    list_.clear();
    for (int p = 0; p < nodes; ++p)
      if (moved_[at(s, p)]) {
        moved_[at(s, p)] = 0;
        list_.push_back(p);
      }
    if (list_.empty() && !any_costs_) continue;
    const bool many = list_.size() > kFew;
    for (int b = 0; b < buckets; ++b) {
      double was[kFew], is[kFew], least[kFew];  // there_ of the places; least: of a way over them, from elsewhere
      for (size_t i = 0; i < list_.size(); ++i) {
        const int p = list_[i];
        const double before = there_[row(b, s) + p];
        after(b, s, p);
        if (many) continue;
        was[i] = before;
        is[i] = there_[row(b, s) + p];
        least[i] = nearest_[at(s, p)] + std::min(was[i], is[i]);
      }
      for (int n = 0; n < nodes && s > 0; ++n) {
        double& onward = onward_[row(b, s) + n];
        const double* costs = &costs_[at(s, n) * nodes];
        bool again = many || (any_costs_ && new_costs_[at(s, n)]);
        double best = kInf;
        for (size_t i = 0; !many && i < list_.size(); ++i) {
          if (least[i] > onward && list_[i] != n) continue;  // neither was nor is the best: its row of costs_ need not be fetched
          const double cost = costs[list_[i]];
          again = again || cost + was[i] == onward;
          best = std::min(best, cost + is[i]);
        }
        if (best > onward && !again) continue;
        if (many || best > onward || (any_costs_ && new_costs_[at(s, n)])) best = onward_of(b, s, costs);
        if (best == onward) continue;
        onward = best;
        moved_[at(s - 1, n)] = 1;
      }
    }
    if (any_costs_) std::fill_n(&new_costs_[at(s, 0)], nodes, uint8_t{0});
  }
  any_costs_ = false;
}

void Model::refresh_all() {
  for (int n = 0; n < nodes; ++n) return_[n] = return_time(n);
  for (int s = 0; s < segments; ++s)
    for (int b = 0; b < nodes; ++b) {
      if (b != me) moves_[at(s, b)] = best_move(s, me, b);
      for (int a = 0; eager_ && a < nodes; ++a) costs_[at(s, a) * nodes + b] = a == b ? 0.0 : best_move(s, a, b).cost;
      if (eager_) renew_nearest(s, b);
      for (int k = 0; k < buckets; ++k) place(k, s, b);
      renew_alone(s, b);
    }
  for (int s = exits; s >= 0; --s) rebuild_level(s);
  for (int n = 0; n < nodes; ++n) refresh_wait(n);
}

void Model::refresh_times(int s, int n) {
  renew(s, n);
  follow(s);
  renew_alone(s, n);
  refresh_wait(n);
}

void Model::refresh_link(int a, int b) {
  if (b == config.home) return_[a] = return_time(a);
  for (int s = 0; s < segments && a != b; ++s) {
    const bool mine = a == me;
    if (!eager_ && !mine) break;
    const Move move = best_move(s, a, b);
    if (mine) moves_[at(s, b)] = move;
    if (eager_) {
      costs_[at(s, a) * nodes + b] = move.cost;
      renew_nearest(s, b);
    }
  }
  for (int s = 0; s < segments; ++s) {
    renew(s, a);
    renew(s, b);
    new_costs_[at(s, a)] = 1;
  }
  any_costs_ = true;
  follow(exits);
}

void Model::refresh_node(int n) {
  for (int a = 0; a < nodes; ++a) {
    if (n == config.home) return_[a] = return_time(a);
    for (int s = 0; s < segments && a != n; ++s) {
      if (!eager_ && a != me) break;
      const Move move = best_move(s, a, n);
      if (a == me) moves_[at(s, n)] = move;
      if (eager_) costs_[at(s, a) * nodes + n] = move.cost;
    }
  }
  for (int s = 0; s < segments && eager_; ++s) renew_nearest(s, n);
  for (int s = 0; s < segments; ++s)
    for (int p = 0; p < nodes; ++p) {
      if (p == n || n == config.home) renew(s, p);
      moved_[at(s, p)] = new_costs_[at(s, p)] = 1;
    }
  any_costs_ = true;
  follow(exits);
}

void Model::renew_alone(int s, int n) {
  alone_[static_cast<size_t>(n) * segments + s] = config.hosts[at(s, n)] ? segment_time(s, n, 0) : Spread{0.0, 0.0};
}

void Model::refresh_wait(int n) {
  double total = 0.0, total_var = 0.0, hosted = 0.0;
  for (int s = 0; s < segments; ++s)
    if (config.hosts[at(s, n)]) {
      const Spread run = alone_[static_cast<size_t>(n) * segments + s];
      total += run.mean;
      total_var += run.var;
      hosted += 1.0;
    }
  turn_[n] = hosted > 0 ? Spread{total / hosted, total_var / hosted} : Spread{0.0, 0.0};
  refresh_queue(n);
}

void Model::refresh_queue(int n) {
  ++version_;
  const double length = static_cast<double>(queue_[n]);
  wait_[n] = length * turn_[n].mean;
  wait_sd_[n] = std::sqrt(length * turn_[n].var);
}

bool Model::rebatch_pays(int s, int64_t rows, int64_t others, int64_t merge_ns) const {
  if (s < 0 || s >= segments || rows <= 0 || others <= 0) return false;
  const double apart = expected(s, me, rows) + expected(s, me, others), together = expected(s, me, rows + others);
  return (apart - together) * time_[at(s, me)].used_ratio > static_cast<double>(merge_ns);
}

StatsRecord Model::stats_record(int exit, const Sample& x) const {
  return {x.confidence, exit >= 0 ? config.thresholds[exit] : kNone, x.max_prob, x.margin, x.entropy, x.lse, x.gate, x.delta, x.label, exit};
}

NodeRecord Model::node_record(int bucket, int s, int p, int64_t now, double rounds, double z, double slack, bool idle) const {
  const double t = time_at(bucket, s, p, now, rounds, z);
  const double end = togo_[row(bucket, s) + p] + (wait_[p] + delay_at(s, p, now, rounds));
  return {t / kNs, end / kNs, wait_[p] / kNs, p, p == me, t <= slack && t < kInf, queue_[p], p == me && idle, kRunAction + p};
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

bool Model::observe(int s, int n, int64_t batch, int64_t duration) {
  const bool known = s >= 0 && s < segments && n >= 0 && n < nodes;
  const double expect = known ? expected(s, n, batch) : 0.0;
  if (!(expect > 0) || duration <= 0 || batch <= 0) {
    ++counters.ignored;
    return false;
  }
  if (time_[at(s, n)].update(static_cast<double>(duration) / expect, counters)) refresh_times(s, n);
  return true;
}

bool Model::observe_link(int src, int dst, int64_t nbytes, int64_t duration) {
  if (src < 0 || src >= nodes || dst < 0 || dst >= nodes || nbytes < 0) {
    ++counters.ignored;
    return false;
  }
  const double bandwidth = config.bandwidth[at(src, dst)], delay = config.delay[at(src, dst)] * kNs;
  const double wire = bandwidth > 0 && src != dst ? static_cast<double>(nbytes) * 8.0 * kNs / bandwidth : 0.0;
  if (duration <= 0 || !(wire > 0) || wire < 0.25 * delay) {  // a short message tells the delay, not the rate
    ++counters.ignored;
    return duration > 0 && bandwidth > 0 && src != dst;
  }
  if (rate_[at(src, dst)].update((static_cast<double>(duration) - delay) / wire, counters)) refresh_link(src, dst);
  return true;
}

bool Model::observe_queue(int n, int64_t length, int64_t out_length) {
  if (n < 0 || n >= nodes || length < 0 || length > kMaxQueue || out_length < 0) {
    ++counters.ignored;
    return false;
  }
  if (queue_[n] == length) return true;  // reports mostly say nothing new
  queue_[n] = length;
  refresh_queue(n);
  return true;
}

void Model::set_node_up(int n, bool up) {
  if (n < 0 || n >= nodes || static_cast<bool>(node_up_[n]) == up) return;
  node_up_[n] = up;
  refresh_node(n);
}

void Model::set_link_up(int src, int dst, bool up) {
  if (src < 0 || src >= nodes || dst < 0 || dst >= nodes) return;
  up = up && config.bandwidth[at(src, dst)] > 0;
  if (static_cast<bool>(link_up_[at(src, dst)]) == up) return;
  link_up_[at(src, dst)] = up;
  refresh_link(src, dst);
}

void Model::renew_exit(int exit) {
  const double p = (static_cast<double>(accepted_[exit]) + 1.0) / (static_cast<double>(reached_[exit]) + 2.0);
  if (std::fabs(p - exit_probability_[exit]) <= Estimator::kPublishChange) return;
  exit_probability_[exit] = p;
  for (int n = 0; n < nodes; ++n) moved_[at(exit, n)] = 1;
  follow(exit);
}

void Model::renew_before(int64_t now) {
  ++before_version_;
  int64_t until = kInt64Min;
  for (int p = 0; p < nodes; ++p) {
    const Medium& m = media_[p];
    before_[p] = p == me ? 0.0 : link_wait(p, now);
    until = std::max({until, m.busy_until, m.watched < 0 ? kInt64Min : add_saturated(m.due, Medium::kForgotten)});
  }
  busy_until_ = now > until ? until : kInt64Max;  // before_ must be 0 already
}

void Model::watch(int p, int64_t wire, int64_t now) {
  Medium& m = media_[medium_[p]];
  if (m.watched >= 0 && subtract_saturated(now, m.due) > Medium::kForgotten) {
    arrived_[m.watched] = sent_[m.watched] - (m.watched == p);
    m.watched = -1;
  }
  m.last = add_saturated(now, wire);
  if (m.watched >= 0) {
    m.after = add_saturated(m.after, wire);
  } else {
    m.watched = p, m.number = sent_[p], m.due = m.busy_until, m.after = 0;
  }
}

void Model::unwatch(int p, int64_t wire) {
  Medium& m = media_[medium_[p]];
  m.last = std::min(m.last, m.busy_until);
  if (m.watched == p && m.number > sent_[p])
    m.watched = -1;
  else
    m.after = std::max<int64_t>(0, subtract_saturated(m.after, wire));
}

void Model::arrived(int p, int64_t now) {
  told_ = true;
  if (arrived_[p] >= sent_[p]) return;
  ++arrived_[p];
  Medium& m = media_[medium_[p]];
  if (m.watched != p || arrived_[p] < m.number) return;
  m.watched = -1;
  m.busy_until = std::max(add_saturated(subtract_saturated(now, delay_ns(p)), m.after), m.last);
  before_now_ = kUnknown;
  busy_until_ = kInt64Max;
}

TaskRecord task_record(const Model& m, const Tasks& t, int64_t slot, double slack, double weight) {
  return {slack / kNs, weight, t[slot].segment, m.exits, t[slot].best, t[slot].pool, t[slot].tenant};
}

}  // namespace fastee::sched
