// When a message that starts at a time has left: integer arithmetic, so that every machine agrees.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "sim/world.h"

namespace fastee::sim {

// ns that `bytes` take at `rate` bit/s, rounded up.
inline int64_t wire_ns(int64_t bytes, int64_t rate) {
  return static_cast<int64_t>((static_cast<__int128>(bytes) * 8'000'000'000 + rate - 1) / rate);
}

// End of a message of `bytes` that starts at `start` >= 0 on an idle medium.
inline int64_t leave_at(const Medium& medium, const std::vector<Trace>& traces, int64_t start, int64_t bytes) {
  if (bytes <= 0) return start;
  if (medium.trace < 0) return start + wire_ns(bytes, medium.rate);
  const Trace& t = traces[medium.trace];
  const int64_t period = t.at.back(), total = t.cum.back();
  const int64_t from = start + medium.offset;
  const int64_t cycle = from / period, phase = from % period;
  const size_t i = std::upper_bound(t.at.begin(), t.at.end(), phase) - t.at.begin() - 1;
  const auto part = [&](size_t j) { return std::pair(t.at[j + 1] - t.at[j], t.cum[j + 1] - t.cum[j]); };
  const auto [span, gain] = part(i);
  const int64_t passed = t.cum[i] + static_cast<int64_t>(static_cast<__int128>(phase - t.at[i]) * gain / span);
  const int64_t target = passed + bytes;
  const int64_t more = (target - 1) / total;  // whole periods before the one in which the last byte passes
  const int64_t rest = target - more * total;
  const size_t j = std::lower_bound(t.cum.begin(), t.cum.end(), rest) - t.cum.begin() - 1;  // cum[j] < rest <= cum[j + 1]
  const auto [width, bulk] = part(j);
  const int64_t inside = static_cast<int64_t>((static_cast<__int128>(rest - t.cum[j]) * width + bulk - 1) / bulk);
  return (cycle + more) * period + t.at[j] + inside - medium.offset;
}

}  // namespace fastee::sim
