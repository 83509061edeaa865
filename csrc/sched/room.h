// The waiting room: tasks that were told to WAIT, first come first out, as a linked list through their slots. Nothing allocates.
#pragma once
#include <algorithm>
#include <cstdint>

#include "sched/tasks.h"
#include "sched/types.h"

namespace fastee::sched {

class Room {
 public:
  explicit Room(Tasks& tasks) : tasks_(tasks) {}

  int64_t size() const { return size_; }
  int64_t head() const { return head_; }  // -1 when empty
  bool holds(int64_t slot) const { return tasks_[slot].next != Tasks::kOutside; }
  // No task's time is up before this; kNever when nobody waits for a time.
  int64_t soonest() const { return size_ > 0 ? soonest_ : kNever; }

  void add(int64_t slot, int64_t until) {
    const int32_t at = static_cast<int32_t>(slot);
    Task& t = tasks_[slot];
    t.until = until;
    t.before = tail_;
    t.next = Tasks::kEnd;
    (tail_ >= 0 ? tasks_[tail_].next : head_) = at;
    tail_ = at;
    if (walking_ && cursor_ == Tasks::kEnd) cursor_ = tail_;
    soonest_ = size_++ > 0 ? std::min(soonest_, until) : until;
  }

  void remove(int64_t slot) {
    Task& t = tasks_[slot];
    if (cursor_ == slot) cursor_ = t.next;
    (t.before >= 0 ? tasks_[t.before].next : head_) = t.next;
    (t.next >= 0 ? tasks_[t.next].before : tail_) = t.before;
    t.next = t.before = Tasks::kOutside;
    --size_;
  }

  // A task whose time is up, else -1; looks at everybody only once `now` has reached the soonest.
  int64_t expired(int64_t now) {
    if (size_ == 0 || now < soonest_) return -1;
    soonest_ = kNever;
    for (int32_t slot = head_; slot >= 0; slot = tasks_[slot].next) {
      if (tasks_[slot].until <= now) {
        soonest_ = tasks_[slot].until;
        return slot;
      }
      soonest_ = std::min(soonest_, tasks_[slot].until);
    }
    return -1;
  }

  // One walk over those who wait: step() until -1, which starts the next walk. It takes as many steps as waited at its begin, so that
  // a task which is let go and comes back at once (a peer without credit) cannot keep it going for ever.
  int64_t step() {
    if (!walking_) {
      cursor_ = head_;
      left_ = size_;
    }
    walking_ = left_-- > 0 && cursor_ >= 0;
    if (!walking_) return -1;
    const int32_t slot = cursor_;
    cursor_ = tasks_[slot].next;
    return slot;
  }

 private:
  Tasks& tasks_;
  int32_t head_ = Tasks::kEnd, tail_ = Tasks::kEnd, cursor_ = Tasks::kEnd;
  bool walking_ = false;
  int64_t size_ = 0, left_ = 0, soonest_ = kNever;
};

}  // namespace fastee::sched
