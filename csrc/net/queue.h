// The hand-over between threads: a queue that never locks and never waits, a bell that is only rung for somebody who sleeps, a timer.
#pragma once
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <system_error>

namespace fastee::net {

// Unbounded queue of any number of producers and one consumer (Vyukov's list): a push is one exchange and one store.
template <typename T>
class Queue {
 public:
  Queue() : newest_(&stub_), oldest_(&stub_) {}
  ~Queue() {
    while (pop()) {
    }
    if (oldest_ != &stub_) delete oldest_;
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void push(std::unique_ptr<T> item) { push_node(new Node{std::move(item), {nullptr}}); }

  // Consumer only. Null when empty, or when a producer stands between its two steps (it will ring).
  std::unique_ptr<T> pop() {
    Node* next = oldest_->next.load(std::memory_order_acquire);
    if (next == nullptr) return nullptr;
    std::unique_ptr<T> item = std::move(next->item);
    if (oldest_ != &stub_) delete oldest_;
    oldest_ = next;
    return item;
  }

  // Consumer only.
  bool empty() const { return oldest_->next.load(std::memory_order_seq_cst) == nullptr; }

 private:
  struct Node {
    std::unique_ptr<T> item;
    std::atomic<Node*> next;
  };
  void push_node(Node* node) {
    Node* before = newest_.exchange(node, std::memory_order_acq_rel);
    before->next.store(node, std::memory_order_seq_cst);
  }

  Node stub_{nullptr, {nullptr}};
  alignas(64) std::atomic<Node*> newest_;
  alignas(64) Node* oldest_;
};

// An eventfd that costs a system call only when its owner sleeps. The owner: `prepare`, look whether there is work, sleep in poll on
// `fd` if not, `finish`. Others: make work visible with a seq_cst store, then `ring`.
class Bell {
 public:
  Bell() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~Bell() { close(fd_); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;

  int fd() const { return fd_; }
  void prepare() { asleep_.store(true, std::memory_order_seq_cst); }
  void finish() {
    if (asleep_.exchange(false, std::memory_order_seq_cst)) return;
    uint64_t count;
    [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
  }
  void ring() {
    if (!asleep_.exchange(false, std::memory_order_seq_cst)) return;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t put = write(fd_, &one, sizeof one);
  }

 private:
  int fd_;
  std::atomic<bool> asleep_{false};
};

// A file that is readable from a date on (steady clock, ns; INT64_MAX: never): poll itself counts in whole milliseconds of its own.
class Alarm {
 public:
  Alarm() : fd_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "timerfd");
  }
  ~Alarm() { close(fd_); }
  Alarm(const Alarm&) = delete;
  Alarm& operator=(const Alarm&) = delete;

  int fd() const { return fd_; }
  void set(int64_t due) {
    itimerspec spec{};
    if (due != INT64_MAX) {
      due = std::max<int64_t>(due, 1);  // a date in the past fires at once, zero would disarm
      spec.it_value = {due / 1'000'000'000, due % 1'000'000'000};
    }
    timerfd_settime(fd_, TFD_TIMER_ABSTIME, &spec, nullptr);
  }

 private:
  int fd_;
};

}  // namespace fastee::net
