// The scheduler core without Python: rules, handles, no allocation on the hot path, and a fuzz with garbage values.
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "sched/scheduler.h"

using namespace fastee::sched;

namespace {

constexpr int64_t kMs = 1'000'000;
const double kNan = std::nan("");

// Two exits; 4 ms per segment here, 0.4 ms there behind 10 ms and 20 Mbit/s.
Config small(const char* policy) {
  Config c;
  c.segments = 3;
  c.nodes = 2;
  c.codecs = 2;
  c.batch_sizes = {1, 8};
  c.mean = {4e-3, 8e-3, 4e-4, 8e-4, 4e-3, 8e-3, 4e-4, 8e-4, 4e-3, 8e-3, 4e-4, 8e-4};
  c.spread.assign(12, 0.0);
  c.wire_bytes = {3136, 788, 16384, 4100, 8192, 2052};
  c.codec_seconds = {0, 2e-5, 0, 2e-5, 0, 2e-5};
  c.bandwidth = {0, 20e6, 20e6, 0};
  c.delay = {0, 0.01, 0.01, 0};
  c.hosts.assign(6, 1);
  c.thresholds = {0.5, 0.5};
  c.policy = policy;
  c.max_tasks = 8;
  return c;
}

void check_rules() {
  for (const char* policy : {"deadline", "threshold"}) {
    Scheduler s(small(policy));
    const int64_t task = s.admit(0, 50 * kMs);
    CHECK(task >= 0);
    CHECK(s.decide(task, -1, 0.0, 0).action == Action::kContinue);
    CHECK(s.decide(task, 0, kNan, kMs).action != Action::kExit);
    const Decision exit = s.decide(task, 1, 0.5, 2 * kMs);
    CHECK(exit.action == Action::kExit && !exit.forced && exit.node == 0);
    CHECK(s.decide(task, 1, 0.5, 2 * kMs).action == Action::kReject);
    CHECK(s.counters().stale == 1);

    const int64_t late = s.admit(3 * kMs, 4 * kMs);
    CHECK(s.decide(late, 0, 0.1, 3 * kMs).forced);
    CHECK(s.decide(s.admit(3 * kMs, 4 * kMs), -1, 0.9, 3 * kMs).action == Action::kReject);
    CHECK(s.admit(5 * kMs, 5 * kMs) == -1);
    const int64_t end = s.admit(5 * kMs);
    CHECK(s.decide(end, 2, kNan, kInt64Max).action == Action::kExit);
    CHECK(s.per_exit() == (std::vector<int64_t>{1, 1, 1}));

    std::vector<int64_t> many;
    Scheduler full(small(policy));
    for (int i = 0; i < 8; ++i) many.push_back(full.admit(0));
    CHECK(full.admit(0) == -1 && full.counters().refused_full == 1 && full.live() == 8);
    for (int64_t t : many) CHECK(full.finish(t) && !full.finish(t));
    CHECK(full.live() == 0);
  }
}

void check_offload() {
  Config c = small("deadline");
  c.hosts = {1, 1, 0, 1, 0, 1};
  Scheduler s(c);
  const Decision d = s.decide(s.admit(0), 0, 0.1, 0);
  CHECK(d.action == Action::kOffload && d.node == 1 && d.codec == 1);
  CHECK(d.code() == (2 | 2 << 4 | 2 << 12));
  s.set_node_up(1, false);
  CHECK(s.decide(s.admit(0), 0, 0.1, 0).forced);
  s.set_node_up(1, true);
  s.set_link_up(0, 1, false);
  CHECK(s.decide(s.admit(0), -1, 0.1, 0).action == Action::kContinue);
  CHECK(s.decide(s.admit(0), 0, 0.1, 0).forced);
}

template <typename Change>
void check_refused(Change change) {
  Config c = small("deadline");
  change(c);
  bool thrown = false;
  try {
    Scheduler s(c);
  } catch (const std::invalid_argument& error) {
    thrown = std::string(error.what()).rfind("Scheduler: ", 0) == 0;
  }
  CHECK(thrown);
}

void check_construction() {
  check_refused([](Config& c) { c.segments = 0; });
  check_refused([](Config& c) { c.segments = 4; });
  check_refused([](Config& c) { c.nodes = -1; });
  check_refused([](Config& c) { c.batch_sizes = {8, 8}; });
  check_refused([](Config& c) { c.batch_sizes.clear(); });
  check_refused([](Config& c) { c.mean[3] = kNan; });
  check_refused([](Config& c) { c.spread[3] = -1; });
  check_refused([](Config& c) { c.delay[1] = kInf; });
  check_refused([](Config& c) { c.bandwidth.pop_back(); });
  check_refused([](Config& c) { c.thresholds[0] = kNan; });
  check_refused([](Config& c) { c.hosts.assign(6, 0); });
  check_refused([](Config& c) { c.bins = 2; });
  check_refused([](Config& c) { c.gain = {1, 2}; });
  check_refused([](Config& c) { c.gain_high = c.gain_low; });
  check_refused([](Config& c) { c.max_tasks = 0; });
  check_refused([](Config& c) { c.deadline = 0; });
  check_refused([](Config& c) { c.quantile = kNan; });
  check_refused([](Config& c) { c.max_drop = kNan; });
  check_refused([](Config& c) { c.policy = "x"; });
  check_refused([](Config& c) { c.home = 2; });
}

// A rule and a policy that read every record and answer anything.
int8_t any_rule(const StatsRecord* stats, const TaskRecord* task, const NodeRecord* node) {
  return stats->confidence + stats->margin > 0.8 || (task->slack < 1e-3 && node->here);
}
int64_t any_action(const StatsRecord* stats, const TaskRecord* task, const NodeRecord* nodes) {
  static thread_local int64_t turn = 0;
  const int64_t pick = turn++ % 7;
  return pick < 2 ? nodes[pick].action : pick == 2 ? kWaitAction : pick == 3 ? kExitAction : pick == 4 ? kRejectAction : stats->exit * 99 - task->segment;
}

// Garbage in every argument: no undefined behaviour (run under ASan and UBSan), and the books stay balanced.
void fuzz(unsigned seed) {
  std::mt19937_64 rng(seed);
  const auto any = [&]() -> int64_t {
    switch (rng() % 8) {
      case 0: return kInt64Min;
      case 1: return kInt64Max;
      case 2: return static_cast<int64_t>(rng());
      default: return static_cast<int64_t>(rng() % 12) - 3;
    }
  };
  const auto any_double = [&]() -> double {
    switch (rng() % 8) {
      case 0: return kNan;
      case 1: return kInf;
      case 2: return -kInf;
      case 3: return 1e308;
      default: return static_cast<double>(rng() % 1000) / 500.0 - 0.5;
    }
  };
  static constexpr const char* kPolicies[] = {"deadline", "threshold", "patience", "distree", "mdi_exit", "dimee", "splitee", "jei_gate", "daisy", "custom"};
  Config c = small(kPolicies[seed % 10]);
  c.params.delta = {0.3, kInf};
  c.params.tiers = {0, 1, 1};
  c.params.cuts = {0, 1};
  c.params.counts = {1, 2, 3};
  c.params.t_o = 2;
  c.params.adapt = static_cast<int>(seed / 10 % 3);
  c.params.side_information = c.params.train = c.params.whole_batch = seed / 10 % 2;
  c.params.cloud = 1;
  c.classes = {{kMs, 1.0, 0.5}};
  if (seed % 10 == 9) c.custom = any_action;
  if (seed % 4 == 0) c.rule = any_rule;
  if (seed % 7 == 0) c.eager_limit = 0;
  c.seed = seed;
  c.node = static_cast<int>(rng() % 2);
  if (seed % 3 == 0) {
    c.bins = 4;
    c.gain = {0.1, -0.1, 0.2, 0, 1, -1, 0.01, 0.3};
    c.cost_weight = 5.0;
  }
  if (seed % 5 == 0) c.mean.assign(12, seed % 10 ? 0.0 : 1e300);
  Scheduler s(c);
  std::vector<int64_t> handles = {0};
  handles.reserve(4096);
  std::vector<int64_t> tasks(32), codes(32);
  std::vector<double> scores(32);
  const int64_t before = allocations;
  for (int i = 0; i < 4000; ++i) {
    const int64_t handle = rng() % 8 ? handles[rng() % handles.size()] : any();
    // The clock stands still after a time in the far future, so those come at the end only.
    const int64_t odd = any();
    const int64_t now = rng() % 64 || (i < 3600 && odd > i * 1000) ? static_cast<int64_t>(i) * 1000 : odd;
    switch (rng() % 12) {
      case 0: {
        const int64_t task = s.admit(now, rng() % 2 ? Scheduler::kDefaultDeadline : any(), static_cast<int>(any()), static_cast<int>(rng() % 3));
        if (task >= 0 && handles.size() < handles.capacity()) handles.push_back(task);
        break;
      }
      case 1:
      case 2: {
        Sample sample{any_double(), any_double(), any_double(), static_cast<int32_t>(any()), static_cast<int32_t>(any())};
        s.decide(handle, static_cast<int>(any()), sample, now);
        break;
      }
      case 3: {
        const int64_t rows = static_cast<int64_t>(rng() % 33);
        for (int64_t r = 0; r < rows; ++r) {
          tasks[r] = handles[rng() % handles.size()];
          scores[r] = any_double();
        }
        s.decide_batch(tasks.data(), static_cast<int>(any()), scores.data(), rows, now, codes.data());
        for (int64_t r = 0; r < rows; ++r) CHECK(codes[r] >= 0 && (codes[r] & 7) <= 4);
        break;
      }
      case 4: s.observe(static_cast<int>(any()), static_cast<int>(any()), any(), any()); break;
      case 5: s.observe_link(static_cast<int>(any()), static_cast<int>(any()), any(), any()); break;
      case 6: s.observe_queue(static_cast<int>(any()), any(), any()); break;
      case 9: {
        int64_t task;
        Decision d;
        for (int k = 0; k < 20 && s.poll(now, &task, &d); ++k) CHECK(d.action != Action::kWait && task >= 0);
        break;
      }
      case 10:
        s.tick(now);
        CHECK(s.admit_interval() >= 0);
        s.next_tick();
        break;
      case 11:
        s.set_idle(rng() % 2);
        s.rebatch(static_cast<int>(any()), any() / 4, any() / 4, any());
        break;
      case 7:
        s.set_node_up(static_cast<int>(any()), rng() % 4);
        s.set_link_up(static_cast<int>(any()), static_cast<int>(any()), rng() % 4);
        break;
      default: s.finish(handle, any_double());
    }
  }
  CHECK(allocations == before);
  const Counters& n = s.counters();
  CHECK(n.admitted == n.exits + n.rejected + n.finished + s.live());
  int64_t exits = 0;
  for (int64_t count : s.per_exit()) exits += count;
  CHECK(exits == n.exits);
  CHECK(s.waiting() >= 0 && s.waiting() <= s.live());
  CHECK(n.forced <= n.exits && n.late <= n.exits);
  CHECK(seed % 5 == 0 || (n.admitted > 0 && n.stale > 0 && n.ignored > 0 && n.clock_backwards > 0));
}

}  // namespace

int main() {
  check_rules();
  check_offload();
  check_construction();
  for (unsigned seed = 0; seed < 120; ++seed) fuzz(seed);
  return report("test_sched");
}
