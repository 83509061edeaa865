// A cluster on a virtual clock: the same Scheduler objects as in production, machines, links and faults as numbers. One thread,
// deterministic to the bit; docs/simulator.md has the rules, fastee/simulation/twin.py is the same in Python.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "sched/scheduler.h"
#include "sim/events.h"
#include "sim/random.h"
#include "sim/world.h"

namespace fastee::sim {

enum class Outcome : uint8_t { kPending, kAnswered, kRejected, kRefused, kExpired, kLost };

enum class What : int64_t {
  kArrive, kStart, kAdmit, kRefuse, kDecide, kRun, kRan, kSend, kDeliver, kVanish, kLost, kAnswer, kEnd, kDuplicate,
  kFault, kDown, kUp, kThaw,
};

// One line of the event log; docs/simulator.md says what a and b are.
struct Line {
  int64_t time, what, task, attempt, node, a, b;
};

struct Results {  // [T]
  std::vector<int64_t> latency, wire, compute;  // ns, -1 without an end; bytes; ns
  std::vector<double> cost;
  std::vector<int32_t> node;  // where it ended, -1
  std::vector<int16_t> exit;
  std::vector<uint8_t> outcome, attempts, forced, hops;
};

struct Totals {
  int64_t events = 0, duplicates = 0, messages = 0, lost = 0, retries = 0, batches = 0, now = 0, ended = 0, peak = 0;
};

class Simulator {
 public:
  // `schedulers`: one per node, over world.members[node]; they are driven, not owned, and must outlive this.
  Simulator(const World& world, std::vector<sched::Scheduler*> schedulers);

  // Handles up to `most` events; false once every task has ended.
  bool run(int64_t most);

  const World world;
  Results results;
  Totals totals;
  std::vector<Line> log;
  std::vector<int64_t> busy, ran, sent;  // [N] ns computing, rows run, bytes sent

 private:
  static constexpr uint32_t kNone = 0xFFFFFFFF;
  static constexpr int kPath = 8;

  // One copy of a task that is under way. Owned by exactly one place: an event, a queue, a batch or a waiting room.
  struct Work {
    int64_t handle, deadline, order, since, wire_ns, wire_bytes;
    double confidence;
    uint32_t task, next_free;
    int32_t node, sender, link;  // sender -1: the source itself; link: the one it came by
    int16_t segment, exit;
    uint16_t path[kPath];  // nodes passed, the source's entry first
    uint8_t depth, attempt, credited, forced, outcome, hops;
  };
  struct Ready {
    int64_t deadline, order;
    uint32_t work;
    int32_t segment;
    bool operator<(const Ready& o) const { return deadline != o.deadline ? deadline > o.deadline : order > o.order; }
  };
  struct Node {
    sched::Scheduler* scheduler = nullptr;
    std::unique_ptr<sched::Scheduler> own;  // after a restart
    std::vector<Ready> ready;  // sorted, the most urgent last
    std::vector<uint32_t> running, inbox, by_slot;
    std::vector<int> credit;  // per member
    std::vector<int> link;    // per member: index of the link there, -1
    int64_t waiting = 0, frozen = 0, frozen_at_start = 0, thaw_at = 0, started = 0, spent = 0, offset = 0, release = 0, tick_at = sched::kNever, told = -1;
    double slow = 1.0, drift = 0.0;
    int me = 0, segment = 0;
    uint32_t epoch = 0;
    bool alive = true, known_up = true, busy = false;
    Stream stream;
  };
  struct LinkState {
    bool up = true;
    int place = -1, back = -1;  // column of the target in the source's scheduler; the link the other way
    int first = -1;             // of the source's links over the same medium; free_at, when the source's last message there has left, is of that one
    int64_t free_at = 0;
    double loss = 0.0, duplicate = 0.0;
    uint32_t epoch = 0;
    Stream stream;
  };
  struct Observer {
    int node, place;
  };
  // What one exit says of one row; the end of the network says nothing but the pool.
  struct alignas(32) Said {
    double confidence = sched::kNone, gate = sched::kNone, delta = sched::kNone;
    int32_t label = -1, pool = -1;
  };

  void handle(const Event& event);
  void fault(const Fault& fault);
  void arrive(uint32_t task);
  void start(uint32_t task);
  void start_over(uint32_t task, int attempt);
  void settle(uint32_t task, Outcome outcome, int exit, int node, bool forced);
  void transmit(uint32_t work, int link, int codec);
  void vanish(uint32_t work, int64_t when);
  void deliver(uint32_t work);
  void lost(uint32_t work);
  void answered(uint32_t work);
  sched::Decision decide(uint32_t work);
  void follow(uint32_t work);
  void follow(uint32_t work, sched::Decision decision);
  void send_home(uint32_t work, Outcome outcome, bool forced);
  void give_credit(Work& work);
  void dispatch(int node);
  void done(int node);
  void tell(Node& node, int64_t ahead);
  void pump(int node);
  void report(int node);
  void die(int node);
  void restart(int node);
  void set_known(int node, bool up);
  std::vector<uint32_t> works_on(int node) const;
  const Said& said(uint32_t task, int exit) const { return said_[static_cast<size_t>(world.row[task]) * world.segments + exit]; }
  int64_t home_ns(const Work& work, int node, int to, int64_t* sent_bytes, bool* open) const;
  int64_t local(const Node& node) const {
    const int64_t now = totals.now + node.offset;
    return node.drift == 0.0 ? now : now + static_cast<int64_t>(static_cast<double>(totals.now) * node.drift / 1e6);
  }
  // Scattered reads of a table as large as nodes x nodes: where a link is at hand, its state knows place and back.
  int link_between(int from, int to) const { return link_at_[static_cast<size_t>(from) * world.nodes + to]; }
  uint32_t new_work();
  void free_work(uint32_t work);
  void write(What what, int64_t task, int64_t attempt, int64_t node, int64_t a, int64_t b) {
    if (world.log) log.push_back({totals.now, static_cast<int64_t>(what), task, attempt, node, a, b});
  }
  void arm_tick(int node);
  int64_t length_of(const Node& node) const { return static_cast<int64_t>(node.ready.size() + node.running.size()); }

  std::vector<Node> nodes_;
  std::vector<LinkState> links_;
  std::vector<int64_t> medium_free_;
  std::vector<int> link_at_;    // [N, N] index of a link, -1
  std::vector<std::vector<Observer>> observers_;
  std::vector<Work> works_;
  std::vector<uint8_t> attempt_;  // [T] current attempt
  std::vector<Said> said_;        // [rows, K + 1]: the world's columns side by side, one cache line for a decision instead of five
  std::vector<uint32_t> batch_, rows_, shut_;  // scratch
  uint32_t free_ = kNone;
  Events events_;
  size_t next_arrival_ = 0, next_fault_ = 0;
  int64_t order_ = 0;
  int exits_ = 0;
};

}  // namespace fastee::sim
