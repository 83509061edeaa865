// What a pipeline planner is told and what it answers: plain numbers.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

namespace fastee::plan {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

enum class Objective : int { kLatency = 0, kThroughput = 1, kCost = 2 };

// S segments, N nodes, NC codecs, K = S - 1 exits; arrays row-major; seconds, bytes, bit/s. Exit k stands after segment k.
struct Problem {
  int segments = 0, nodes = 0, codecs = 0, source = 0;
  Objective objective = Objective::kLatency;
  std::vector<double> run;                        // [S, N] a segment without its head; +inf: the node does not host it
  std::vector<double> head;                       // [K, N] an exit's head
  std::vector<double> wire_bytes, codec_seconds;  // [S, NC] the carry that enters segment s
  std::vector<double> bandwidth, delay;           // [N, N] 0 bit/s = no link
  std::vector<double> leave;                      // [K] share of the tasks reaching exit k that it answers; 0 = never used
  std::vector<double> loss;                       // [K] accuracy that such a task loses, in [0, 1]
  std::vector<double> memory;                     // [S] bytes that hosting a segment takes
  std::vector<double> room;                       // [N] bytes there; +inf = no limit
  std::vector<double> price;                      // [N] objective units per second of compute
  double second_price = 1.0;                      // objective units per second of the task's time
  double byte_price = 0.0;                        // objective units per byte sent
  double answer_bytes = 64.0;
  double deadline = kInf;                         // bound on the expected time
  double max_drop = kInf;                         // bound on the expected loss
  bool choose_exits = true;                       // false: every exit with leave > 0 is on
  int max_width = 4096;                           // partial plans kept per segment by the search under limits

  // Throws std::invalid_argument naming the field, what was got and what was expected.
  void check() const;
};

struct Placement {
  bool found = false;
  std::vector<int> place;   // [S]
  std::vector<int> codec;   // [S] of the move into segment s, -1 where the carry stays
  std::vector<uint8_t> on;  // [K]
  double value = kInf;      // the objective: seconds, seconds per task at the bottleneck, or cost units
  double bound = -kInf;     // no plan is better than this
  bool exact = false;       // value is the optimum
  int64_t states = 0;       // partial plans looked at by the search under limits; 0 = the recursion alone answered
};

// What a plan does, by the same arithmetic.
struct Account {
  double value = kInf, seconds = kInf, cost = kInf, bottleneck = kInf, bytes = 0.0, drop = 0.0;
  std::vector<double> reach;   // [S] share of tasks that run segment s
  std::vector<double> memory;  // [N] bytes used
};

}  // namespace fastee::plan
