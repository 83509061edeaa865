// The C ABI as a stranger calls it: guard bytes around every output, refused arguments with their texts, several threads at once,
// every instruction set of this CPU.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <array>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace {
constexpr unsigned char kGuard = 0xa5;

// n elements with 64 guard bytes on both sides.
template <typename T>
struct Guarded {
  explicit Guarded(size_t n) : n(n), raw(n * sizeof(T) + 128, kGuard) {}
  T* data() { return reinterpret_cast<T*>(raw.data() + 64); }
  bool intact() const {
    for (size_t i = 0; i < 64; ++i)
      if (raw[i] != kGuard || raw[raw.size() - 1 - i] != kGuard) return false;
    return true;
  }
  size_t n;
  std::vector<unsigned char> raw;
};

bool says(const char* part) { return std::string(fastee_last_error()).find(part) != std::string::npos; }

fastee_head plain(const DLTensor* weight, const DLTensor* bias, fastee_pool_kind pool = FASTEE_POOL_MEAN) {
  return {pool, FASTEE_NORM_NONE, FASTEE_MAX_PROB, 0.0f, 1.0f, 0.5f, weight, bias, nullptr, nullptr, nullptr, nullptr};
}

void head_writes_its_outputs_only() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (auto [rows, features, inner, classes] : {std::array<int64_t, 4>{0, 8, 4, 3}, std::array<int64_t, 4>{1, 256, 64, 10}, std::array<int64_t, 4>{5, 33, 49, 7},
                                                std::array<int64_t, 4>{67, 16, 1, 1030}, std::array<int64_t, 4>{3, 1, 1, 1}}) {
    std::vector<float> x(rows * features * inner), w(classes * features), b(classes);
    for (auto* v : {&x, &w, &b})
      for (float& f : *v) f = normal(random);
    x.reserve(1), w.reserve(1);
    Guarded<int64_t> label(rows), index(rows), count(1);
    Guarded<float> confidence(rows), max_prob(rows), margin(rows), entropy(rows), lse(rows), h2(rows), logits(rows * classes);
    Guarded<uint8_t> exits(rows);
    Tensor tx(x.data(), {rows, features, inner}), tw(w.data(), {classes, features}), tb(b.data(), {classes});
    fastee_head head = plain(&tw, &tb);
    fastee_head_out out{{label.data(), max_prob.data(), margin.data(), entropy.data(), lse.data(), h2.data()},
                        confidence.data(), exits.data(), logits.data(), index.data(), count.data()};
    CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_OK);
    CHECK(label.intact() && index.intact() && count.intact() && exits.intact() && logits.intact());
    CHECK(confidence.intact() && max_prob.intact() && margin.intact() && entropy.intact() && lse.intact() && h2.intact());
    int64_t stay = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double z_max = -1e300, sum = 0;
      std::vector<double> z(classes);
      for (int64_t c = 0; c < classes; ++c) {
        z[c] = b[c];
        for (int64_t d = 0; d < features; ++d) {
          double mean = 0;
          for (int64_t i = 0; i < inner; ++i) mean += x[(r * features + d) * inner + i];
          z[c] += mean / inner * w[c * features + d];
        }
        z_max = std::max(z_max, z[c]);
      }
      for (double v : z) sum += std::exp(v - z_max);
      CHECK(std::abs(confidence.data()[r] - 1 / sum) < 1e-5);
      CHECK(std::abs(lse.data()[r] - (z_max + std::log(sum))) < 1e-4);
      stay += !exits.data()[r];
    }
    CHECK(*count.data() == stay);
  }
}

void refusals_name_the_argument() {
  float x[8] = {}, w[6] = {};
  int64_t label[4], count;
  uint8_t exits[4];
  Tensor tx(x, {2, 4}), tw(w, {2, 3}), good(w, {1, 4});
  fastee_head_out out{{label, nullptr, nullptr, nullptr, nullptr, nullptr}, nullptr, exits, nullptr, nullptr, nullptr};
  fastee_head head = plain(&tw, nullptr);
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("exit_head: weight must be [C, 4]"));
  head = plain(nullptr, nullptr);
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("weight must be float32, bfloat16 or float16 [C, D], got NULL"));
  CHECK(fastee_exit_head(nullptr, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT);
  CHECK(fastee_exit_head(&tx, nullptr, &out, nullptr) == FASTEE_INVALID_ARGUMENT);
  head = plain(&good, nullptr);
  head.temperature = 0;
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("temperature must be positive"));
  head = plain(&good, nullptr);
  head.threshold = std::nanf("");
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("threshold must not be NaN"));
  head = plain(&good, nullptr);
  head.measure = static_cast<fastee_measure>(9);
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("measure must be 0 to 3, got 9"));
  head = plain(&good, nullptr);
  head.pool = static_cast<fastee_pool_kind>(-1);
  CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("pool must be 0 to 4"));
  Tensor cuda(x, {2, 4});
  cuda.t.device.device_type = kDLCUDA;
  head = plain(&good, nullptr);
  CHECK(fastee_exit_head(&cuda, &head, &out, nullptr) == FASTEE_WRONG_TYPE && says("on the CPU"));
  Tensor wide_type(x, {2, 4}, kDLFloat, 64), negative(x, {-2, 4});
  CHECK(fastee_exit_head(&wide_type, &head, &out, nullptr) == FASTEE_WRONG_TYPE && says("got float64 [2, 4]"));
  CHECK(fastee_exit_head(&negative, &head, &out, nullptr) == FASTEE_INVALID_ARGUMENT && says("sizes >= 0"));
  Tensor wide(x, {4, 2}, kDLFloat, 32);
  int64_t strides[2] = {1, 4};
  wide.t.strides = strides;
  Tensor pair(w, {1, 2});
  head = plain(&pair, nullptr);
  CHECK(fastee_exit_head(&wide, &head, &out, nullptr) == FASTEE_UNSUPPORTED && says("rows of x must be contiguous"));
  int64_t at[2] = {0, 7};
  Tensor index(at, {2}, kDLInt, 64), mask(exits, {4}, kDLUInt, 8), rows(x, {2, 4}), two(w, {2, 3});
  CHECK(fastee_gather_rows(&tx, &index, &rows, nullptr) == FASTEE_INVALID_ARGUMENT && says("index must lie in [0, 2), got 7"));
  CHECK(fastee_compact(&mask, nullptr, &count, nullptr) == FASTEE_INVALID_ARGUMENT);
  at[1] = 1;
  CHECK(fastee_scatter_rows(&rows, &index, &two, nullptr) == FASTEE_INVALID_ARGUMENT && says("rows must be"));
  int8_t q[8];
  float scale[8];
  Tensor tq(q, {2, 4}, kDLInt, 8), ts(scale, {2});
  CHECK(fastee_quantize_rows(&tx, FASTEE_INT8, 3, &tq, &ts, nullptr) == FASTEE_INVALID_ARGUMENT && says("group must divide the 4 elements"));
  CHECK(fastee_quantize_rows(&tx, FASTEE_INT8, 2, &tq, &ts, nullptr) == FASTEE_INVALID_ARGUMENT && says("scale must be float32 with 2 x 2"));
  CHECK(fastee_select_isa("mmx") == FASTEE_UNSUPPORTED && says("got 'mmx'"));
  CHECK(fastee_abi_version() == FASTEE_ABI_VERSION);
}

void compaction_and_bytes_stay_inside() {
  for (int64_t n : {0, 1, 2, 15, 16, 17, 255, 4096}) {
    Guarded<int64_t> index(n), count(1);
    std::vector<uint8_t> keep(n ? n : 1);
    for (int64_t i = 0; i < n; ++i) keep[i] = i % 3 == 0 ? 7 : 0;
    Tensor mask(keep.data(), {n}, kDLBool, 8);
    CHECK(fastee_compact(&mask, index.data(), count.data(), nullptr) == FASTEE_OK);
    CHECK(index.intact() && count.intact() && *count.data() == (n + 2) / 3);
    std::vector<bool> seen(n);
    for (int64_t i = 0; i < n; ++i) seen[index.data()[i]] = true;
    for (int64_t i = 0; i < n; ++i) CHECK(seen[i]);
    Guarded<int8_t> q(3 * n);
    Guarded<float> scale(3), back(3 * n);
    std::vector<float> x(3 * n + 1, 1.5f);
    Tensor tx(x.data(), {3, n}), tq(q.data(), {3, n}, kDLInt, 8), ts(scale.data(), {3}), tb(back.data(), {3, n});
    CHECK(fastee_quantize_rows(&tx, FASTEE_INT8, 0, &tq, &ts, nullptr) == FASTEE_OK);
    CHECK(fastee_dequantize_rows(&tq, &ts, FASTEE_INT8, 0, &tb, nullptr) == FASTEE_OK);
    CHECK(q.intact() && scale.intact() && back.intact());
    for (int64_t i = 0; i < 3 * n; ++i) CHECK(std::abs(back.data()[i] - 1.5f) < 1e-6f);
  }
}

void threads_do_not_disturb_each_other() {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int id = 0; id < 4; ++id)
    threads.emplace_back([id, &wrong] {
      const int64_t features = 64 + 16 * id;
      std::vector<float> x(8 * features, 1.0f), w(5 * features, 0.0f);
      w[(id % 5) * features] = 30.0f;
      Tensor tx(x.data(), {8, features}), tw(w.data(), {5, features});
      fastee_head head = plain(&tw, nullptr);
      int64_t label[8];
      fastee_head_out out{{label, nullptr, nullptr, nullptr, nullptr, nullptr}, nullptr, nullptr, nullptr, nullptr, nullptr};
      for (int i = 0; i < 500; ++i) {
        if (fastee_exit_head(&tx, &head, &out, nullptr)) ++wrong[id];
        for (int64_t l : label) wrong[id] += l != id % 5;
      }
    });
  for (auto& t : threads) t.join();
  for (int w : wrong) CHECK(w == 0);
}
}  // namespace

int main() {
  std::string names = fastee_isas();
  for (size_t at = 0; at != std::string::npos;) {
    const size_t comma = names.find(',', at);
    const std::string isa = names.substr(at, comma == std::string::npos ? comma : comma - at);
    CHECK(fastee_select_isa(isa.c_str()) == FASTEE_OK && isa == fastee_isa());
    head_writes_its_outputs_only();
    refusals_name_the_argument();
    compaction_and_bytes_stay_inside();
    threads_do_not_disturb_each_other();
    at = comma == std::string::npos ? comma : comma + 1;
  }
  return report("test_c_abi");
}
