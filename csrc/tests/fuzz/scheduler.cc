// Arbitrary bytes as a sequence of calls on one scheduler, policy by the first byte: no crash, and the books balance after every call.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../world.h"

using namespace fastee::sched;

namespace {

constexpr const char* kPolicies[] = {"deadline", "threshold", "patience", "distree", "mdi_exit", "dimee", "splitee", "jei_gate", "daisy"};

struct Bytes {
  const uint8_t* at;
  size_t left;
  template <typename T>
  T next() {
    T value{};
    const size_t n = left < sizeof(T) ? left : sizeof(T);
    std::memcpy(&value, at, n);
    at += n;
    left -= n;
    return value;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  Scheduler s(equal_world(kPolicies[in.next<uint8_t>() % 9], 3, 8));
  int64_t known[4] = {-1, -1, -1, -1};
  const auto task = [&] {
    const uint8_t pick = in.next<uint8_t>();
    return pick < 192 ? known[pick % 4] : in.next<int64_t>();
  };
  while (in.left > 0) {
    // Every second time is a small step on from the last one, or hardly any task would ever live.
    const auto time = [&] {
      if (in.next<uint8_t>() % 2 != 0) return in.next<int64_t>();
      return add_saturated(s.now() == kInt64Min ? 0 : s.now(), in.next<uint16_t>());
    };
    const auto deadline = [&] { return in.next<uint8_t>() % 2 != 0 ? in.next<int64_t>() : Scheduler::kDefaultDeadline; };
    switch (in.next<uint8_t>() % 10) {
      case 0: {
        const int64_t now = time(), until = deadline();
        known[in.next<uint8_t>() % 4] = s.admit(now, until, in.next<int8_t>(), in.next<int8_t>() % 2);
        break;
      }
      case 1: s.decide(task(), in.next<int8_t>() % 5, in.next<double>(), time()); break;
      case 2: s.observe(in.next<int8_t>() % 5, in.next<int8_t>() % 5, in.next<int64_t>(), in.next<int64_t>()); break;
      case 3: s.observe_link(in.next<int8_t>() % 5, in.next<int8_t>() % 5, in.next<int64_t>(), in.next<int64_t>(), in.next<uint8_t>() % 2 != 0 ? time() : kInt64Min); break;
      case 4: s.observe_queue(in.next<int8_t>() % 5, in.next<int64_t>(), in.next<int64_t>()); break;
      case 5: s.set_node_up(in.next<int8_t>() % 5, in.next<uint8_t>() % 2 != 0); break;
      case 6: s.set_link_up(in.next<int8_t>() % 5, in.next<int8_t>() % 5, in.next<uint8_t>() % 2 != 0); break;
      case 7: s.finish(task(), in.next<double>()); break;
      case 8: {
        int64_t polled;
        Decision decision;
        const int64_t now = time();
        for (int i = 0; s.poll(now, &polled, &decision); ++i)
          if (i > 64) std::abort();  // a pass ends
        s.tick(now);
        break;
      }
      case 9: {  // the same handle twice and strangers among them
        int64_t tasks[6], codes[6];
        double scores[6];
        for (int i = 0; i < 6; ++i) tasks[i] = task(), scores[i] = in.next<double>();
        s.decide_batch(tasks, in.next<int8_t>() % 5, scores, in.next<uint8_t>() % 7, time(), codes);
        break;
      }
    }
    const Counters& c = s.counters();
    if (c.admitted != c.exits + c.rejected + c.finished + s.live() || s.waiting() > s.live()) std::abort();
  }
  return 0;
}
