// The simulator without Python: conservation and determinism in random worlds full of faults, traces against arithmetic, bad worlds.
#include "sim/simulator.h"

#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "sim/link_clock.h"
#include "tests/check.h"

using namespace fastee::sim;
using fastee::sched::Config;
using fastee::sched::Scheduler;

namespace {

constexpr int64_t kMs = 1'000'000;

struct Cluster {
  World world;
  std::vector<std::unique_ptr<Scheduler>> schedulers;
  std::vector<Scheduler*> cores;
};

// Everybody linked with everybody; faults of every kind at random times.
Cluster random_cluster(uint64_t seed, int nodes, int tasks) {
  std::mt19937_64 rng(seed);
  const auto real = [&](double low, double high) { return low + (high - low) * std::uniform_real_distribution<double>(0, 1)(rng); };
  const auto whole = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  Cluster c;
  World& w = c.world;
  w.nodes = nodes;
  w.segments = 3;
  w.codecs = 2;
  w.max_batch = 4;
  std::vector<double> mean;
  for (int n = 0; n < nodes; ++n) {
    const double speed = real(0.3, 5.0);
    for (int s = 0; s < 3; ++s)
      for (int b = 1; b <= 4; ++b) w.service.push_back(static_cast<int64_t>(speed * 2e6 * (1 + 0.3 * (b - 1))));
    w.batch.push_back(whole(1, 4));
    w.price.push_back(real(0, 2));
    mean.push_back(speed * 2e-3);
  }
  w.jitter.assign(static_cast<size_t>(nodes) * 3, 0.1);
  w.wire_bytes = {3000, 800, 16000, 4000, 8000, 2000};
  w.codec_ns = {0, 20'000, 0, 20'000, 0, 20'000};
  w.answer_bytes = 176;
  w.traces.push_back({{0, 50 * kMs, 100 * kMs, 1000 * kMs}, {0, 100'000, 100'000, 2'000'000}});
  for (int a = 0; a < nodes; ++a) {
    std::vector<int> all;
    for (int b = 0; b < nodes; ++b) {
      all.push_back(b);
      if (a == b) continue;
      w.media.push_back({20'000'000, whole(0, 3) == 0 ? 0 : -1, whole(0, 1000) * kMs});
      w.links.push_back({a, b, static_cast<int>(w.media.size()) - 1, whole(0, 10) * kMs, real(0, 0.1), real(0, 0.1)});
    }
    w.members.push_back(all);
    w.home.push_back(0);
  }
  int64_t at = 0;
  for (int i = 0; i < 8; ++i) {
    at += whole(0, 200) * kMs;
    Fault f{at, static_cast<FaultKind>(whole(0, 8)), 0, whole(1, 300) * kMs, real(0.1, 0.9)};
    const bool link = f.kind >= FaultKind::kLinkDown && f.kind <= FaultKind::kDuplicate;
    f.target = static_cast<int>(whole(0, (link ? static_cast<int64_t>(w.links.size()) : nodes) - 1));
    if (link && w.links.empty()) continue;
    w.faults.push_back(f);
  }
  at = 0;
  for (int i = 0; i < tasks; ++i) {
    at += whole(0, 12) * kMs;
    w.arrival.push_back(at);
    w.source.push_back(0);
    w.deadline.push_back(whole(0, 20) == 0 ? kNoDeadline : whole(5, 200) * kMs);
    w.row.push_back(whole(0, 49));
  }
  w.rows = 50;
  for (int i = 0; i < 100; ++i) w.confidence.push_back(real(0, 1));
  w.detect = 50 * kMs;
  w.grace = 100 * kMs;
  w.timeout = 2000 * kMs;
  w.report = 50 * kMs;
  w.seed = seed;
  w.log = true;
  for (int n = 0; n < nodes; ++n) {
    Config k;
    k.segments = 3;
    k.nodes = nodes;
    k.codecs = 2;
    k.batch_sizes = {1};
    for (int s = 0; s < 3; ++s)
      for (int i = 0; i < nodes; ++i) k.mean.push_back(mean[i]);
    k.spread.assign(k.mean.size(), 1e-4);
    k.wire_bytes.assign(w.wire_bytes.begin(), w.wire_bytes.end());
    k.codec_seconds = {0, 2e-5, 0, 2e-5, 0, 2e-5};
    for (int a = 0; a < nodes; ++a)
      for (int b = 0; b < nodes; ++b) {
        k.bandwidth.push_back(a == b ? 0 : 20e6);
        k.delay.push_back(a == b ? 0 : 5e-3);
      }
    k.hosts.assign(static_cast<size_t>(nodes) * 3, 1);
    k.thresholds = {0.6, 0.6};
    k.node = n;
    k.max_tasks = 64;
    c.schedulers.push_back(std::make_unique<Scheduler>(k));
    c.cores.push_back(c.schedulers.back().get());
  }
  return c;
}

void conserve() {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const int nodes = static_cast<int>(seed % 5) + 1;
    Cluster a = random_cluster(seed, nodes, 200), b = random_cluster(seed, nodes, 200);
    Simulator first(a.world, a.cores), second(b.world, b.cores);
    while (first.run(37)) {
    }
    while (second.run(1'000'000)) {
    }
    CHECK(first.totals.ended == 200);
    std::vector<int> ends(200, 0);
    int64_t last = 0;
    for (const Line& line : first.log) {
      CHECK(line.time >= last);
      last = line.time;
      if (line.what == static_cast<int64_t>(What::kEnd)) ++ends[line.task];
    }
    for (int n : ends) CHECK(n == 1);
    CHECK(first.log.size() == second.log.size());
    for (size_t i = 0; i < first.log.size() && i < second.log.size(); ++i) {
      const Line &x = first.log[i], &y = second.log[i];
      CHECK(x.time == y.time && x.what == y.what && x.task == y.task && x.node == y.node && x.a == y.a && x.b == y.b);
    }
    for (uint8_t outcome : first.results.outcome) CHECK(outcome != 0);
  }
}

void capacity() {
  const std::vector<Trace> traces{{{0, 10, 20, 40}, {0, 1000, 1000, 2000}}};
  const Medium medium{1, 0, 0};
  CHECK(leave_at(medium, traces, 0, 1000) == 10);
  CHECK(leave_at(medium, traces, 5, 500) == 10);
  CHECK(leave_at(medium, traces, 10, 500) == 30);
  CHECK(leave_at(medium, traces, 10, 1000) == 40);
  CHECK(leave_at(medium, traces, 10, 1001) == 41);
  CHECK(leave_at(medium, traces, 0, 4000) == 80);
  CHECK(leave_at(medium, traces, 30, 0) == 30);
  CHECK(leave_at({1, 0, 10}, traces, 0, 1000) == 30);
  CHECK(leave_at({8'000'000'000, -1, 0}, traces, 5, 100) == 105);
  CHECK(wire_ns(int64_t{1} << 30, 1) == (int64_t{1} << 30) * 8'000'000'000);
  int64_t before = 0;
  for (int64_t bytes = 1; bytes < 5000; ++bytes) {
    const int64_t end = leave_at(medium, traces, 3, bytes);
    CHECK(end >= before && end > 3);
    before = end;
  }
}

template <typename Break>
void refuses(Break damage) {
  Cluster c = random_cluster(3, 3, 5);
  damage(c.world);
  bool thrown = false;
  try {
    Simulator broken(c.world, c.cores);
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown);
}

void bad_worlds() {
  refuses([](World& w) { w.arrival[1] = w.arrival[0] - 1; });
  refuses([](World& w) { w.source[0] = 3; });
  refuses([](World& w) { w.row[0] = 50; });
  refuses([](World& w) { w.deadline[0] = 0; });
  refuses([](World& w) { w.service.pop_back(); });
  refuses([](World& w) { w.service[0] = -1; });
  refuses([](World& w) { w.jitter[0] = std::numeric_limits<double>::quiet_NaN(); });
  refuses([](World& w) { w.links[0].target = w.links[0].source; });
  refuses([](World& w) { w.links[0].medium = 99; });
  refuses([](World& w) { w.links[0].loss = 1.5; });
  refuses([](World& w) { w.media[0].rate = 0; });
  refuses([](World& w) { w.traces[0].cum.back() = 0; });
  refuses([](World& w) { w.traces[0].at[1] = 0; });
  refuses([](World& w) { w.members[1] = {0, 2}; });
  refuses([](World& w) { w.members[1] = {0, 2, 1}; });
  refuses([](World& w) { w.faults.push_back({0, FaultKind::kDeath, 0, 0, 0.0}); w.faults.push_back({-1, FaultKind::kDeath, 0, 0, 0.0}); });
  refuses([](World& w) { w.faults = {{0, FaultKind::kDeath, 3, 0, 0.0}}; });
  refuses([](World& w) { w.faults = {{0, FaultKind::kLoss, 0, 0, 2.0}}; });
  refuses([](World& w) { w.timeout = 0; });
  refuses([](World& w) { w.confidence.pop_back(); });
  refuses([](World& w) { w.home[0] = -1; });
}

}  // namespace

int main() {
  conserve();
  capacity();
  bad_worlds();
  return report("test_sim");
}
