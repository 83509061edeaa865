#include "plan/pipeline.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastee::plan {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("plan: " + what); }

void check_int(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) + ", got " + std::to_string(value));
}

void check_array(const char* name, const std::vector<double>& values, size_t size, double high, bool infinite = false) {
  if (values.size() != size) fail(std::string(name) + " must hold " + std::to_string(size) + " numbers, got " + std::to_string(values.size()));
  for (size_t i = 0; i < size; ++i)
    if (!(values[i] >= 0) || values[i] > high || (!infinite && std::isinf(values[i])))
      fail(std::string(name) + " must be " + (infinite ? "" : "finite and ") + ">= 0" + (high < kInf ? " and <= " + std::to_string(high) : "") +
           ", got " + std::to_string(values[i]) + " at " + std::to_string(i));
}

// share * a + (1 - share) * b, also where one of them is infinite and has no weight.
double mix(double share, double a, double b) { return share <= 0 ? b : share >= 1 ? a : share * a + (1.0 - share) * b; }

double weighted(double weight, double value) { return weight > 0 ? weight * value : 0.0; }

}  // namespace

void Problem::check() const {
  check_int("segments", segments, 1, 1024);
  check_int("nodes", nodes, 1, 1024);
  check_int("codecs", codecs, 1, 64);
  check_int("source", source, 0, nodes - 1);
  check_int("max_width", max_width, 1, 1 << 20);
  const size_t s = segments, n = nodes, nc = codecs, k = s - 1;
  check_array("run", run, s * n, kInf, true);
  check_array("head", head, k * n, kInf);
  check_array("wire_bytes", wire_bytes, s * nc, kInf);
  check_array("codec_seconds", codec_seconds, s * nc, kInf);
  check_array("bandwidth", bandwidth, n * n, kInf);
  check_array("delay", delay, n * n, kInf);
  check_array("leave", leave, k, 1.0);
  check_array("loss", loss, k, 1.0);
  check_array("memory", memory, s, kInf);
  check_array("room", room, n, kInf, true);
  check_array("price", price, n, kInf);
  check_array("second_price, byte_price, answer_bytes", {second_price, byte_price, answer_bytes}, 3, kInf);
  if (!(deadline > 0)) fail("deadline must be > 0, got " + std::to_string(deadline));
  if (!(max_drop >= 0)) fail("max_drop must be >= 0, got " + std::to_string(max_drop));
}

Pipeline::Pipeline(Problem problem) : p_(std::move(problem)) {
  p_.check();
  const size_t s = p_.segments, n = p_.nodes;
  speed_.assign(n, 1.0);
  per_byte_.resize(n * n);
  per_codec_.resize(n * n);
  fixed_.resize(n * n);
  home_.resize(n);
  value_.resize((s + 1) * n);
  there_.resize(s * n);
  next_.resize(s * n);
  codec_.resize(s * n);
  on_.resize(s * n);
  for (int a = 0; a < p_.nodes; ++a)
    for (int b = 0; b < p_.nodes; ++b) price_link(a, b);
}

void Pipeline::price_link(int a, int b) {
  const size_t i = pair(a, b);
  if (a == b) {
    per_byte_[i] = per_codec_[i] = fixed_[i] = 0.0;
  } else if (p_.bandwidth[i] > 0) {
    const bool cost = p_.objective == Objective::kCost;
    per_byte_[i] = cost ? p_.second_price * 8.0 / p_.bandwidth[i] + p_.byte_price : 8.0 / p_.bandwidth[i];
    per_codec_[i] = cost ? p_.second_price + p_.price[a] : 1.0;
    fixed_[i] = cost ? p_.second_price * p_.delay[i] : p_.delay[i];
  } else {
    per_byte_[i] = per_codec_[i] = 0.0;
    fixed_[i] = kInf;
  }
  if (b == p_.source) home_[a] = a == b ? 0.0 : fixed_[i] + per_byte_[i] * p_.answer_bytes;
}

void Pipeline::set_link(int src, int dst, double bandwidth, double delay) {
  p_.bandwidth[pair(src, dst)] = bandwidth;
  p_.delay[pair(src, dst)] = delay;
  price_link(src, dst);
}

void Pipeline::set_speed(int node, double factor) {
  const double change = factor / speed_[node];
  for (int s = 0; s < p_.segments; ++s) p_.run[at(s, node)] *= change;
  for (int k = 0; k + 1 < p_.segments; ++k) p_.head[at(k, node)] *= change;
  speed_[node] = factor;
}

void Pipeline::set_leave(int exit, double share) { p_.leave[exit] = share; }

bool Pipeline::recurse(Placement& out) {
  const int segments = p_.segments, nodes = p_.nodes, codecs = p_.codecs, exits = segments - 1;
  const bool cost = p_.objective == Objective::kCost;
  for (int n = 0; n < nodes; ++n) value_[at(segments, n)] = home_[n];
  for (int s = segments - 1; s >= 0; --s) {
    double* there = &there_[at(s, 0)];
    const double* onward = &value_[at(s + 1, 0)];
    for (int p = 0; p < nodes; ++p) {
      const double rate = cost ? p_.second_price + p_.price[p] : 1.0;
      double rest = onward[p];
      if (s < exits) {
        const double leave = p_.leave[s];
        const double off = rest, on = leave > 0 ? rate * p_.head[at(s, p)] + mix(leave, home_[p], rest) : kInf;
        const bool use = leave > 0 && (!p_.choose_exits || on < off);
        on_[at(s, p)] = use;
        if (use) rest = on;
      }
      there[p] = std::isinf(p_.run[at(s, p)]) ? kInf : rate * p_.run[at(s, p)] + rest;
    }
    const double* bytes = &p_.wire_bytes[static_cast<size_t>(s) * codecs];
    const double* packing = &p_.codec_seconds[static_cast<size_t>(s) * codecs];
    for (int n = 0; n < nodes; ++n) {
      double best = there[n];
      int to = n, with = 0;
      const double* fixed = &fixed_[pair(n, 0)];
      const double* per_byte = &per_byte_[pair(n, 0)];
      const double* per_codec = &per_codec_[pair(n, 0)];
      for (int p = 0; p < nodes; ++p) {
        const double base = fixed[p] + there[p];
        if (p == n || base >= best) continue;
        for (int c = 0; c < codecs; ++c) {
          const double t = fixed[p] + (per_byte[p] * bytes[c] + per_codec[p] * packing[c]) + there[p];
          if (t < best) {
            best = t;
            to = p;
            with = c;
          }
        }
      }
      value_[at(s, n)] = best;
      next_[at(s, n)] = to;
      codec_[at(s, n)] = static_cast<uint8_t>(with);
    }
  }
  out.place.resize(segments);
  out.codec.resize(segments);
  out.on.resize(exits);
  out.value = out.bound = value_[at(0, p_.source)];
  out.states = 0;
  out.found = out.exact = out.value < kInf;
  int n = p_.source;
  for (int s = 0; s < segments; ++s) {
    const int p = next_[at(s, n)];
    out.place[s] = p;
    out.codec[s] = p == n ? -1 : codec_[at(s, n)];
    if (s < exits) out.on[s] = on_[at(s, p)];
    n = p;
  }
  return out.found;
}

double Pipeline::value_of(const Placement& plan) const {
  const int last = p_.segments - 1;
  const bool cost = p_.objective == Objective::kCost;
  double value = home_[plan.place[last]];
  for (int s = last; s >= 0; --s) {
    const int p = plan.place[s], from = s > 0 ? plan.place[s - 1] : p_.source;
    const double rate = cost ? p_.second_price + p_.price[p] : 1.0;
    if (s < last && plan.on[s]) value = rate * p_.head[at(s, p)] + mix(p_.leave[s], home_[p], value);
    value = std::isinf(p_.run[at(s, p)]) ? kInf : rate * p_.run[at(s, p)] + value;
    if (p != from) {
      const size_t i = pair(from, p), c = static_cast<size_t>(s) * p_.codecs + plan.codec[s];
      value = fixed_[i] + (per_byte_[i] * p_.wire_bytes[c] + per_codec_[i] * p_.codec_seconds[c]) + value;
    }
  }
  return value;
}

double Pipeline::move_seconds(int s, int a, int b, int c) const {
  if (a == b) return 0.0;
  if (!(p_.bandwidth[pair(a, b)] > 0)) return kInf;
  const size_t i = static_cast<size_t>(s) * p_.codecs + c;
  return p_.delay[pair(a, b)] + (8.0 / p_.bandwidth[pair(a, b)] * p_.wire_bytes[i] + p_.codec_seconds[i]);
}

double Pipeline::move_cost(int s, int a, int b, int c) const {
  const size_t i = static_cast<size_t>(s) * p_.codecs + c;
  return a == b ? 0.0 : p_.second_price * move_seconds(s, a, b, c) + p_.price[a] * p_.codec_seconds[i] + p_.byte_price * p_.wire_bytes[i];
}

double Pipeline::home_seconds(int n) const {
  if (n == p_.source) return 0.0;
  const size_t i = pair(n, p_.source);
  return p_.bandwidth[i] > 0 ? p_.delay[i] + 8.0 / p_.bandwidth[i] * p_.answer_bytes : kInf;
}

double Pipeline::home_cost(int n) const {
  return n == p_.source ? 0.0 : p_.second_price * home_seconds(n) + p_.byte_price * p_.answer_bytes;
}

Account Pipeline::account(const Placement& plan) const {
  const int last = p_.segments - 1;
  Account a;
  a.reach.resize(p_.segments);
  a.memory.assign(p_.nodes, 0.0);
  std::vector<double> load(p_.nodes, 0.0), answers(p_.nodes, 0.0), links(static_cast<size_t>(p_.nodes) * p_.nodes, 0.0);
  double weight = 1.0;
  a.seconds = a.cost = a.bottleneck = 0.0;
  int n = p_.source;
  for (int s = 0; s <= last; ++s) {
    const int p = plan.place[s];
    a.reach[s] = weight;
    a.memory[p] += p_.memory[s];
    if (p != n) {
      const double seconds = move_seconds(s, n, p, plan.codec[s]);
      const size_t i = static_cast<size_t>(s) * p_.codecs + plan.codec[s];
      a.bytes += weight * p_.wire_bytes[i];
      a.seconds += weighted(weight, seconds);
      a.cost += weighted(weight, move_cost(s, n, p, plan.codec[s]));
      links[pair(n, p)] += weighted(weight, seconds - (std::isinf(seconds) ? 0.0 : p_.delay[pair(n, p)]));
    }
    const double run = p_.run[at(s, p)];
    load[p] += weighted(weight, run);
    a.seconds += weighted(weight, run);
    a.cost += weighted(weight, (p_.second_price + p_.price[p]) * run);
    double leaving = weight;
    if (s < last) {
      leaving = plan.on[s] ? weight * p_.leave[s] : 0.0;
      if (plan.on[s]) {
        const double head = p_.head[at(s, p)];
        load[p] += weight * head;
        a.seconds += weight * head;
        a.cost += weight * (p_.second_price + p_.price[p]) * head;
        a.drop += leaving * p_.loss[s];
      }
    }
    if (leaving > 0 && p != p_.source) {
      const double seconds = home_seconds(p);
      a.bytes += leaving * p_.answer_bytes;
      a.seconds += weighted(leaving, seconds);
      a.cost += weighted(leaving, home_cost(p));
      answers[p] += weighted(leaving, seconds - (std::isinf(seconds) ? 0.0 : p_.delay[pair(p, p_.source)]));
    }
    if (s < last && plan.on[s]) weight *= 1.0 - p_.leave[s];
    n = p;
  }
  for (double t : load) a.bottleneck = std::max(a.bottleneck, t);
  for (double t : links) a.bottleneck = std::max(a.bottleneck, t);
  for (double t : answers) a.bottleneck = std::max(a.bottleneck, t);
  a.value = p_.objective == Objective::kThroughput ? a.bottleneck : value_of(plan);
  return a;
}

bool Pipeline::fits(const Placement& plan) const {
  const int last = p_.segments - 1;
  for (int n = 0; n < p_.nodes; ++n) {
    if (std::isinf(p_.room[n])) continue;
    double used = 0.0;
    for (int s = 0; s <= last; ++s)
      if (plan.place[s] == n) used += p_.memory[s];
    if (used > p_.room[n]) return false;
  }
  if (p_.max_drop < 1.0) {
    double weight = 1.0, drop = 0.0;
    for (int k = 0; k < last; ++k)
      if (plan.on[k]) {
        drop += weight * p_.leave[k] * p_.loss[k];
        weight *= 1.0 - p_.leave[k];
      }
    if (drop > p_.max_drop) return false;
  }
  if (std::isinf(p_.deadline)) return true;
  return (p_.objective == Objective::kLatency ? value_of(plan) : account(plan).seconds) <= p_.deadline;
}

// Segment by segment, all partial plans that no other one dominates and whose bound beats the best plan in hand. When none had to be
// dropped for want of room the answer is the optimum; else the least bound among the dropped limits what was missed.
struct Pipeline::Search {
  struct Partial {
    double weight = 1.0;  // share of tasks still inside
    double spent = 0.0, seconds = 0.0, drop = 0.0;
    double closed = 0.0, load = 0.0, answers = 0.0, stage_memory = 0.0;  // throughput: finished stages and links; the open stage
    double bound = 0.0;
    int parent = -1, node = 0, codec = -1;
    uint8_t on = 0;
  };

  const Pipeline& tables;
  const Problem& p;
  const bool stages;       // throughput: contiguous stages on distinct nodes
  const bool with_memory, with_deadline, with_drop, all_codecs;
  const size_t words;
  std::vector<double> time_togo;          // [S + 1, N] least expected seconds from there
  std::vector<double> fresh, leaving;     // throughput, per task: least bottleneck of a new stage at (s, p); after closing one at (s, p)
  std::vector<std::vector<Partial>> layers;
  std::vector<double> used, used_next;    // [width, N] memory taken, where nodes may be visited again
  std::vector<uint64_t> seen, seen_next;  // [width, words] nodes that held a stage
  double best = kInf, dropped = kInf;
  std::vector<int> best_place, best_codec;
  std::vector<uint8_t> best_on;
  int64_t states = 0;

  explicit Search(const Pipeline& t)
      : tables(t),
        p(t.p_),
        stages(p.objective == Objective::kThroughput),
        with_memory(std::any_of(p.room.begin(), p.room.end(), [](double r) { return r < kInf; })),
        with_deadline(p.deadline < kInf && p.objective != Objective::kLatency),
        with_drop(p.max_drop < 1.0),
        all_codecs(with_deadline && p.objective == Objective::kCost),
        words((static_cast<size_t>(p.nodes) + 63) / 64) {
    if (with_deadline) {
      Problem time = p;
      time.objective = Objective::kLatency;
      Pipeline relaxed(std::move(time));
      Placement ignored;
      relaxed.recurse(ignored);
      time_togo = relaxed.value_;
    }
    if (stages) bound_stages();
  }

  double link(int s, int a, int b, int c) const {
    const double seconds = tables.move_seconds(s, a, b, c);
    return std::isinf(seconds) ? kInf : seconds - p.delay[tables.pair(a, b)];
  }
  double best_link(int s, int a, int b, int* codec) const {
    double least = kInf;
    *codec = 0;
    for (int c = 0; c < p.codecs; ++c)
      if (const double t = link(s, a, b, c); t < least) {
        least = t;
        *codec = c;
      }
    return least;
  }
  double answer_link(int n) const {
    if (n == p.source) return 0.0;
    const double seconds = tables.home_seconds(n);
    return std::isinf(seconds) ? kInf : seconds - p.delay[tables.pair(n, p.source)];
  }
  // What an exit must add to a stage and leaves inside at best.
  double least_head(int s, int n) const { return s + 1 < p.segments && !p.choose_exits && p.leave[s] > 0 ? p.head[tables.at(s, n)] : 0.0; }
  double least_inside(int s) const { return s + 1 < p.segments ? 1.0 - p.leave[s] : 1.0; }

  void bound_stages() {
    const int segments = p.segments, nodes = p.nodes;
    fresh.assign(static_cast<size_t>(segments) * nodes, kInf);
    leaving.assign((static_cast<size_t>(segments) + 1) * nodes, kInf);
    for (int n = 0; n < nodes; ++n)
      if (answer_link(n) < kInf) leaving[tables.at(segments, n)] = 0.0;
    for (int s = segments - 1; s >= 0; --s) {
      for (int n = 0; n < nodes; ++n) fresh[tables.at(s, n)] = open_bound(s, n, false, 0.0, 1.0, 0.0);
      for (int n = 0; n < nodes; ++n) {
        double least = kInf;
        for (int q = 0; q < nodes; ++q) {
          const double there = fresh[tables.at(s, q)];
          if (q == n || there >= least) continue;
          int codec;
          least = std::min(least, std::max(there, best_link(s, n, q, &codec)));
        }
        leaving[tables.at(s, n)] = least;
      }
    }
  }

  // Least bottleneck that a stage on n with this load, before segment s, can still end with; nodes may repeat in the rest. A stage
  // that is not open yet must take segment s.
  double open_bound(int s, int n, bool open, double load, double weight, double memory) const {
    double least = open ? std::max(load, weighted(weight, leaving[tables.at(s, n)])) : kInf;
    for (int e = s; e < p.segments; ++e) {
      const double run = p.run[tables.at(e, n)];
      memory += p.memory[e];
      if ((std::isinf(run) && weight > 0) || memory > p.room[n]) break;
      load += weighted(weight, run + least_head(e, n));
      weight *= least_inside(e);
      if (load >= least) break;
      least = std::min(least, std::max(load, weighted(weight, leaving[tables.at(e + 1, n)])));
    }
    return least;
  }

  bool dominated(const Partial& c, const std::vector<Partial>& kept, const std::vector<int>& same, const double* memory, const uint64_t* nodes_seen) const {
    for (int i : same) {
      const Partial& k = kept[i];
      if (k.weight > c.weight || k.spent > c.spent || (with_deadline && k.seconds > c.seconds) || (with_drop && k.drop > c.drop)) continue;
      if (stages) {
        if (k.closed > c.closed || k.load > c.load || k.answers > c.answers || k.stage_memory > c.stage_memory) continue;
        bool subset = true;
        for (size_t w = 0; w < words && subset; ++w) subset = (seen_next[i * words + w] & ~nodes_seen[w]) == 0;
        if (!subset) continue;
      } else if (with_memory) {
        bool less = true;
        for (int n = 0; n < p.nodes && less; ++n) less = std::isinf(p.room[n]) || used_next[static_cast<size_t>(i) * p.nodes + n] <= memory[n];
        if (!less) continue;
      }
      return true;
    }
    return false;
  }

  void grow(const Partial& from, int parent, int s, std::vector<Partial>& out) const {
    const bool last = s + 1 == p.segments;
    const uint64_t* visited = stages ? &seen[static_cast<size_t>(parent) * words] : nullptr;
    for (int n = 0; n < p.nodes; ++n) {
      const double run = p.run[tables.at(s, n)];
      if (std::isinf(run) && from.weight > 0) continue;
      const bool started = stages && (visited[n / 64] >> (n % 64) & 1) != 0;
      const bool stay = n == from.node;
      if (stages && started && !stay) continue;
      if (with_memory) {
        const double before = stages ? (stay && started ? from.stage_memory : 0.0) : used[static_cast<size_t>(parent) * p.nodes + n];
        if (before + p.memory[s] > p.room[n]) continue;
      }
      int first = -1, end = 0;
      if (!stay) {
        first = 0;
        end = p.codecs;
        if (!all_codecs) {
          if (stages) {
            best_link(s, from.node, n, &first);
          } else {
            double least = kInf;
            const size_t i = tables.pair(from.node, n);
            for (int c = 0; c < p.codecs; ++c) {
              const size_t j = static_cast<size_t>(s) * p.codecs + c;
              const double t = tables.fixed_[i] + (tables.per_byte_[i] * p.wire_bytes[j] + tables.per_codec_[i] * p.codec_seconds[j]);
              if (t < least) {
                least = t;
                first = c;
              }
            }
          }
          end = first + 1;
        }
        if (from.weight > 0 && !(p.bandwidth[tables.pair(from.node, n)] > 0)) continue;  // nothing crosses behind an exit that answers all
      }
      for (int codec = first; codec < end; ++codec) step(from, parent, s, n, codec, run, last, stay, out);
    }
  }

  void step(const Partial& from, int parent, int s, int n, int codec, double run, bool last, bool stay, std::vector<Partial>& out) const {
    Partial c = from;
    c.parent = parent;
    c.node = n;
    c.codec = codec;
    c.on = 0;
    const double weight = from.weight;
    const double move = stay ? 0.0 : tables.move_seconds(s, from.node, n, codec);
    c.seconds += weighted(weight, move + run);
    if (stages) {
      if (!stay) {
        c.closed = std::max({c.closed, c.load, c.answers, weighted(weight, link(s, from.node, n, codec))});
        c.load = c.answers = c.stage_memory = 0.0;
      }
      c.stage_memory += p.memory[s];
      c.load += weighted(weight, run);
    } else {
      const double rate = p.objective == Objective::kCost ? p.second_price + p.price[n] : 1.0;
      c.spent += weighted(weight, (p.objective == Objective::kCost ? (stay ? 0.0 : tables.move_cost(s, from.node, n, codec)) : move) + rate * run);
    }
    if (last) {
      finish(c, n, weight, 1.0);
      offer(c, s, out);
      return;
    }
    const double leave = p.leave[s];
    if (p.choose_exits || leave == 0) offer(c, s, out);
    if (leave > 0) {
      const double head = p.head[tables.at(s, n)];
      c.on = 1;
      c.seconds += weighted(weight, head);
      if (stages)
        c.load += weighted(weight, head);
      else
        c.spent += weighted(weight, (p.objective == Objective::kCost ? p.second_price + p.price[n] : 1.0) * head);
      c.drop += weight * leave * p.loss[s];
      finish(c, n, weight, leave);
      c.weight = weight * (1.0 - leave);
      offer(c, s, out);
    }
  }

  void finish(Partial& c, int n, double weight, double share) const {
    c.seconds += weighted(weight * share, tables.home_seconds(n));
    if (stages)
      c.answers += weighted(weight * share, answer_link(n));
    else
      c.spent += weighted(weight * share, tables.home_[n]);
  }

  void offer(Partial c, int s, std::vector<Partial>& out) const {
    const bool last = s + 1 == p.segments;
    if (with_drop && c.drop > p.max_drop) return;
    if (with_deadline && c.seconds + (last ? 0.0 : weighted(c.weight, time_togo[tables.at(s + 1, c.node)])) > p.deadline * (1 + 1e-12)) return;
    if (stages)
      c.bound = std::max({c.closed, c.answers, last ? c.load : open_bound(s + 1, c.node, true, c.load, c.weight, c.stage_memory)});
    else
      c.bound = c.spent + (last ? 0.0 : weighted(c.weight, tables.value_[tables.at(s + 1, c.node)]));
    if (c.bound < best) out.push_back(c);
  }

  // True when nothing was dropped that could be better.
  bool pass(int width) {
    const int segments = p.segments, nodes = p.nodes;
    layers.assign(segments + 1, {});
    Partial root;
    root.node = p.source;
    layers[0].push_back(root);
    used.assign(nodes, 0.0);
    seen.assign(words, 0);
    std::vector<Partial> candidates;
    std::vector<int> order;
    std::vector<std::vector<int>> at_node(nodes);
    std::vector<double> memory(nodes);
    std::vector<uint64_t> visited(words);
    for (int s = 0; s < segments; ++s) {
      candidates.clear();
      for (size_t i = 0; i < layers[s].size(); ++i) grow(layers[s][i], static_cast<int>(i), s, candidates);
      states += static_cast<int64_t>(candidates.size());
      order.resize(candidates.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return candidates[x].bound < candidates[y].bound; });
      auto& next = layers[s + 1];
      used_next.clear();
      seen_next.clear();
      for (auto& list : at_node) list.clear();
      for (int i : order) {
        const Partial& c = candidates[i];
        if (c.bound >= best) break;
        if (stages) {
          std::copy_n(&seen[static_cast<size_t>(c.parent) * words], words, visited.begin());
          visited[c.node / 64] |= uint64_t{1} << (c.node % 64);
        } else if (with_memory) {
          std::copy_n(&used[static_cast<size_t>(c.parent) * nodes], nodes, memory.begin());
          memory[c.node] += p.memory[s];
        }
        if (dominated(c, next, at_node[c.node], memory.data(), visited.data())) continue;
        if (static_cast<int>(next.size()) == width) {
          dropped = std::min(dropped, c.bound);
          break;
        }
        if (s + 1 == segments) {  // ordered by bound, which is now the value: the first is the best
          best = c.bound;
          next.push_back(c);
          remember();
          break;
        }
        at_node[c.node].push_back(static_cast<int>(next.size()));
        next.push_back(c);
        if (stages) seen_next.insert(seen_next.end(), visited.begin(), visited.end());
        if (!stages && with_memory) used_next.insert(used_next.end(), memory.begin(), memory.end());
      }
      used.swap(used_next);
      seen.swap(seen_next);
    }
    return dropped >= best;
  }

  void remember() {
    const int segments = p.segments;
    best_place.resize(segments);
    best_codec.resize(segments);
    best_on.resize(segments - 1);
    int i = 0;
    for (int s = segments; s > 0; --s) {
      const Partial& c = layers[s][i];
      best_place[s - 1] = c.node;
      best_codec[s - 1] = c.codec;
      if (s < segments) best_on[s - 1] = c.on;
      i = c.parent;
    }
  }
};

Placement Pipeline::solve() {
  Placement plan;
  const bool reachable = recurse(plan);
  if (p_.objective != Objective::kThroughput) {
    if (!reachable) {
      plan.exact = true;
      return plan;
    }
    if (fits(plan)) return plan;
  }
  Search search(*this);
  const double relaxed = plan.value;
  plan.found = false;
  // Candidates of one layer are up to width * nodes * 2 (* codecs): this holds them to a few hundred thousand.
  const int most = std::max(16, std::min<int>(p_.max_width, static_cast<int>((1 << 18) / (p_.nodes * 2 * (search.all_codecs ? p_.codecs : 1)))));
  bool complete = false;
  for (int width = std::min(64, most);; width = std::min(width * 8, most)) {
    search.dropped = kInf;
    complete = search.pass(width);
    if (complete || width == most) break;
  }
  plan.states = search.states;
  plan.exact = complete;
  plan.found = search.best < kInf;
  if (plan.found) {
    plan.place = search.best_place;
    plan.codec = search.best_codec;
    plan.on = search.best_on;
    plan.value = p_.objective == Objective::kThroughput ? search.best : value_of(plan);
    plan.found = p_.objective != Objective::kLatency || plan.value <= p_.deadline;
  } else {
    plan.value = kInf;
  }
  const double floor = p_.objective == Objective::kThroughput ? 0.0 : relaxed;
  plan.bound = complete ? plan.value : std::max(floor, std::min(search.dropped, plan.value));
  return plan;
}

}  // namespace fastee::plan
