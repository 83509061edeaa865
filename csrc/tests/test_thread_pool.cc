// Large calls over many threads: the same bits for every count, from several threads at once, again in a child after fork(), and
// asleep in between.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace {
#if defined(__SANITIZE_THREAD__) || defined(FASTEE_EMULATED)
constexpr bool kFork = false;  // neither ThreadSanitizer nor qemu-user 7 follows a threaded program over fork()
#else
constexpr bool kFork = true;
#endif

std::vector<float> values(int64_t n, uint64_t state) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& f : v) f = static_cast<float>(static_cast<int>((state = state * 6364136223846793005u + 1442695040888963407u) >> 41) - 4194304) * 0x1p-21f;
  return v;
}

// Everything that uses the pool, once, on shapes that do not divide evenly; the outputs as one string of bytes.
std::string everything() {
  constexpr int64_t kRows = 203, kInner = 20, kFeatures = 420, kClasses = 130;
  static auto x = values(kRows * kFeatures * kInner, 1), w = values(kClasses * kFeatures, 2);
  std::string all;
  auto keep = [&](const auto& v) { all.append(reinterpret_cast<const char*>(v.data()), v.size() * sizeof v[0]); };
  Tensor tx(x.data(), {kRows, kFeatures, kInner}), tw(w.data(), {kClasses, kFeatures}), flat(x.data(), {kRows, kFeatures * kInner});
  std::vector<int64_t> label(kRows), index(kRows);
  std::vector<float> p(kRows), margin(kRows), h(kRows), lse(kRows), p2(kRows), confidence(kRows), logits(kRows * kClasses);
  std::vector<uint8_t> exits(kRows);
  int64_t count = -1;
  fastee_head head{};
  head.pool = FASTEE_POOL_MEAN, head.norm = FASTEE_NORM_LAYER, head.measure = FASTEE_MARGIN, head.temperature = 1.0f, head.threshold = 0.5f, head.weight = &tw;
  const fastee_head_out out{{label.data(), p.data(), margin.data(), h.data(), lse.data(), p2.data()}, confidence.data(), exits.data(), logits.data(), index.data(), &count};
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_OK);
  keep(label), keep(p), keep(margin), keep(h), keep(lse), keep(p2), keep(confidence), keep(logits), keep(exits), keep(index);

  constexpr int64_t kWide = 7000;  // few rows, many classes: shared out by tiles of classes
  static auto wide = values(kWide * kFeatures, 3);
  Tensor few(x.data(), {3, kFeatures, 1}), many(wide.data(), {kWide, kFeatures});
  std::vector<float> all_logits(3 * kWide);
  fastee_head_out wide_out = out;
  wide_out.logits = all_logits.data();
  head.weight = &many;
  CHECK(fastee_exit_head(&few, &head, &wide_out, nullptr) == FASTEE_OK);
  head.weight = &tw;
  keep(label), keep(p), keep(margin), keep(h), keep(lse), keep(p2), keep(confidence), keep(all_logits), keep(exits), keep(index);

  CHECK(fastee_row_stats(&flat, 1.0f, &out.stats, nullptr) == FASTEE_OK);
  keep(label), keep(p), keep(margin), keep(h), keep(lse), keep(p2);

  std::vector<int8_t> q(x.size());
  std::vector<float> scale(kRows * 20), back(x.size());
  Tensor tq(q.data(), {kRows, kFeatures * kInner}, kDLInt, 8), ts(scale.data(), {kRows, 20}), tb(back.data(), {kRows, kFeatures * kInner});
  CHECK(fastee_quantize_rows(&flat, FASTEE_INT8, kFeatures, &tq, &ts, nullptr) == FASTEE_OK);
  CHECK(fastee_dequantize_rows(&tq, &ts, FASTEE_INT8, kFeatures, &tb, nullptr) == FASTEE_OK);
  keep(q), keep(scale), keep(back);

  int64_t offset = 0, nbytes = 0;
  std::vector<uint8_t> wire(static_cast<size_t>(kRows * (4 + kFeatures * kInner)));
  CHECK(fastee_exit_pack(&tx, &head, FASTEE_INT8, 0, &out, wire.data(), static_cast<int64_t>(wire.size()), &offset, &nbytes, nullptr) == FASTEE_OK);
  all.append(reinterpret_cast<const char*>(wire.data()) + offset, static_cast<size_t>(nbytes));
  keep(exits), keep(index);

  const int64_t bound = fastee_pack_planes_bound(static_cast<int64_t>(x.size()), 4);
  std::vector<uint8_t> planes(static_cast<size_t>(bound));
  CHECK(fastee_pack_planes(&tx, planes.data(), bound, &nbytes, nullptr) == FASTEE_OK);
  all.append(reinterpret_cast<const char*>(planes.data()), static_cast<size_t>(nbytes));
  CHECK(fastee_unpack_planes(planes.data(), nbytes, 0, &tb, nullptr) == FASTEE_OK && back == x);
  planes[static_cast<size_t>(nbytes) / 3 * 2] ^= 0xff, planes[static_cast<size_t>(nbytes) - 1] ^= 0xff;  // whatever comes of it comes on every count
  all += fastee_unpack_planes(planes.data(), nbytes, 0, &tb, nullptr) == FASTEE_OK ? "" : fastee_last_error();

  CHECK(fastee_mean_entropy(&tx, nullptr, 1.0f, lse.data(), nullptr) == FASTEE_OK);
  CHECK(fastee_dequantize_rows(&tq, &ts, FASTEE_INT8, kFeatures, &tb, nullptr) == FASTEE_OK);
  CHECK(fastee_feature_delta(&flat, &tb, p.data(), nullptr) == FASTEE_OK);
  keep(lse), keep(p);

  std::vector<int64_t> at(kRows);
  for (int64_t i = 0; i < kRows; ++i) at[static_cast<size_t>(i)] = i * i % 61;  // many equal ones: the last must stay
  Tensor ti(at.data(), {kRows}, kDLInt, 64);
  CHECK(fastee_gather_rows(&flat, &ti, &tb, nullptr) == FASTEE_OK);
  keep(back);
  CHECK(fastee_scatter_rows(&tb, &ti, &flat, nullptr) == FASTEE_OK);
  keep(back);
  return all;
}

double cpu_seconds() {
  rusage u;
  getrusage(RUSAGE_SELF, &u);
  return static_cast<double>(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * static_cast<double>(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}
}  // namespace

int main() {
  CHECK(fastee_get_num_threads() >= 1);
  CHECK(fastee_set_num_threads(-1) == FASTEE_INVALID_ARGUMENT && std::strstr(fastee_last_error(), "set_num_threads: count must lie in [0, 1024], got -1"));
  CHECK(fastee_set_num_threads(1025) == FASTEE_INVALID_ARGUMENT);
  CHECK(fastee_set_num_threads(1) == FASTEE_OK && fastee_get_num_threads() == 1);
  const std::string one = everything();
  for (int n : {2, 3, 8, 2}) {
    CHECK(fastee_set_num_threads(n) == FASTEE_OK && fastee_get_num_threads() == n);
    for (int i = 0; i < 3; ++i) CHECK(everything() == one);
  }

  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(cpu_seconds() - before < 0.1);  // eight workers that spun would take 0.3 to 2.4 s

  std::vector<std::thread> callers;
  std::vector<int> wrong(4);
  for (int id = 0; id < 4; ++id)
    callers.emplace_back([&, id] {
      for (int i = 0; i < 3; ++i) wrong[static_cast<size_t>(id)] += everything() != one;
    });
  if (kFork) {  // while they run: whatever the pool's locks hold, the child gets on
    for (int i = 0; i < 3; ++i) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(60);
        _exit(everything() == one && everything() == one ? 0 : 1);
      }
      int status = -1;
      CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
  }
  std::printf("fork: %s\n", kFork ? "three children" : "not tried here");
  for (std::thread& t : callers) t.join();
  for (int w : wrong) CHECK(w == 0);
  return report("test_thread_pool");
}
