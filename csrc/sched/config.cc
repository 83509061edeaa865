#include <cmath>
#include <stdexcept>

#include "sched/policy.h"
#include "sched/types.h"

namespace fastee::sched {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument("Scheduler: " + text); }

void check_int(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) + ", got " + std::to_string(value));
}

void check_array(const char* name, const std::vector<double>& values, size_t size, double low) {
  if (values.size() != size)
    fail(std::string(name) + " must hold " + std::to_string(size) + " numbers, got " + std::to_string(values.size()));
  for (size_t i = 0; i < size; ++i)
    if (!std::isfinite(values[i]) || values[i] < low)
      fail(std::string(name) + " must be finite and >= " + std::to_string(low) + ", got " + std::to_string(values[i]) + " at " +
           std::to_string(i));
}

void check_double(const char* name, double value, double low, double high) {
  if (!(value >= low && value <= high))
    fail(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) + ", got " + std::to_string(value));
}

// Only the numbers that the chosen policy reads.
void check_params(const Config& c) {
  const Params& p = c.params;
  const int64_t k = c.segments - 1;
  if (c.policy == "patience") check_int("patience", p.patience, 1, 1024);
  if (c.policy == "distree") {
    if (static_cast<int64_t>(p.delta.size()) != k) fail("delta must hold " + std::to_string(k) + " numbers, got " + std::to_string(p.delta.size()));
    for (double d : p.delta) check_double("delta", d, 0.0, kInf);
  }
  if (c.policy == "mdi_exit") {
    check_int("adapt", p.adapt, 0, 2);
    check_int("t_o", p.t_o, 0, int64_t{1} << 40);
    check_int("t_q1", p.t_q1, 0, int64_t{1} << 40);
    check_int("t_q2", p.t_q2, p.t_q1 + 1, int64_t{1} << 40);
    check_int("q_max", p.q_max, 1, int64_t{1} << 40);
    check_int("takeover", p.takeover, 1, int64_t{1} << 40);
    if (!(0 < p.b && p.b < p.a && p.a < 1)) fail("0 < b < a < 1 must hold, got a " + std::to_string(p.a) + ", b " + std::to_string(p.b));
    check_double("z", p.z, 1e-9, 1.0);
    check_double("period", p.period, 1e-6, 1e6);
    check_double("t_min", p.t_min, 1e-9, 1.0);
    check_double("t_max", p.t_max, p.t_min, 1e9);
    check_double("mu_min", p.mu_min, 1e-9, 1e6);
    check_double("mu_max", p.mu_max, p.mu_min, 1e6);
    check_double("mu", p.mu, p.mu_min, p.mu_max);
    check_double("weight", p.weight, 1e-6, 1.0);
    check_double("report_age", p.report_age, 0.0, 1e6);
  }
  if (c.policy == "dimee") {
    check_double("alpha", p.alpha, 0.0, kInf);
    if (p.tiers.size() != 3) fail("tiers must name three nodes, got " + std::to_string(p.tiers.size()));
    for (int64_t t : p.tiers) check_int("tiers", t, 0, c.nodes - 1);
    if (p.cuts.size() != 2) fail("cuts must name two exits, got " + std::to_string(p.cuts.size()));
    check_int("cuts[0]", p.cuts[0], 0, k - 1);
    check_int("cuts[1]", p.cuts[1], p.cuts[0] + 1, k - 1);
  }
  if (c.policy == "splitee") {
    check_double("alpha", p.alpha, 0.0, kInf);
    check_double("layer_cost", p.layer_cost, 0.0, 1e6);
    check_double("offload_cost", p.offload_cost, 0.0, 1e6);
    check_double("explore", p.explore, 0.0, 1e6);
    check_int("cloud", p.cloud, 0, c.nodes - 1);
  }
  if (c.policy == "daisy") {
    check_int("range", p.range, 0, 2);
    check_double("u_threshold", p.u_threshold, -kInf, kInf);
    check_double("inf_threshold", p.inf_threshold, 0.0, 1.0);
    if (static_cast<int64_t>(p.counts.size()) != k + 1)
      fail("counts must hold " + std::to_string(k + 1) + " numbers, got " + std::to_string(p.counts.size()));
    for (int64_t n : p.counts) check_int("counts", n, 0, int64_t{1} << 40);
  }
}

}  // namespace

void Config::check() const {
  check_int("segments", segments, 1, 1024);
  check_int("nodes", nodes, 1, 1024);
  check_int("codecs", codecs, 1, 64);
  check_int("batch_sizes (count)", static_cast<int64_t>(batch_sizes.size()), 1, 64);
  for (size_t i = 0; i < batch_sizes.size(); ++i)
    check_int("batch_sizes (rising)", batch_sizes[i], i == 0 ? 1 : batch_sizes[i - 1] + 1, int64_t{1} << 30);
  const size_t s = segments, n = nodes, nb = batch_sizes.size(), nc = codecs, k = s - 1;
  check_array("mean", mean, s * n * nb, 0.0);
  check_array("spread", spread, s * n * nb, 0.0);
  check_array("wire_bytes", wire_bytes, s * nc, 0.0);
  check_array("codec_seconds", codec_seconds, s * nc, 0.0);
  check_array("bandwidth", bandwidth, n * n, 0.0);
  check_array("delay", delay, n * n, 0.0);
  if (bins != 0 || !gain.empty()) {
    check_int("bins", bins, 1, 1 << 20);
    check_array("gain", gain, k * bins, -1.0);
  }
  if (!std::isfinite(gain_low) || !std::isfinite(gain_high) || !(gain_low < gain_high))
    fail("gain_range must be two finite numbers, low < high");
  if (thresholds.size() != k) fail("thresholds must hold " + std::to_string(k) + " scores, got " + std::to_string(thresholds.size()));
  for (double t : thresholds)
    if (std::isnan(t)) fail("thresholds must not be NaN");
  if (hosts.size() != s * n) fail("hosts must hold " + std::to_string(s * n) + " flags, got " + std::to_string(hosts.size()));
  for (size_t i = 0; i < s; ++i) {
    bool hosted = false;
    for (size_t j = 0; j < n; ++j) hosted |= hosts[i * n + j] != 0;
    if (!hosted) fail("segment " + std::to_string(i) + " has no host");
  }
  if (!medium.empty() && medium.size() != n) fail("medium must hold " + std::to_string(n) + " numbers, got " + std::to_string(medium.size()));
  check_int("deadline", deadline, 1, kNoDeadline);
  check_int("answer_bytes", answer_bytes, 0, int64_t{1} << 50);
  check_int("node", node, 0, nodes - 1);
  check_int("home", home, 0, nodes - 1);
  check_int("max_tasks", max_tasks, 1, int64_t{1} << 24);
  if (!std::isfinite(quantile) || quantile < 0) fail("quantile must be finite and >= 0, got " + std::to_string(quantile));
  if (!std::isfinite(cost_weight) || cost_weight < 0) fail("cost_weight must be finite and >= 0, got " + std::to_string(cost_weight));
  if (!(max_drop >= 0)) fail("max_drop must be >= 0, got " + std::to_string(max_drop));
  if (!std::isfinite(weight) || weight < 0) fail("weight must be finite and >= 0, got " + std::to_string(weight));
  check_int("classes (count)", static_cast<int64_t>(classes.size()), 0, 15);
  for (const TenantClass& c : classes) {
    check_int("classes: deadline", c.deadline, 1, kNoDeadline);
    if (!std::isfinite(c.quantile) || c.quantile < 0) fail("classes: quantile must be finite and >= 0, got " + std::to_string(c.quantile));
    if (!std::isfinite(c.weight) || c.weight < 0) fail("classes: weight must be finite and >= 0, got " + std::to_string(c.weight));
  }
  if (!surcharge.empty()) check_array("surcharge", surcharge, n, 0.0);
  if (!send_ns.empty()) check_array("send_ns", send_ns, n, 0.0);
  if (!known_policy(policy)) fail("policy must be one of " + policy_names() + ", got '" + policy + "'");
  if ((policy == "custom") != (custom != nullptr)) fail("policy 'custom' and a custom function belong together");
  check_params(*this);
}

}  // namespace fastee::sched
