// The largest world: 1,024 nodes x 256 segments x 16 codecs, and a million tasks in flight: memory, construction, and the
// times of the hot calls with generous limits (the measured ones stand in docs/scheduler.md).
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <vector>

#include "check.h"
#include "sched/scheduler.h"

using namespace fastee::sched;

namespace {

double seconds(auto&& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double peak_mb() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024.0;
}

Config world(int nodes, int segments, int codecs) {
  Config c;
  c.segments = segments;
  c.nodes = nodes;
  c.codecs = codecs;
  c.batch_sizes = {1};
  const size_t n = nodes, s = segments, nc = codecs;
  for (size_t i = 0; i < s * n; ++i) c.mean.push_back(1e-3 * (1.0 + static_cast<double>(i * 7919 % 100) / 25.0));
  c.spread.assign(s * n, 1e-4);
  for (size_t i = 0; i < s * nc; ++i) c.wire_bytes.push_back(1e3 * (1.0 + static_cast<double>(i * 104729 % 97)));
  c.codec_seconds.assign(s * nc, 1e-5);
  c.bandwidth.assign(n * n, 1e9);
  c.delay.assign(n * n, 1e-3);
  c.hosts.assign(s * n, 1);
  c.thresholds.assign(s - 1, 0.9);
  c.deadline = 60'000'000'000;
  return c;
}

#if defined(FASTEE_EMULATED)
constexpr int kTasks = 125'000;
constexpr int kShrink = 8;  // qemu-user needs more than six minutes for the full world, which runs natively
constexpr const char* kSize = "an eighth, for emulation; the full size runs natively: ";
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kTasks = 1'000'000;
constexpr int kShrink = 8;  // a sanitizer is ten times slower
constexpr const char* kSize = "an eighth, for a sanitizer; the full size runs without: ";
#else
constexpr int kTasks = 1'000'000;
constexpr int kShrink = 1;
constexpr const char* kSize = "";
#endif

void large_world() {
  Config c = world(1024 / kShrink, 256 / kShrink, 16);
  if (kShrink > 1) c.eager_limit = 0;
  c.max_tasks = 1024;
  std::unique_ptr<Scheduler> s;
  const double built = seconds([&] { s = std::make_unique<Scheduler>(c); });
  std::vector<int64_t> tasks(512);
  for (int64_t& t : tasks) t = s->admit(0);
  const double decide = seconds([&] { for (size_t i = 0; i < tasks.size(); ++i) CHECK(s->decide(tasks[i], static_cast<int>(i) % (c.segments - 1), 0.1, static_cast<int64_t>(i)).node >= 0); });
  const double observe = seconds([&] { for (int i = 0; i < 512; ++i) s->observe(i % c.segments, i % c.nodes, 1, 9'000'000 + i % 3 * 1'000'000); });
  CHECK(s->counters().observed == 512 && s->model().stale());
  const double link = seconds([&] { for (int i = 1; i < 65; ++i) s->observe_link(0, i, 1 << 20, 20'000'000); });
  int steps = 0;
  double slowest = 0.0;
  for (; s->model().stale() && steps < 32; ++steps) {
    const int64_t due = s->next_tick();
    CHECK(due != kNever);
    slowest = std::max(slowest, seconds([&] { s->tick(due); }));
  }
  std::printf("%s%d nodes x %d segments x %d codecs: built in %.2f s, decide %.2f us, observe %.2f us, observe_link %.0f us, %d steps of at most %.0f ms, peak %.0f MB\n",
              kSize, c.nodes, c.segments, c.codecs, built, decide / 512 * 1e6, observe / 512 * 1e6, link / 64 * 1e6, steps, slowest * 1e3, peak_mb());
  CHECK(s->counters().observed > 512);
  CHECK(decide / 512 < 1e-3 && observe / 512 < 1e-3 && link / 64 < 0.1 && slowest < 2.0 && peak_mb() < 2048);
}

// Brought up step by step, the tables become those of a world that follows at once.
void steps_reach_the_same() {
  Config c = world(7, 9, 3);
  c.max_tasks = 8;
  Scheduler at_once(c);
  c.eager_limit = 0;
  Scheduler stepwise(c);
  for (Scheduler* s : {&at_once, &stepwise}) {
    for (int i = 0; i < 200; ++i) s->observe(i % 9, i % 7, 1, 1'000'000 + i * 20'000);
    for (int i = 1; i < 7; ++i) s->observe_link(0, i, 1 << 20, 15'000'000);
    s->set_node_up(3, false);
    s->set_link_up(2, 4, false);
    int64_t now = 0;
    for (int i = 0; i < 100 && s->next_tick() != kNever; ++i) s->tick(now = std::max(now + 1, s->next_tick()));
    CHECK(!s->model().stale());
  }
  CHECK(at_once.counters().observed == stepwise.counters().observed && at_once.counters().observed > 200);
  for (int segment = 0; segment < 9; ++segment)
    for (int n = 0; n < 7; ++n) {
      CHECK(at_once.model().need_mean(0, segment)[n] == stepwise.model().need_mean(0, segment)[n]);
      CHECK(at_once.model().togo(0, segment)[n] == stepwise.model().togo(0, segment)[n]);
      CHECK(at_once.model().codec(segment, n) == stepwise.model().codec(segment, n));
    }
}

void many_tasks() {
  Config c = world(16, 9, 4);
  c.max_tasks = kTasks;
  Scheduler s(c);
  std::vector<int64_t> tasks(c.max_tasks);
  const double admit = seconds([&] { for (int64_t& t : tasks) t = s.admit(1); });
  CHECK(s.live() == c.max_tasks && s.admit(1) == -1);
  const double decide = seconds([&] { for (size_t i = 0; i < tasks.size(); ++i) s.decide(tasks[i * 7919 % tasks.size()], static_cast<int>(i % 8), 0.1, 2); });
  const double finish = seconds([&] { for (int64_t t : tasks) CHECK(s.finish(t)); });
  CHECK(s.live() == 0 && s.counters().finished == c.max_tasks);
  std::printf("%d tasks in flight: admit %.0f ns, decide in random order %.0f ns, finish %.0f ns, peak %.0f MB\n", kTasks, admit / kTasks * 1e9,
              decide / kTasks * 1e9, finish / kTasks * 1e9, peak_mb());
  CHECK(peak_mb() < 2048);
}

}  // namespace

int main() {
  many_tasks();
  steps_reach_the_same();
  large_world();
  return report("test_sched_capacity");
}
