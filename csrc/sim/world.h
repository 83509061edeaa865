// What is simulated, as plain numbers: machines, links, faults, arrivals, difficulty. Times are int64 nanoseconds.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sched/types.h"

namespace fastee::sim {

using sched::kNoDeadline;

// Capacity over time: cum[i] bytes have passed by at[i]; linear in between, repeated with period at.back().
struct Trace {
  std::vector<int64_t> at, cum;  // at[0] = cum[0] = 0; at rising, cum not falling, cum.back() > 0
};

// What serialises messages: one per link, or shared by several links (radio, bus).
struct Medium {
  int64_t rate = 0;     // bit/s, the mean where a trace rules
  int trace = -1;       // index, -1 = constant rate
  int64_t offset = 0;   // ns into the trace at time 0
};

struct Link {
  int source = 0, target = 0, medium = 0;
  int64_t delay = 0;
  double loss = 0.0, duplicate = 0.0;  // chance per message
};

enum class FaultKind : int { kDeath, kRestart, kFreeze, kSlow, kLinkDown, kLinkUp, kLoss, kDuplicate, kClock };

struct Fault {
  int64_t time = 0;
  FaultKind kind = FaultKind::kDeath;
  int target = 0;      // node, or link for kLinkDown .. kDuplicate
  int64_t span = 0;    // ns: how long a freeze lasts; the offset of a clock
  double value = 0.0;  // slowness factor; probability; drift of a clock in ppm
};

struct World {
  int nodes = 0, segments = 0, codecs = 0, max_batch = 1;
  std::vector<int64_t> service;  // [N, S, max_batch] ns of a batch of 1..max_batch rows
  std::vector<double> jitter;    // [N, S] relative standard deviation, uniform
  std::vector<int64_t> batch;    // [N] rows taken at once, 1..max_batch
  std::vector<double> price;     // [N] per second of computing
  double byte_price = 0.0;
  std::vector<int64_t> wire_bytes, codec_ns;  // [S, C]
  int64_t answer_bytes = 0;
  std::vector<Trace> traces;
  std::vector<Medium> media;
  std::vector<Link> links;
  std::vector<std::vector<int>> members;  // [N] the nodes that its scheduler knows, rising, with itself
  std::vector<int64_t> home;              // [N] node whose wish for the answer its scheduler counts the way home to
  std::vector<Fault> faults;              // by time
  std::vector<int64_t> arrival, source, deadline, row;  // [T]; arrival not falling; deadline relative or kNoDeadline
  std::vector<double> confidence;                       // [rows, K]
  std::vector<double> gate, delta;                      // [rows, K] or empty
  std::vector<int64_t> label, pool;                     // [rows, K] and [rows], or empty
  int64_t rows = 0;
  int64_t detect = 0, grace = 0, timeout = 0, report = 0, stale = 1'000'000;
  int credit = 8, attempts = 16;
  uint64_t seed = 0;
  bool log = false;

  // Throws std::invalid_argument that names the field, what was got and what was expected.
  void check() const;
};

}  // namespace fastee::sim
