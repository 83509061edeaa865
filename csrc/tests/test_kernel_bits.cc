// The same bits on every instruction set: one checksum per case over inputs made of integers, equal for all that this build holds.
// Printed, so that builds for different machines can be compared (tests/build/test_neon.py).
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace {
struct Sum {  // FNV-1a
  uint64_t h = 1469598103934665603u;
  void bytes(const void* p, size_t n) {
    for (size_t i = 0; i < n; ++i) h = (h ^ static_cast<const unsigned char*>(p)[i]) * 1099511628211u;
  }
  template <typename T>
  void add(const std::vector<T>& v) { bytes(v.data(), v.size() * sizeof(T)); }
  void add(const std::vector<float>& v) {
    for (float f : v) {
      uint32_t u;
      std::memcpy(&u, &f, 4);
      if (f != f) u = 0x7fc00000;  // a NaN made by arithmetic has the machine's own sign
      bytes(&u, 4);
    }
  }
};

// Values in (-4, 4) with 24 random bits; no libm, so equal everywhere.
struct Random {
  uint64_t state;
  uint32_t next() { return static_cast<uint32_t>((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
  float value() { return (static_cast<float>(next() >> 7) - 8388608.0f) * 0x1p-21f; }
};

std::vector<float> values(Random& random, int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& f : v) f = random.value();
  return v;
}

std::vector<std::string> lines;
void line(const std::string& name, const Sum& s) {
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(s.h));
  lines.push_back(name + " " + hex);
}

struct Stats {
  explicit Stats(size_t n) : label(n), max_prob(n), margin(n), entropy(n), lse(n), p2(n) {}
  fastee_row_stats_out out() { return {label.data(), max_prob.data(), margin.data(), entropy.data(), lse.data(), p2.data()}; }
  void into(Sum& s) const { s.add(label), s.add(max_prob), s.add(margin), s.add(entropy), s.add(lse), s.add(p2); }
  std::vector<int64_t> label;
  std::vector<float> max_prob, margin, entropy, lse, p2;
};

void heads(Random& random) {
  struct Case {
    int64_t rows, features, inner, classes;
    fastee_norm_kind norm;
    bool tokens;
  };
  for (const Case& c : {Case{1, 64, 16, 10, FASTEE_NORM_NONE, false}, Case{9, 67, 49, 23, FASTEE_NORM_LAYER, false}, Case{33, 130, 1, 1100, FASTEE_NORM_RMS, false},
                        Case{6, 2100, 1, 37, FASTEE_NORM_NONE, false}, Case{5, 77, 11, 4, FASTEE_NORM_AFFINE, true}, Case{4, 1, 3, 1, FASTEE_NORM_NONE, true},
                        Case{139, 300, 1, 71, FASTEE_NORM_NONE, false}}) {
    auto x = values(random, c.rows * c.features * c.inner), w = values(random, c.classes * c.features), b = values(random, c.classes);
    auto nw = values(random, c.features), nb = values(random, c.features);
    for (float& f : w) f *= 0.125f;
    if (c.rows == 9) x[3] = std::numeric_limits<float>::quiet_NaN();
    std::vector<uint8_t> mask(static_cast<size_t>(c.rows * c.inner));
    for (uint8_t& m : mask) m = random.next() % 4 != 0;
    Tensor tx(x.data(), c.tokens ? std::vector<int64_t>{c.rows, c.inner, c.features} : std::vector<int64_t>{c.rows, c.features, c.inner});
    Tensor tw(w.data(), {c.classes, c.features}), tb(b.data(), {c.classes}), tnw(nw.data(), {c.features}), tnb(nb.data(), {c.features});
    Tensor tm(mask.data(), {c.rows, c.inner}, kDLUInt, 8);
    const auto n = static_cast<size_t>(c.rows);
    for (int measure = 0; measure < 4; ++measure) {
      fastee_head head{};
      head.pool = c.tokens ? FASTEE_POOL_MEAN_TOKENS : FASTEE_POOL_MEAN;
      head.norm = c.norm, head.measure = static_cast<fastee_measure>(measure), head.norm_eps = 1e-5f, head.temperature = 1.5f, head.threshold = 0.25f;
      head.weight = &tw, head.bias = &tb, head.mask = c.tokens ? &tm : nullptr;
      if (c.norm != FASTEE_NORM_NONE) head.norm_weight = &tnw, head.norm_bias = &tnb;
      Stats stats(n);
      std::vector<float> confidence(n), logits(static_cast<size_t>(c.rows * c.classes));
      std::vector<uint8_t> exits(n);
      std::vector<int64_t> index(n);
      int64_t count = 0;
      const fastee_head_out out{stats.out(), confidence.data(), exits.data(), logits.data(), index.data(), &count};
      CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_OK);
      Sum s;
      stats.into(s), s.add(confidence), s.add(logits), s.add(exits), s.add(index), s.bytes(&count, sizeof count);
      line("exit_head/" + std::to_string(c.rows) + "x" + std::to_string(c.features) + "x" + std::to_string(c.inner) + "/" + std::to_string(c.classes) + "/" +
               std::to_string(measure),
           s);
    }
    std::vector<float> pooled(static_cast<size_t>(c.rows * c.features));
    Tensor to(pooled.data(), {c.rows, c.features});
    CHECK(fastee_pool(&tx, c.tokens ? FASTEE_POOL_MEAN_TOKENS : FASTEE_POOL_MEAN, c.tokens ? &tm : nullptr, &to, nullptr) == FASTEE_OK);
    Sum s;
    s.add(pooled);
    line("pool/" + std::to_string(c.rows) + "x" + std::to_string(c.features) + "x" + std::to_string(c.inner), s);
  }
}

// bf16, fp16 and int8: fp32 values that the narrow type holds exactly.
void narrow(Random& random) {
  constexpr int64_t kRows = 21, kFeatures = 83, kClasses = 45;
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<uint16_t> x(kRows * kFeatures), w(kClasses * kFeatures);
    std::vector<int8_t> w8(w.size());
    auto scale = values(random, kClasses);
    for (auto* v : {&x, &w})
      for (uint16_t& e : *v) {
        const uint32_t r = random.next();
        e = static_cast<uint16_t>(kind == 0 ? (r & 0x807f) | (123 + (r >> 16) % 5) << 7 : (r & 0x83ff) | (11 + (r >> 16) % 5) << 10);
      }
    for (int8_t& e : w8) e = static_cast<int8_t>(static_cast<int>(random.next() % 255) - 127);
    const uint8_t code = kind == 0 ? kDLBfloat : kDLFloat;
    Tensor tx(x.data(), {kRows, kFeatures}, code, 16), tw(w.data(), {kClasses, kFeatures}, code, 16), tw8(w8.data(), {kClasses, kFeatures}, kDLInt, 8);
    Tensor ts(scale.data(), {kClasses});
    fastee_head head{};
    head.pool = FASTEE_POOL_NONE, head.temperature = 8.0f, head.weight = kind == 2 ? &tw8 : &tw, head.weight_scale = kind == 2 ? &ts : nullptr;
    Stats stats(kRows);
    std::vector<float> logits(kRows * kClasses);
    const fastee_head_out out{stats.out(), nullptr, nullptr, logits.data(), nullptr, nullptr};
    CHECK(fastee_exit_head(&tx, &head, &out, nullptr) == FASTEE_OK);
    Sum s;
    stats.into(s), s.add(logits);
    const auto again = stats.out();
    CHECK(fastee_row_stats(&tx, 1.0f, &again, nullptr) == FASTEE_OK);
    stats.into(s);
    line(std::string("exit_head, row_stats/") + (kind == 0 ? "bf16" : kind == 1 ? "fp16" : "int8"), s);
  }
}

void rows(Random& random) {
  for (int64_t classes : {1, 2, 15, 16, 17, 100, 1000, 1024, 1025, 5000}) {
    auto z = values(random, 7 * classes);
    for (float& f : z) f *= 6.0f;
    for (int64_t i = 0; i < classes; ++i) z[static_cast<size_t>(2 * classes + i)] = 1.0f;                                         // ties
    z[static_cast<size_t>(3 * classes + classes / 2)] = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < classes; ++i) z[static_cast<size_t>(4 * classes + i)] = -std::numeric_limits<float>::infinity();
    z[static_cast<size_t>(5 * classes)] = std::numeric_limits<float>::quiet_NaN();
    Tensor tz(z.data(), {7, classes});
    Stats stats(7);
    const auto out = stats.out();
    CHECK(fastee_row_stats(&tz, 0.75f, &out, nullptr) == FASTEE_OK);
    Sum s;
    stats.into(s);
    line("row_stats/" + std::to_string(classes), s);

    auto x = values(random, 6 * classes);
    x[0] = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < classes; ++i) x[static_cast<size_t>(classes + i)] = 0.0f, x[static_cast<size_t>(2 * classes + i)] *= 0x1p-130f;
    Tensor tx(x.data(), {6, classes});
    Sum t;
    for (int format = 0; format < 4; ++format) {
      const auto f = static_cast<fastee_format>(format);
      const int64_t width = f == FASTEE_INT4 ? (classes + 1) / 2 : classes;
      std::vector<uint8_t> q(static_cast<size_t>(6 * width * (f == FASTEE_BF16 ? 2 : 1)));
      std::vector<float> scale(6), back(x.size());
      Tensor tq(q.data(), {6, width}, f == FASTEE_INT8 ? kDLInt : f == FASTEE_BF16 ? kDLBfloat : kDLUInt, f == FASTEE_BF16 ? 16 : 8);
      Tensor ts(scale.data(), {6}), tb(back.data(), {6, classes});
      const DLTensor* scales = f == FASTEE_BF16 ? nullptr : &ts;
      CHECK(fastee_quantize_rows(&tx, f, 0, &tq, scales, nullptr) == FASTEE_OK);
      CHECK(fastee_dequantize_rows(&tq, scales, f, 0, &tb, nullptr) == FASTEE_OK);
      t.add(q), t.add(scale), t.add(back);
    }
    line("quantize_rows/" + std::to_string(classes), t);

    std::vector<float> delta(3), mean(1);
    Tensor ta(x.data() + 3 * classes, {3, classes}), tb(z.data(), {3, classes}), frames(z.data(), {1, 2, classes});
    CHECK(fastee_feature_delta(&ta, &tb, delta.data(), nullptr) == FASTEE_OK);
    CHECK(fastee_mean_entropy(&frames, nullptr, 1.25f, mean.data(), nullptr) == FASTEE_OK);
    Sum u;
    u.add(delta), u.add(mean);
    line("feature_delta, mean_entropy/" + std::to_string(classes), u);

    Sum v;
    for (int bits : {32, 16}) {
      Tensor values(x.data(), {6 * classes}, bits == 32 ? kDLFloat : kDLBfloat, static_cast<uint8_t>(bits));
      const int64_t bound = fastee_pack_planes_bound(6 * classes, bits / 8);
      std::vector<uint64_t> packed(static_cast<size_t>(bound / 8 + 1));
      std::vector<float> again(x.size());
      Tensor to(again.data(), {6 * classes}, bits == 32 ? kDLFloat : kDLBfloat, static_cast<uint8_t>(bits));
      int64_t nbytes = 0;
      CHECK(fastee_pack_planes(&values, packed.data(), bound, &nbytes, nullptr) == FASTEE_OK);
      CHECK(fastee_unpack_planes(packed.data(), nbytes, 0, &to, nullptr) == FASTEE_OK);
      CHECK(std::memcmp(again.data(), x.data(), static_cast<size_t>(6 * classes * bits / 8)) == 0);
      v.bytes(packed.data(), static_cast<size_t>(nbytes));
    }
    line("pack_planes/" + std::to_string(classes), v);
  }
}
}  // namespace

int main() {
  const std::string names = fastee_isas();
  std::vector<std::string> first;
  for (size_t at = 0; at != std::string::npos;) {
    const size_t comma = names.find(',', at);
    const std::string isa = names.substr(at, comma == std::string::npos ? comma : comma - at);
    CHECK(fastee_select_isa(isa.c_str()) == FASTEE_OK);
    lines.clear();
    Random random{42};
    heads(random);
    narrow(random);
    rows(random);
    if (first.empty()) first = lines;
    CHECK(lines.size() == first.size());
    for (size_t i = 0; i < lines.size(); ++i)
      if (lines[i] != first[i]) {
        CHECK(!"every instruction set gives the same bits");
        std::fprintf(stderr, "  %s on %s, %s on the first of %s\n", lines[i].c_str(), isa.c_str(), first[i].c_str(), names.c_str());
      }
    at = comma == std::string::npos ? comma : comma + 1;
  }
  for (const std::string& l : first) std::printf("bits %s\n", l.c_str());
  std::printf("isas %s\n", names.c_str());
  return report("test_kernel_bits");
}
