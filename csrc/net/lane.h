// Directed links in user space: who may put what on them when. Numbers and a clock that is handed in; no socket, no thread.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <string>

#include "net/buffers.h"
#include "net/frame.h"

namespace fastee::net {

constexpr int64_t kNever = INT64_MAX;
constexpr size_t kChunkHeader = 16;

struct Link {
  double rate = std::numeric_limits<double>::infinity();  // bit/s
  double delay = 0;                                       // seconds, one way
  int medium = -1;                                        // links with the same one send one after the other; -1: a medium of its own

  bool shaped() const { return std::isfinite(rate) || delay > 0; }
  int64_t spend(uint64_t bytes) const { return std::isfinite(rate) ? std::llround(static_cast<double>(bytes) * 8e9 / rate) : 0; }
  int64_t delay_ns() const { return std::llround(delay * 1e9); }
  // What the lane sends in one piece: 5 ms of the link, so that a heartbeat never waits longer for its turn.
  size_t chunk() const { return std::isfinite(rate) ? static_cast<size_t>(std::clamp(rate * 0.005 / 8, 4096.0, 262144.0)) : 262144; }
};

// A frame on its way to `peer`.
struct Outgoing {
  std::string peer;
  int machine = 0;
  Frame frame;
  PayloadRef payload;
  uint32_t payload_crc = 0;
  int64_t deadline = kNoDeadline;
  uint64_t ticket = 0;         // nonzero: its loss is reported
  uint64_t connection = 0;     // which one took the first chunk
  bool bulk = false, urgent = false, lost = false, keyed = false;
  size_t queued = 0;           // payload bytes that have been given to deliveries
};

struct Delivery {
  std::shared_ptr<Outgoing> out;
  size_t offset = 0, size = 0;
  bool first = true, last = true;
  int64_t due = 0, give_up = kNever;
};

// A link, or all links from here that share a radio or a network card.
class Lane {
 public:
  // Urgent frames (small, not tasks) go before the next chunk of any other.
  void push(std::shared_ptr<Outgoing> out, const Link& link, int64_t now) {
    auto& queue = out->urgent ? urgent_ : bulk_;
    queue.push_back({std::move(out), link, now});
  }

  // When `advance` has something to do next.
  int64_t next() const {
    const int64_t start = urgent_.empty() && bulk_.empty() ? kNever : free_;
    return due_.empty() ? start : std::min(start, due_.front().due);
  }

  // Hands every chunk that the link would have delivered by `now` to `deliver`.
  template <typename Deliver>
  void advance(int64_t now, Deliver deliver) {
    while (free_ <= now && !(urgent_.empty() && bulk_.empty())) {
      auto& queue = urgent_.empty() ? bulk_ : urgent_;
      Entry& entry = queue.front();
      Outgoing& out = *entry.out;
      const Link& link = entry.link;
      Delivery d{entry.out, out.queued, std::min(out.payload.size() - out.queued, link.chunk()), out.queued == 0, false};
      out.queued += d.size;
      d.last = out.queued == out.payload.size() || out.lost;
      // The link's own time, not the time at which this thread woke up: lateness must not add up over the chunks.
      free_ = std::max(free_, entry.since) + link.spend(d.size + (d.first ? out.frame.header_bytes() : kChunkHeader));
      d.due = free_ + link.delay_ns();
      if (d.last) queue.pop_front();
      const auto later = [](int64_t due, const Delivery& other) { return due < other.due; };
      due_.insert(std::upper_bound(due_.begin(), due_.end(), d.due, later), std::move(d));
    }
    while (!due_.empty() && due_.front().due <= now) {
      Delivery d = std::move(due_.front());
      due_.pop_front();
      deliver(std::move(d));
    }
  }

 private:
  struct Entry {
    std::shared_ptr<Outgoing> out;
    Link link;
    int64_t since;
  };
  int64_t free_ = 0;
  std::deque<Entry> urgent_, bulk_;
  std::deque<Delivery> due_;  // in order of `due`
};

}  // namespace fastee::net
