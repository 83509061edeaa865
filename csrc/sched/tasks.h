// Live tasks, one cache line each: a decision about a random one of a million costs one miss. A handle is generation << 32 | slot, so
// that one of an ended task is recognised.
#pragma once
#include <cstdint>
#include <vector>

namespace fastee::sched {

struct alignas(64) Task {
  int64_t deadline;      // absolute ns
  int64_t until;         // of a task that waits, see Room; of one with sent_to: ns on the wire
  double sum;            // JEI's accumulator
  int32_t label, run;    // PABEE: the last label and how often it stood
  int32_t pool, arm;     // DIMEE's pool, SplitEE's arm
  int32_t next, before;  // neighbours in the waiting room; `before` of a free slot: the next free one
  uint32_t generation;
  int16_t segment;       // next to run
  int16_t best;          // deepest exit that has answered, -1 for none
  int16_t sent_to;       // node of an OFFLOAD that is not finished yet, -1 for none
  uint8_t tenant;        // index of the QoS class
  bool live;
};
static_assert(sizeof(Task) == 64);

class Tasks {
 public:
  static constexpr int32_t kEnd = -1, kOutside = -2;  // of Task::next and before

  explicit Tasks(int64_t capacity) : tasks_(capacity) {
    for (int64_t i = 0; i < capacity; ++i) {
      tasks_[i].next = kOutside;
      tasks_[i].before = i + 1 < capacity ? static_cast<int32_t>(i + 1) : kEnd;
    }
  }

  Task& operator[](int64_t slot) { return tasks_[slot]; }
  const Task& operator[](int64_t slot) const { return tasks_[slot]; }
  int64_t capacity() const { return static_cast<int64_t>(tasks_.size()); }
  int64_t live() const { return live_; }
  bool full() const { return free_ == kEnd; }

  int64_t take(int64_t deadline, int segment, int tenant) {
    const int64_t slot = free_;
    Task& t = tasks_[slot];
    free_ = t.before;
    ++live_;
    t.deadline = deadline;
    t.segment = static_cast<int16_t>(segment);
    t.best = static_cast<int16_t>(segment - 1);
    t.tenant = static_cast<uint8_t>(tenant);
    t.sum = 0.0;
    t.label = t.pool = t.arm = -1;
    t.run = 0;
    t.sent_to = -1;
    t.live = true;
    return handle(slot);
  }

  int64_t handle(int64_t slot) const { return static_cast<int64_t>(tasks_[slot].generation) << 32 | slot; }

  // The slot of a live task, else -1.
  int64_t find(int64_t task) const {
    const int64_t slot = task & 0xFFFFFFFF;
    if (task < 0 || slot >= capacity() || !tasks_[slot].live || tasks_[slot].generation != static_cast<uint32_t>(task >> 32)) return -1;
    return slot;
  }

  void release(int64_t slot) {
    Task& t = tasks_[slot];
    t.live = false;
    t.generation = (t.generation + 1) & 0x7FFFFFFF;
    t.before = free_;
    free_ = static_cast<int32_t>(slot);
    --live_;
  }

 private:
  std::vector<Task> tasks_;
  int32_t free_ = 0;
  int64_t live_ = 0;
};

}  // namespace fastee::sched
