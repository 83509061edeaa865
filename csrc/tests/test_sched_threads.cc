// Four threads: each with a scheduler of its own, then all on one behind the caller's lock; run under TSan by `make sanitize`.
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "world.h"

using namespace fastee::sched;

namespace {

Config world(const char* policy, int node) {
  Config c = equal_world(policy, 4, 512);
  c.node = node;
  return c;
}

template <typename Guard>
void drive(Scheduler& s, unsigned seed, Guard guard) {
  std::mt19937_64 rng(seed);
  std::vector<int64_t> tasks(64, -1);
  for (int i = 0; i < 4000; ++i) {
    [[maybe_unused]] const auto held = guard();
    const int64_t now = i * 1000;
    const size_t k = rng() % tasks.size();
    switch (rng() % 8) {
      case 0:
        if (tasks[k] >= 0) s.finish(tasks[k]);
        tasks[k] = s.admit(now);
        break;
      case 1: s.observe(static_cast<int>(rng() % 4), static_cast<int>(rng() % 3), 1, static_cast<int64_t>(rng() % 3'000'000) + 1); break;
      case 2: s.observe_link(0, static_cast<int>(rng() % 3), 1 << 20, static_cast<int64_t>(rng() % 90'000'000) + 1, now); break;
      case 3: s.observe_queue(static_cast<int>(rng() % 3), static_cast<int64_t>(rng() % 5)); break;
      case 4: {
        int64_t task;
        Decision d;
        s.poll(now, &task, &d);
        s.tick(now);
        break;
      }
      case 5: {  // handles that ended or were never given are among them
        double scores[16];
        int64_t codes[16];
        for (double& u : scores) u = static_cast<double>(rng() % 100) / 100.0;
        s.decide_batch(&tasks[rng() % 48], static_cast<int>(rng() % 4), scores, 16, now, codes);
        break;
      }
      case 6:
        s.set_node_up(static_cast<int>(rng() % 3), rng() % 3 != 0);
        s.set_link_up(static_cast<int>(rng() % 3), static_cast<int>(rng() % 3), rng() % 3 != 0);
        break;
      default: s.decide(tasks[k], static_cast<int>(rng() % 4), static_cast<double>(rng() % 100) / 100.0, now);
    }
  }
}

void check_books(const Scheduler& s) {
  const Counters& n = s.counters();
  CHECK(n.admitted > 0 && n.admitted == n.exits + n.rejected + n.finished + s.live());
}

}  // namespace

int main() {
  for (const char* policy : {"deadline", "mdi_exit", "splitee", "dimee"}) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([policy, t] {
        Scheduler s(world(policy, t % 3));
        drive(s, static_cast<unsigned>(t), [] { return 0; });
        check_books(s);
      });
    for (std::thread& thread : threads) thread.join();

    Scheduler shared(world(policy, 0));
    std::mutex lock;
    threads.clear();
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&shared, &lock, t] { drive(shared, static_cast<unsigned>(t), [&lock] { return std::unique_lock(lock); }); });
    for (std::thread& thread : threads) thread.join();
    check_books(shared);
  }
  return report("test_sched_threads");
}
