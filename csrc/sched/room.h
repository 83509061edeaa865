// The waiting room: tasks that were told to WAIT, first come first out, as a linked list through their slots. Nothing allocates.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "sched/types.h"

namespace fastee::sched {

class Room {
 public:
  explicit Room(int64_t capacity) : until_(capacity), next_(capacity, kOutside), before_(capacity, kOutside) {}

  int64_t size() const { return size_; }
  int64_t head() const { return head_; }  // -1 when empty
  bool holds(int64_t slot) const { return next_[slot] != kOutside; }
  // No task's time is up before this; kNever when nobody waits for a time.
  int64_t soonest() const { return size_ > 0 ? soonest_ : kNever; }

  void add(int64_t slot, int64_t until) {
    until_[slot] = until;
    before_[slot] = tail_;
    next_[slot] = kEnd;
    if (tail_ >= 0)
      next_[tail_] = static_cast<int32_t>(slot);
    else
      head_ = static_cast<int32_t>(slot);
    tail_ = static_cast<int32_t>(slot);
    if (walking_ && cursor_ == kEnd) cursor_ = tail_;
    soonest_ = size_++ > 0 ? std::min(soonest_, until) : until;
  }

  void remove(int64_t slot) {
    if (cursor_ == slot) cursor_ = next_[slot];
    (before_[slot] >= 0 ? next_[before_[slot]] : head_) = next_[slot];
    (next_[slot] >= 0 ? before_[next_[slot]] : tail_) = before_[slot];
    next_[slot] = before_[slot] = kOutside;
    --size_;
  }

  // A task whose time is up, else -1; looks at everybody only once `now` has reached the soonest.
  int64_t expired(int64_t now) {
    if (size_ == 0 || now < soonest_) return -1;
    soonest_ = kNever;
    for (int32_t slot = head_; slot >= 0; slot = next_[slot]) {
      if (until_[slot] <= now) {
        soonest_ = until_[slot];
        return slot;
      }
      soonest_ = std::min(soonest_, until_[slot]);
    }
    return -1;
  }

  // One walk over all who wait: step() until -1, which starts the next walk.
  int64_t step() {
    const int32_t slot = walking_ ? cursor_ : head_;
    walking_ = slot >= 0;
    cursor_ = slot >= 0 ? next_[slot] : kEnd;
    return slot;
  }

 private:
  static constexpr int32_t kEnd = -1, kOutside = -2;
  std::vector<int64_t> until_;
  std::vector<int32_t> next_, before_;
  int32_t head_ = kEnd, tail_ = kEnd, cursor_ = kEnd;
  bool walking_ = false;
  int64_t size_ = 0, soonest_ = kNever;
};

}  // namespace fastee::sched
