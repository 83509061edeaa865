#include "sim/world.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace fastee::sim {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument("Simulator: " + text); }

void check_size(const char* name, size_t got, size_t want) {
  if (got != want) fail(std::string(name) + " must hold " + std::to_string(want) + " values, got " + std::to_string(got));
}

void check_int(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) + ", got " + std::to_string(value));
}

void check_ints(const char* name, const std::vector<int64_t>& values, size_t size, int64_t low, int64_t high) {
  check_size(name, values.size(), size);
  for (int64_t v : values) check_int(name, v, low, high);
}

void check_number(const char* name, double value, double low, double high) {
  if (!(value >= low && value <= high))
    fail(std::string(name) + " must be in " + std::to_string(low) + ".." + std::to_string(high) + ", got " + std::to_string(value));
}

constexpr int64_t kYear = int64_t{1} << 55;  // ns; no sum of two times overflows
constexpr int64_t kMaxBytes = int64_t{1} << 30;

}  // namespace

void World::check() const {
  check_int("nodes", nodes, 1, 1024);
  check_int("segments", segments, 1, 1024);
  check_int("codecs", codecs, 1, 64);
  check_int("max_batch", max_batch, 1, 4096);
  const size_t n = nodes, s = segments, k = s - 1, tasks = arrival.size();
  check_ints("service", service, n * s * max_batch, 0, kYear);
  check_size("jitter", jitter.size(), n * s);
  for (double v : jitter) check_number("jitter", v, 0.0, 1e6);
  check_ints("batch", batch, n, 1, max_batch);
  check_size("price", price.size(), n);
  for (double v : price) check_number("price", v, 0.0, 1e12);
  check_number("byte_price", byte_price, 0.0, 1e12);
  check_ints("wire_bytes", wire_bytes, s * codecs, 0, kMaxBytes);
  check_ints("codec_ns", codec_ns, s * codecs, 0, kYear);
  check_int("answer_bytes", answer_bytes, 0, kMaxBytes);
  for (const Trace& t : traces) {
    if (t.at.size() < 2 || t.at.size() != t.cum.size() || t.at[0] != 0 || t.cum[0] != 0) fail("trace must start at 0 and have two points");
    for (size_t i = 1; i < t.at.size(); ++i)
      if (t.at[i] <= t.at[i - 1] || t.cum[i] < t.cum[i - 1]) fail("trace must rise in time and never fall in bytes");
    check_int("trace (period)", t.at.back(), 1, kYear);
    check_int("trace (bytes)", t.cum.back(), 1, int64_t{1} << 50);
  }
  for (const Medium& m : media) {
    check_int("medium rate", m.rate, 1, 1'000'000'000'000'000);
    check_int("medium trace", m.trace, -1, static_cast<int64_t>(traces.size()) - 1);
    check_int("medium offset", m.offset, 0, kYear);
  }
  check_size("members", members.size(), n);
  for (size_t i = 0; i < n; ++i) {
    bool self = false;
    for (size_t j = 0; j < members[i].size(); ++j) {
      check_int("members", members[i][j], j == 0 ? 0 : members[i][j - 1] + 1, nodes - 1);
      self |= members[i][j] == static_cast<int>(i);
    }
    if (!self) fail("members of node " + std::to_string(i) + " must hold the node itself");
  }
  for (const Link& l : links) {
    check_int("link source", l.source, 0, nodes - 1);
    check_int("link target", l.target, 0, nodes - 1);
    if (l.source == l.target) fail("link must join two nodes, got " + std::to_string(l.source) + " twice");
    check_int("link medium", l.medium, 0, static_cast<int64_t>(media.size()) - 1);
    check_int("link delay", l.delay, 0, kYear);
    check_number("link loss", l.loss, 0.0, 1.0);
    check_number("link duplicate", l.duplicate, 0.0, 1.0);
  }
  check_ints("home", home, n, 0, nodes - 1);
  int64_t last = 0;
  for (const Fault& f : faults) {
    check_int("fault time", f.time, last, kYear);
    last = f.time;
    const int kind = static_cast<int>(f.kind);
    check_int("fault kind", kind, 0, static_cast<int>(FaultKind::kClock));
    const bool link = f.kind >= FaultKind::kLinkDown && f.kind <= FaultKind::kDuplicate;
    check_int("fault target", f.target, 0, (link ? static_cast<int64_t>(links.size()) : nodes) - 1);
    check_int("fault span", f.span, f.kind == FaultKind::kClock ? -kYear : 0, kYear);
    if (f.kind == FaultKind::kSlow) check_number("fault factor", f.value, 1e-6, 1e9);
    if (f.kind == FaultKind::kLoss || f.kind == FaultKind::kDuplicate) check_number("fault chance", f.value, 0.0, 1.0);
    if (f.kind == FaultKind::kClock) check_number("fault drift", f.value, -1e6, 1e6);
  }
  if (tasks >= std::numeric_limits<uint32_t>::max()) fail("at most 2**32 - 2 tasks");
  check_int("rows", rows, 1, int64_t{1} << 40);
  check_ints("source", source, tasks, 0, nodes - 1);
  check_ints("row", row, tasks, 0, rows - 1);
  check_size("deadline", deadline.size(), tasks);
  last = 0;
  for (size_t i = 0; i < tasks; ++i) {
    check_int("arrival (not falling)", arrival[i], last, kYear);
    last = arrival[i];
    if (deadline[i] != kNoDeadline) check_int("deadline", deadline[i], 1, kYear);
  }
  check_size("confidence", confidence.size(), static_cast<size_t>(rows) * k);
  for (const auto* column : {&gate, &delta})
    if (!column->empty()) check_size("gate, delta", column->size(), static_cast<size_t>(rows) * k);
  if (!label.empty()) check_ints("label", label, static_cast<size_t>(rows) * k, -1, 0x7FFFFFFF);
  if (!pool.empty()) check_ints("pool", pool, static_cast<size_t>(rows), -1, 0x7FFFFFFF);
  for (const auto& [name, value] : {std::pair("detect", detect), {"grace", grace}, {"timeout", timeout}, {"report", report}, {"stale", stale}})
    check_int(name, value, 0, kYear);
  if (timeout < 1) fail("timeout must be > 0");
  check_int("credit", credit, 1, 1 << 30);
  check_int("attempts", attempts, 1, 255);
}

}  // namespace fastee::sim
