// What goes into the scheduler and what comes out: plain numbers.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace fastee::sched {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNs = 1e9;
inline constexpr int64_t kInt64Min = std::numeric_limits<int64_t>::min();
inline constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();
inline constexpr int64_t kNoDeadline = kInt64Max;

enum class Action : int { kExit = 0, kContinue = 1, kOffload = 2, kWait = 3, kReject = 4 };

struct Decision {
  Action action = Action::kReject;
  int node = -1;   // where the task goes on or ends
  int codec = -1;  // for kOffload
  bool forced = false;
  int64_t wait_us = 0;  // of kWait: from the clock on

  // From bit 0: action 3 | forced 1 | codec + 1: 8 | node + 1: 12; the upper half is the wait in microseconds of kWait.
  int64_t code() const {
    return static_cast<int64_t>(action) | static_cast<int64_t>(forced) << 3 | static_cast<int64_t>(codec + 1) << 4 |
           static_cast<int64_t>(node + 1) << 12 | wait_us << 32;
  }
};
inline constexpr int64_t kMaxWaitUs = (int64_t{1} << 31) - 1;

inline constexpr int64_t kNever = kInt64Max;  // of next_tick
inline constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// What is known of one task at one exit; NaN and -1 stand for "not given". A policy reads only what its rule needs.
struct Sample {
  double confidence = kNone;  // the exit's score u, larger = more confident
  double gate = kNone;        // learned exit probability, [0, 1]
  double delta = kNone;       // distance to the previous exit's feature, >= 0
  int32_t label = -1;         // predicted class
  int32_t pool = -1;          // difficulty pool: 0 easy, 1 moderate, 2 hard
  double max_prob = kNone, margin = kNone, entropy = kNone, lse = kNone;  // for custom rules
};

// A class of tenants: what its tasks are promised and what their accuracy is worth beside that of others.
struct TenantClass {
  int64_t deadline = kNoDeadline;  // ns
  double quantile = 0.0, weight = 1.0;
};

// The numbers that the policies by name read; docs/scheduler.md says which belongs to which and where it comes from.
struct Params {
  int64_t patience = 2;                    // patience
  std::vector<double> delta;               // distree: [K]
  bool students = true;                    // distree: every node runs its own student of the segment
  int adapt = 0;                           // mdi_exit: 0 none, 1 rate (Alg 3), 2 threshold (Alg 4)
  bool raw_offload = true;                 // mdi_exit
  int64_t t_o = 10, t_q1 = 5, t_q2 = 20, q_max = 1000, takeover = 4;
  double a = 0.2, b = 0.1, z = 0.2, period = 0.5, t_min = 0.5, t_max = 0.99, mu = 0.01, mu_min = 1e-3, mu_max = 10.0, weight = 0.2, report_age = 3.0;
  double alpha = 0.75;                     // dimee, splitee
  std::vector<int64_t> tiers = {0, 0, 0};  // dimee: mobile, edge, cloud
  std::vector<int64_t> cuts = {0, 1};      // dimee: the exits l1 and l2
  double layer_cost = 0.1, offload_cost = 0.3, explore = 1.0;  // splitee
  int64_t cloud = 0;
  bool side_information = false;
  bool train = false, whole_batch = false;  // daisy
  int range = 0;                            // daisy: 0 avg, 1 min_max, 2 threshold
  double u_threshold = 0.5, inf_threshold = 0.2;
  std::vector<int64_t> counts;  // daisy: [K + 1] training exits
};

struct StatsRecord;
struct TaskRecord;
struct NodeRecord;
using RuleFunction = int8_t (*)(const StatsRecord*, const TaskRecord*, const NodeRecord*);
using PolicyFunction = int64_t (*)(const StatsRecord*, const TaskRecord*, const NodeRecord*);

// Profile, QoS and place of one scheduler, copied in. S segments, N nodes, NB batch sizes, NC codecs, K = S - 1 exits;
// arrays are row-major. Units: seconds, bytes, bit/s; deadline in ns.
struct Config {
  int segments = 0, nodes = 0, codecs = 0, bins = 0;
  std::vector<int64_t> batch_sizes;               // [NB], rising
  std::vector<double> mean, spread;               // [S, N, NB]
  std::vector<double> wire_bytes, codec_seconds;  // [S, NC]
  std::vector<double> bandwidth, delay;           // [N, N], 0 bit/s = no link
  std::vector<double> gain;                       // [K, bins] or empty
  double gain_low = 0.0, gain_high = 1.0;
  std::vector<uint8_t> hosts;      // [S, N]
  std::vector<int64_t> medium;     // [N] or empty: links from here to nodes of one medium pass one message after another
  std::vector<double> thresholds;  // [K], rounded to fp32 as the kernels hold them; +inf switches an exit off
  int64_t deadline = kNoDeadline;
  double quantile = 2.3263478740408408;  // z of the hit rate (0.99)
  double cost_weight = 0.0, max_drop = kInf;
  int64_t answer_bytes = 64;
  std::string policy = "deadline";
  int node = 0, home = 0;
  int64_t max_tasks = 65536;
  uint64_t seed = 0;  // of the policies' own random stream
  double weight = 1.0;                     // of the QoS class 0
  std::vector<TenantClass> classes;        // of admit(tenant = 1, 2, ...); class 0 is the QoS itself
  std::vector<double> surcharge, send_ns;  // [N] or empty: cost of a second of compute, and of a byte sent, in seconds' worth
  int64_t eager_limit = int64_t{1} << 20;  // S * N * N up to which the tables follow at once; beyond, tick() brings them up
  Params params;
  RuleFunction rule = nullptr;      // replaces the policy's exit rule
  bool rule_reads_node = true;      // false: it is handed a blank record of the node
  PolicyFunction custom = nullptr;  // the place function of policy "custom"

  // Throws std::invalid_argument that names the field, what was got and what was expected.
  void check() const;
};

struct alignas(64) Counters {
  int64_t admitted = 0, observed = 0, continued = 0, offloaded = 0, exits = 0, finished = 0, late = 0, forced = 0;  // often: one cache line
  int64_t refused_full = 0, refused_late = 0, rejected = 0, stale = 0, invalid = 0, clock_backwards = 0, outliers = 0, ignored = 0, waited = 0,
          refused_queue = 0, changes = 0;
};

inline int64_t add_saturated(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? (b > 0 ? kInt64Max : kInt64Min) : sum;
}

inline int64_t subtract_saturated(int64_t a, int64_t b) {
  int64_t difference;
  return __builtin_sub_overflow(a, b, &difference) ? (b < 0 ? kInt64Max : kInt64Min) : difference;
}

}  // namespace fastee::sched
