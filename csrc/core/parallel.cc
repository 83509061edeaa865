#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "core/scratch.h"
#include "core/thread_pool.h"

namespace fastee::parallel {
namespace {
constexpr double kElementsPerByte = 0.25;

template <typename T>
T* past(T* p, int64_t n) { return p ? p + n : nullptr; }
}  // namespace

const void* past_elements(const void* p, int element, int64_t n) {
  const int64_t size = element == cpu::kF32 ? 4 : element == cpu::kI8 ? 1 : 2;
  return static_cast<const char*>(p) + n * size;
}

template <typename Args>
void skip_stats(Args& a, int64_t rows) {
  a.label += rows;
  a.max_prob = past(a.max_prob, rows);
  a.margin = past(a.margin, rows);
  a.entropy = past(a.entropy, rows);
  a.lse = past(a.lse, rows);
  a.entropy_p2 = past(a.entropy_p2, rows);
}

cpu::HeadArgs slice(cpu::HeadArgs a, int64_t first, int64_t last) {
  a.x.data = past_elements(a.x.data, a.x.element, first * a.x.row_stride);
  a.x.rows = last - first;
  a.x.mask = past(a.x.mask, first * a.x.mask_stride);
  skip_stats(a, first);
  a.confidence = past(a.confidence, first);
  a.logits = past(a.logits, first * a.classes);
  a.exits = past(a.exits, first);
  return a;
}

bool exit_head(cpu::HeadArgs& args) {
  const cpu::Kernels& k = cpu::kernels();
  auto ran = [&](cpu::HeadArgs& a) {
    a.scratch = static_cast<float*>(Scratch::here().reserve(sizeof(float) * static_cast<size_t>(cpu::head_scratch(a.x.rows, a.x.features, a.classes))));
    if (a.scratch) k.exit_head(a);
    return a.scratch != nullptr;
  };
  // A multiply-add counts a twelfth of an element, on the safe side (0.011 to 0.014 ns against 0.08 ns, Zen 5, AVX-512); pooling
  // reads each element once.
  const double d = static_cast<double>(args.x.features), rows = static_cast<double>(args.x.rows);
  const double pooling = d * static_cast<double>(args.x.inner), product = d * static_cast<double>(args.classes) / 12 + 2 * static_cast<double>(args.classes);
  if (args.x.rows == 1 && (args.classes <= cpu::kClassTile || product < kParallelWork)) return ran(args);  // nothing to share out
  std::atomic<bool> memory{true};
  auto run = [&](cpu::HeadArgs& a) {
    if (!ran(a)) memory.store(false, std::memory_order_relaxed);
  };
  // By classes, a thread reads only its share of the weights, but pools every row: where there are tiles enough for even shares, or too
  // few rows, and pooling is little beside a share's products. By rows, loaded weights serve as many rows as they can: 64 rows a range, or a
  // whole chunk where the L2 cache holds no 64 (4096 features in ranges of 64 took 12.4 instead of 11.2 ms, Zen 4).
  const int64_t tiles = (args.classes + cpu::kClassTile - 1) / cpu::kClassTile, most = cpu::row_chunk(args.x.features, args.classes);
  const int threads = num_threads();
  if (tiles > 1 && threads > 1 && rows * product >= kParallelWork && pooling * kPieces * threads < product &&
      (tiles >= kPieces * threads || args.x.rows < 8 * threads)) {
    const std::unique_ptr<cpu::RowState[]> states(new (std::nothrow) cpu::RowState[static_cast<size_t>(tiles * args.x.rows)]);
    if (!states) return false;
    cpu::HeadArgs all = args;
    all.states = states.get();
    for_rows(tiles, rows * product / static_cast<double>(tiles), 1, tiles, [&](int64_t first, int64_t last) {
      cpu::HeadArgs a = all;
      a.first_tile = first, a.last_tile = last;
      run(a);
    });
    if (memory) k.finish_head(all);
  } else {
    const int64_t enough = d * 4 * 64 > 512 << 10 ? most : 64, grain = std::clamp<int64_t>(args.x.rows / threads, 8, std::min(most, enough));
    for_rows(args.x.rows, pooling + product, grain, most, [&](int64_t first, int64_t last) {
      if (last - first == args.x.rows) return run(args);  // as it stands: copies are a twentieth of a small head
      cpu::HeadArgs a = slice(args, first, last);
      run(a);
    });
  }
  return memory.load(std::memory_order_relaxed);
}

void row_stats(const cpu::RowStatsArgs& args) {
  const cpu::Kernels& k = cpu::kernels();
  for_rows(args.rows, 2.0 * static_cast<double>(args.classes), 1, kAnyLength, [&](int64_t first, int64_t last) {
    cpu::RowStatsArgs a = args;
    a.logits = past_elements(a.logits, a.element, first * a.row_stride);
    a.rows = last - first;
    skip_stats(a, first);
    k.row_stats(a);
  });
}

void gather_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes) {
  for_rows(n, 2 * kElementsPerByte * static_cast<double>(bytes), 1, kAnyLength, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(to + i * to_stride, from + index[i] * from_stride, static_cast<size_t>(bytes));
  });
}

void scatter_rows(char* to, int64_t to_stride, int64_t to_rows, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes) {
  // Each thread owns a range of destinations and walks all indices in order.
  const double work = 2 * kElementsPerByte * static_cast<double>(bytes) * static_cast<double>(n);
  for_rows(to_rows, to_rows ? work / static_cast<double>(to_rows) : 0, 1, kAnyLength, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < n; ++i)
      if (index[i] >= first && index[i] < last) std::memcpy(to + index[i] * to_stride, from + i * from_stride, static_cast<size_t>(bytes));
  });
}
}  // namespace fastee::parallel
