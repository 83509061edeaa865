// Live tasks as struct of arrays; a handle is generation << 32 | slot, so that one of an ended task is recognised.
#pragma once
#include <cstdint>
#include <vector>

namespace fastee::sched {

class Tasks {
 public:
  explicit Tasks(int64_t capacity)
      : deadline(capacity), segment(capacity), best(capacity), tenant(capacity), sum(capacity), label(capacity), run(capacity),
        pool(capacity), arm(capacity), generation_(capacity, 0), live_(capacity, 0), free_(capacity) {
    for (int64_t i = 0; i < capacity; ++i) free_[i] = static_cast<uint32_t>(capacity - 1 - i);
  }

  int64_t capacity() const { return static_cast<int64_t>(live_.size()); }
  int64_t live() const { return capacity() - static_cast<int64_t>(free_.size()); }
  bool full() const { return free_.empty(); }

  int64_t take(int64_t task_deadline, int next_segment) {
    const uint32_t slot = free_.back();
    free_.pop_back();
    live_[slot] = 1;
    deadline[slot] = task_deadline;
    segment[slot] = next_segment;
    best[slot] = next_segment - 1;
    tenant[slot] = 0;
    sum[slot] = 0.0;
    label[slot] = pool[slot] = arm[slot] = -1;
    run[slot] = 0;
    return handle(slot);
  }

  int64_t handle(int64_t slot) const { return static_cast<int64_t>(generation_[slot]) << 32 | slot; }

  // The slot of a live task, else -1.
  int64_t find(int64_t task) const {
    const int64_t slot = task & 0xFFFFFFFF;
    if (task < 0 || slot >= capacity() || !live_[slot] || generation_[slot] != static_cast<uint32_t>(task >> 32)) return -1;
    return slot;
  }

  // free_ holds `capacity` entries from the start, so this never allocates.
  void release(int64_t slot) {
    live_[slot] = 0;
    generation_[slot] = (generation_[slot] + 1) & 0x7FFFFFFF;
    free_.push_back(static_cast<uint32_t>(slot));
  }

  std::vector<int64_t> deadline;  // absolute ns
  std::vector<int> segment;       // next to run
  std::vector<int> best;          // deepest exit that has answered, -1 for none
  std::vector<uint8_t> tenant;    // index of the QoS class
  // What the policies keep of a task: JEI's accumulator, the last label and how often it stood, DIMEE's pool, SplitEE's arm.
  std::vector<double> sum;
  std::vector<int32_t> label, run, pool, arm;

 private:
  std::vector<uint32_t> generation_;
  std::vector<uint8_t> live_;
  std::vector<uint32_t> free_;
};

}  // namespace fastee::sched
