// Workers for large calls. Nothing runs until a call has enough work for two threads; workers spin for a few microseconds after
// a job and then sleep. One call at a time has the workers: a call from a second thread, or from inside a job, runs on its own
// thread. What is computed never depends on the number of threads: callers split rows, never a sum.
#pragma once
#include <cstdint>

namespace fastee {

int num_threads();                // threads of a large call, its own included
bool set_num_threads(int count);  // 0 = FASTEE_NUM_THREADS, else the cores this process may use; false outside [0, kMostThreads]
constexpr int kMostThreads = 1024;

// Call body(context, block) for every block of [0, blocks) on up to `threads` threads; returns when all are done.
void run_blocks(int64_t blocks, int threads, void (*body)(void* context, int64_t block), void* context);

// Work is counted in elements read once: 512 Ki are 40 us of quantize_rows (0.08 ns an element) or 75 us of row_stats (counted twice) on
// one Zen 5 thread, AVX-512. A worker that sleeps starts 40 to 65 us after it is called (Zen 4, a virtual machine whose idle cores are
// halted), so a thread's share is cut into pieces: who comes late finds work left, and who is done first waits for one piece at most.
constexpr double kParallelWork = 512 << 10;
constexpr int kPieces = 4;
constexpr int64_t kAnyLength = INT64_MAX / 2;  // of a range

// Call f(first, last) on disjoint ranges that cover [0, rows), whole multiples of `grain` but for the last, in parallel when
// rows * work_per_row is large. Ranges are no longer than `most` rows (>= grain) when split.
template <typename F>
void for_rows(int64_t rows, double work_per_row, int64_t grain, int64_t most, F f) {
  const double work = static_cast<double>(rows) * work_per_row;
  int threads = work < kParallelWork || rows <= grain ? 1 : num_threads();
  if (threads > work / (kParallelWork / 2)) threads = static_cast<int>(work / (kParallelWork / 2));
  if (threads <= 1) return f(int64_t{0}, rows);
  int64_t block = (rows + kPieces * threads - 1) / (kPieces * threads);
  block = (block + grain - 1) / grain * grain;
  if (block > most) block = most < grain ? grain : most / grain * grain;
  struct Call {
    F& f;
    int64_t rows, block;
  } call{f, rows, block};
  run_blocks((rows + block - 1) / block, threads,
             [](void* context, int64_t at) {
               const Call& c = *static_cast<Call*>(context);
               const int64_t first = at * c.block;
               c.f(first, first + c.block < c.rows ? first + c.block : c.rows);
             },
             &call);
}
}  // namespace fastee
