// EWMA of measured / expected with an outlier guard and change detection (two-sided CUSUM), and of its relative variance.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sched/types.h"

namespace fastee::sched {

// What an observation touches is one cache line, what the tables are made of the next: a simulated cluster holds thousands of these.
struct alignas(64) Estimator {
  static constexpr double kWeight = 0.1;         // of a new value, once the first eight are in
  static constexpr double kOutlierFactor = 4.0;  // a value this many times off is skipped
  static constexpr int kOutlierStreak = 5;       // the fifth in a row is believed
  static constexpr double kDrift = 0.1, kAlarm = 0.5;  // CUSUM of the relative error beyond kDrift + its usual size
  static constexpr double kPublishChange = 0.02;
  static constexpr uint32_t kPublishEvery = 16;
  static constexpr uint16_t kLearned = 8;

  double ratio = 1.0, seen = 0.0, kept = 1.0;     // now; kept = weight left on the profile's own spread
  double noise = 0.01, above = 0.0, below = 0.0;  // of the change detector: usual squared error, the two sums
  double used_ratio = 1.0;                        // used_*: what the tables hold
  uint32_t count = 0;
  uint16_t fresh = 0, streak = 0;                 // fresh: values since the last change, at most kLearned
  double used_seen = 0.0, used_kept = 1.0, used_root = 0.0;  // used_root: of used_seen

  // Takes one ratio in; true when the published value changed.
  bool update(double measured, Counters& counters) {
    const double r = std::min(std::max(measured, 1e-6), 1e6);
    ++counters.observed;
    if (r < ratio / kOutlierFactor || r > ratio * kOutlierFactor) {
      ++counters.outliers;
      if (++streak < kOutlierStreak) return false;
      ratio = r;
      above = below = 0.0;
    } else {
      const double off = r / ratio - 1.0;
      const double usual = kDrift + std::sqrt(noise);
      above = std::max(0.0, above + off - usual);
      below = std::max(0.0, below - off - usual);
      noise = noise + 0.05 * (std::min(off * off, 9.0 * noise) - noise);
      if (above > kAlarm || below > kAlarm) {  // the world has changed: learn again as fast as at first
        ++counters.changes;
        above = below = 0.0;
        fresh = 0;
      }
      const double weight = fresh < kLearned ? 1.0 / (static_cast<double>(fresh) + 2.0) : kWeight;
      seen = seen * (1.0 - weight) + weight * (off * off);
      kept = kept * (1.0 - weight);
      ratio = ratio + weight * (r - ratio);
    }
    streak = 0;
    ++count;
    fresh = std::min<uint16_t>(fresh + 1, kLearned);
    if (count % kPublishEvery != 0 && std::fabs(ratio - used_ratio) <= kPublishChange * used_ratio) return false;
    used_ratio = ratio;
    used_seen = seen;
    used_root = std::sqrt(seen);
    used_kept = kept;
    return true;
  }
};

}  // namespace fastee::sched
