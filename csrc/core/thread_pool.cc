#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#include "core/status.h"

namespace fastee {
namespace {

constexpr std::chrono::microseconds kSpin{5};  // a job that follows at once finds its workers awake; longer only heats the machine

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on most cores
#endif
}

template <typename Condition>
bool spin_until(Condition done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t blocks;
  int seats;  // workers that may still join; under the pool's mutex
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) body(context, block);
  }
};

thread_local bool inside = false;  // this thread runs a block of a job, or hands one out

// Never destroyed, its threads are detached: a process ends without joining them. After fork() the child leaves its parent's
// pool, whose threads do not exist there and whose locks may be held, and makes its own when it needs one.
class Pool {
 public:
  void run(Job& job, int threads) {
    grow(threads - 1);
    job.seats = threads - 1;
    part_from(sched_getcpu());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_relaxed);
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // who has not come by now finds nothing
    if (active_.load(std::memory_order_relaxed) == 0) return;
    lock.unlock();
    spin_until([&] { return active_.load(std::memory_order_acquire) == 0; });
    lock.lock();
    done_.wait(lock, [&] { return active_.load(std::memory_order_relaxed) == 0; });
  }

  std::atomic<bool> taken{false};

 private:
  struct Worker {
    pthread_t thread{};
    std::atomic<int> core{-1};  // where it fell asleep
  };

  // Only the one call that has the pool comes here, as into grow(). Linux wakes a sleeper on the core where it fell asleep and, with both
  // cores of two busy of late, looks for no idle one: a worker that once lay on the caller's core waited there behind the caller, call
  // after call, 7 ms of an 11 ms share (Zen 4, Linux 6.18). Such a worker is sent to the other cores that the caller may use.
  void part_from(int core) {
    for (int i = 0; i < size_; ++i) {
      Worker& worker = workers_[i];
      if (worker.core.load(std::memory_order_relaxed) != core) continue;
      cpu_set_t others;
      if (sched_getaffinity(0, sizeof others, &others) != 0) return;
      CPU_CLR(core, &others);
      if (CPU_COUNT(&others)) pthread_setaffinity_np(worker.thread, sizeof others, &others);
    }
  }

  void grow(int wanted) {
    while (size_ < wanted) {
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the program's, not the workers'
      bool made = true;
      try {
        Worker& worker = workers_[size_];
        std::thread thread([this, &worker] { live(worker); });
        worker.thread = thread.native_handle();
        thread.detach();
      } catch (const std::exception&) {
        made = false;  // no more threads to be had: the call runs on those that there are
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (!made) return;
      ++size_;
    }
  }

  [[noreturn]] void live(Worker& self) {
    inside = true;
    uint64_t seen = 0;
    for (;;) {
      self.core.store(sched_getcpu(), std::memory_order_relaxed);
      spin_until([&] { return generation_.load(std::memory_order_relaxed) != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      if (!job_ || job_->seats == 0) continue;
      Job& job = *job_;
      --job.seats;
      active_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work();
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;                    // under mutex_
  std::atomic<uint64_t> generation_{0};  // written under mutex_, read by those who spin
  std::atomic<int> active_{0};           // workers inside the job; likewise
  Worker workers_[kMostThreads];
  int size_ = 0;
};

std::atomic<Pool*> shared{nullptr};

Pool& pool() {
  Pool* found = shared.load(std::memory_order_acquire);
  if (found) return *found;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr, std::memory_order_relaxed); });
  static_cast<void>(registered);
  Pool* made = new Pool;
  if (shared.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *found;
}

int default_threads() {
  if (const char* wanted = std::getenv("FASTEE_NUM_THREADS")) {
    char* end;
    const long n = std::strtol(wanted, &end, 10);
    if (*wanted && !*end && n >= 1 && n <= kMostThreads) return static_cast<int>(n);
  }
  cpu_set_t allowed;  // a pinned process gets the cores that it may use, not those of the machine
  const int cores = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : static_cast<int>(std::thread::hardware_concurrency());
  return cores < 1 ? 1 : cores > kMostThreads ? kMostThreads : cores;
}

std::atomic<int> wanted_threads{0};  // 0 = not asked yet
}  // namespace

int num_threads() {
  const int n = wanted_threads.load(std::memory_order_relaxed);
  if (n) return n;
  int none = 0;
  wanted_threads.compare_exchange_strong(none, default_threads(), std::memory_order_relaxed);
  return wanted_threads.load(std::memory_order_relaxed);
}

bool set_num_threads(int count) {
  if (count < 0 || count > kMostThreads) return false;
  wanted_threads.store(count ? count : default_threads(), std::memory_order_relaxed);
  return true;
}

void run_blocks(int64_t blocks, int threads, void (*body)(void*, int64_t), void* context) {
  if (threads > blocks) threads = static_cast<int>(blocks);
  if (threads > 1 && !inside) {
    Pool& p = pool();
    if (!p.taken.exchange(true, std::memory_order_acquire)) {
      Job job{body, context, blocks, 0};
      inside = true;
      p.run(job, threads);
      inside = false;
      p.taken.store(false, std::memory_order_release);
      return;
    }
  }
  for (int64_t i = 0; i < blocks; ++i) body(context, i);
}
}  // namespace fastee

extern "C" int32_t fastee_get_num_threads(void) { return fastee::num_threads(); }

extern "C" fastee_status fastee_set_num_threads(int32_t count) {
  if (fastee::set_num_threads(count)) return FASTEE_OK;
  return fastee::fail(FASTEE_INVALID_ARGUMENT, "set_num_threads: count must lie in [0, " + std::to_string(fastee::kMostThreads) + "], got " + std::to_string(count));
}
