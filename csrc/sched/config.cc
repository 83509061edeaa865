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
  check_int("deadline", deadline, 1, kNoDeadline);
  check_int("answer_bytes", answer_bytes, 0, int64_t{1} << 50);
  check_int("node", node, 0, nodes - 1);
  check_int("home", home, 0, nodes - 1);
  check_int("max_tasks", max_tasks, 1, int64_t{1} << 24);
  if (!std::isfinite(quantile) || quantile < 0) fail("quantile must be finite and >= 0, got " + std::to_string(quantile));
  if (!std::isfinite(cost_weight) || cost_weight < 0) fail("cost_weight must be finite and >= 0, got " + std::to_string(cost_weight));
  if (!(max_drop >= 0)) fail("max_drop must be >= 0, got " + std::to_string(max_drop));
  if (find_policy(policy) == nullptr) fail("policy must be one of " + policy_names() + ", got '" + policy + "'");
}

}  // namespace fastee::sched
