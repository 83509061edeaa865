// exit_head, exit_step and exit_pack of the CUDA library, run by the emulation: every label, statistic, decision, logit, place and packed
// byte equals the CPU kernels', bit for bit, whatever the tile.
#include "cuda_fixture.h"

namespace {
struct Case {
  std::vector<int64_t> shape;  // of x
  int64_t classes;
  fastee_pool_kind pool = FASTEE_POOL_NONE;
  fastee_norm_kind norm = FASTEE_NORM_NONE;
  int x_kind = 0, w_kind = 0;  // 0 fp32, 1 bf16, 2 fp16, 3 int8 (weights)
  fastee_measure measure = FASTEE_MAX_PROB;
  float threshold = 0.5f, temperature = 1.0f;
  bool bias = true, logits = false, second = false, mask = false, channels_last = false, unaligned = false;
  int format = -1;  // >= 0: exit_pack
  int64_t group = 0;
  float scale = 1.0f;  // of x
};

struct Results {
  Results(int64_t rows, int64_t classes, const Case& c)
      : label(rows),
        index(rows),
        count(1),
        max_prob(rows),
        margin(rows),
        entropy(rows),
        lse(rows),
        entropy_p2(rows),
        confidence(rows),
        logits(rows * classes),
        exits(rows) {
    out.stats = {label.data(), max_prob.data(), margin.data(), entropy.data(), lse.data(), c.second ? entropy_p2.data() : nullptr};
    out.confidence = confidence.data(), out.exits = exits.data(), out.index = index.data(), out.count = count.data();
    out.logits = c.logits ? logits.data() : nullptr;
  }
  Guarded<int64_t> label, index, count;
  Guarded<float> max_prob, margin, entropy, lse, entropy_p2, confidence, logits;
  Guarded<uint8_t> exits;
  fastee_head_out out{};
};

std::vector<float> numbers(int64_t n, unsigned seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(static_cast<size_t>(n));
  for (auto& v : x) v = normal(random);
  return x;
}

int64_t product(const std::vector<int64_t>& shape, size_t from) {
  int64_t n = 1;
  for (size_t i = from; i < shape.size(); ++i) n *= shape[i];
  return n;
}

int64_t launches_of(const Case& c, const char* what, int poison = -1) {
  const bool tokens = c.pool == FASTEE_POOL_MEAN_TOKENS || c.pool == FASTEE_POOL_CLS || c.pool == FASTEE_POOL_LAST;
  const int64_t rows = c.shape[0], features = tokens ? c.shape[2] : c.shape[1], row = product(c.shape, 1);
  std::vector<float> values = numbers(rows * row + 1, 11, c.scale),
                     weights = numbers(c.classes * features + 1, 12, 1.0f / std::sqrt(static_cast<float>(features)));
  if (c.classes > 4 && c.w_kind < 3)  // classes 1 and 3 are the same: ties go to the smaller index
    std::copy_n(weights.begin() + static_cast<ptrdiff_t>(features), features, weights.begin() + static_cast<ptrdiff_t>(3 * features));
  if (poison >= 0 && rows) values[static_cast<size_t>(poison % rows * row)] = NAN;
  if (poison >= 0 && rows > 1) values[static_cast<size_t>((poison + 1) % rows * row)] = INFINITY;
  const Narrow x(values, c.x_kind), w(weights, c.w_kind == 3 ? 0 : c.w_kind);
  std::vector<int8_t> w8(weights.size());
  const std::vector<float> w_scale = numbers(c.classes, 13, 0.05f), bias = numbers(c.classes, 14, 0.1f), nw = numbers(features, 15, 1.0f),
                           nb = numbers(features, 16, 1.0f);
  for (size_t i = 0; i < w8.size(); ++i) w8[i] = static_cast<int8_t>(weights[i] * 40.0f);
  std::vector<uint8_t> mask(static_cast<size_t>(rows * (tokens ? c.shape[1] : 0)));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 1;
  if (!mask.empty()) std::fill_n(mask.begin(), c.shape[1], 0);  // a row without a token
  std::vector<int64_t> strides;
  if (c.channels_last) strides = {row, 1, c.shape[3] * features, features};
  const DLDataType w_type = c.w_kind == 3 ? DLDataType{kDLInt, 8, 1} : w.type;
  const char* w_data = c.w_kind == 3 ? reinterpret_cast<const char*>(w8.data()) : static_cast<const char*>(w.data());
  const int64_t off = c.unaligned ? w_type.bits / 8 : 0;
  std::vector<char> shifted(static_cast<size_t>(c.classes * features) * (w_type.bits / 8) + 16);
  std::memcpy(shifted.data() + off, w_data, static_cast<size_t>(c.classes * features) * (w_type.bits / 8));

  Results wanted(rows, c.classes, c), got(rows, c.classes, c);
  const bool pack = c.format >= 0;
  const int64_t groups = c.format == FASTEE_BF16 || !pack ? 0 : c.group ? row / c.group : 1;
  const int64_t bytes = c.format == FASTEE_INT4   ? (row + 1) / 2
                        : c.format == FASTEE_BF16 ? 2 * row
                                                  : row,
                capacity = pack ? rows * (4 * groups + bytes) : 0;
  Guarded<uint8_t> buffer(capacity), wanted_buffer(capacity);
  int64_t extent[2] = {-1, -1}, wanted_extent[2] = {-1, -1};
  DeviceMemory memory(rows, fastee_cuda_scratch_bytes(rows, features, c.classes, groups));
  auto run = [&](int32_t device, Results& r) {
    Tensor tx(x.data(), c.shape, x.type, device, strides), tw(shifted.data() + off, {c.classes, features}, w_type, device),
        tb(bias.data(), {c.classes}, kFloat, device), tnw(nw.data(), {features}, kFloat, device),
        tnb(nb.data(), {features}, kFloat, device), ts(w_scale.data(), {c.classes}, kFloat, device),
        tm(mask.data(), {rows, tokens ? c.shape[1] : 0}, {kDLUInt, 8, 1}, device);
    fastee_head h{c.pool,
                  c.norm,
                  c.measure,
                  1e-5f,
                  c.temperature,
                  c.threshold,
                  &tw,
                  c.bias ? &tb : nullptr,
                  c.norm ? &tnw : nullptr,
                  c.norm ? &tnb : nullptr,
                  c.mask ? &tm : nullptr,
                  c.w_kind == 3 ? &ts : nullptr};
    const auto f = static_cast<fastee_format>(c.format);
    if (device == kDLCPU)
      return pack ? fastee_exit_pack(&tx, &h, f, c.group, &r.out, wanted_buffer.data(), capacity, wanted_extent, wanted_extent + 1, nullptr)
                  : fastee_exit_head(&tx, &h, &r.out, nullptr);
    return pack ? fastee_cuda_exit_pack(&tx, &h, f, c.group, &r.out, buffer.data(), capacity, extent, &memory.m, nullptr)
                : fastee_cuda_exit_head(&tx, &h, &r.out, &memory.m, nullptr);
  };
  const int before = failures;
  CHECK(run(kDLCPU, wanted) == FASTEE_OK);
  const int64_t launched = emulation::options().launches;
  const fastee_status status = run(kDLCUDA, got);
  CHECK(status == FASTEE_OK);
  if (status) std::fprintf(stderr, "  %s\n", fastee_cuda_last_error());
  const int64_t launches = emulation::options().launches - launched;
  CHECK(got.label.values() == wanted.label.values() && got.exits.values() == wanted.exits.values());
  CHECK(same_bits(got.max_prob.values(), wanted.max_prob.values()) && same_bits(got.margin.values(), wanted.margin.values()));
  CHECK(same_bits(got.entropy.values(), wanted.entropy.values()) && same_bits(got.lse.values(), wanted.lse.values()));
  CHECK(same_bits(got.confidence.values(), wanted.confidence.values()) && same_bits(got.entropy_p2.values(), wanted.entropy_p2.values()));
  CHECK(same_bits(got.logits.values(), wanted.logits.values()));
  CHECK(got.index.values() == wanted.index.values() && *got.count.data() == *wanted.count.data());
  CHECK(got.label.intact() && got.exits.intact() && got.confidence.intact() && got.logits.intact() && got.index.intact() &&
        got.count.intact() && got.max_prob.intact());
  CHECK(memory.clean());
  if (pack) {
    CHECK(extent[0] == wanted_extent[0] && extent[1] == wanted_extent[1] && buffer.intact());
    CHECK(extent[0] == wanted_extent[0] && extent[1] == wanted_extent[1] &&
          std::memcmp(buffer.data() + extent[0], wanted_buffer.data() + extent[0], static_cast<size_t>(extent[1])) == 0);
  }
  if (failures != before)
    std::fprintf(stderr, "  %s: B %d, D %d, C %d, pool %d, norm %d, x %d, w %d, format %d\n", what, int(rows), int(features),
                 int(c.classes), c.pool, c.norm, c.x_kind, c.w_kind, c.format);
  return launches;
}

void sizes() {
  for (int64_t rows : {0, 1, 2, 5, 8, 9, 21})
    for (int64_t features : {1, 15, 16, 100, 1030})
      for (int64_t classes : {1, 2, 10, 17, 129}) {
        if (rows > 9 && features * classes > 20000) continue;
        CHECK(launches_of({.shape = {rows, features}, .classes = classes, .threshold = 0.3f}, "sizes") == (rows > 0));
      }
  CHECK(launches_of({.shape = {2, 48}, .classes = 2500, .threshold = 0.01f, .second = true}, "tiles of classes") == 1);
  CHECK(launches_of({.shape = {1, 2100}, .classes = 40, .threshold = 0.1f, .logits = true}, "stages") == 1);
  CHECK(launches_of({.shape = {3, 6000}, .classes = 9, .threshold = 0.1f}, "thin tiles") == 1);
}

void kinds() {
  for (int x = 0; x < 3; ++x)
    for (int w = 0; w < 4; ++w)
      for (int64_t features : {64, 67})
        for (bool unaligned : {false, true})
          launches_of(
              {.shape = {6, features}, .classes = 20, .x_kind = x, .w_kind = w, .threshold = 0.2f, .bias = x != 1, .unaligned = unaligned},
              "types");
  for (float scale : {1.0f, 1e-20f, 1e-40f, 1e34f}) {  // int8 weights: rows of any size come to the same fixed point
    launches_of({.shape = {6, 70}, .classes = 20, .w_kind = 3, .threshold = 0.2f, .logits = true, .scale = scale}, "fixed point", 2);
    launches_of({.shape = {2, 300}, .classes = 700, .norm = FASTEE_NORM_RMS, .w_kind = 3, .threshold = 0.01f, .logits = true, .scale = scale},
                "fixed point, slices");
    launches_of({.shape = {1, 9001}, .classes = 33, .w_kind = 3, .threshold = 0.2f, .scale = scale}, "fixed point, stages");
  }
  for (auto norm : {FASTEE_NORM_LAYER, FASTEE_NORM_RMS, FASTEE_NORM_AFFINE})
    for (int64_t rows : {1, 7}) launches_of({.shape = {rows, 70}, .classes = 10, .norm = norm, .threshold = 0.4f}, "norms");
  for (int x = 0; x < 3; ++x)
    for (int64_t classes : {10, 200}) {
      launches_of({.shape = {5, 24, 7, 7}, .classes = classes, .pool = FASTEE_POOL_MEAN, .x_kind = x}, "mean");
      launches_of({.shape = {3, 9, 5}, .classes = classes, .pool = FASTEE_POOL_MEAN, .norm = FASTEE_NORM_LAYER, .x_kind = x},
                  "mean of odd sizes");
      launches_of({.shape = {5, 24, 3, 4}, .classes = classes, .pool = FASTEE_POOL_MEAN, .x_kind = x, .channels_last = true},
                  "channels last");
      launches_of({.shape = {4, 11, 40}, .classes = classes, .pool = FASTEE_POOL_MEAN_TOKENS, .x_kind = x, .mask = true}, "masked tokens");
      launches_of({.shape = {4, 3, 37}, .classes = classes, .pool = FASTEE_POOL_MEAN_TOKENS, .x_kind = x}, "tokens");
      launches_of({.shape = {9, 4, 32}, .classes = classes, .pool = FASTEE_POOL_CLS, .norm = FASTEE_NORM_RMS, .x_kind = x}, "cls");
      launches_of({.shape = {9, 4, 33}, .classes = classes, .pool = FASTEE_POOL_LAST, .x_kind = x}, "last");
    }
  CHECK(launches_of({.shape = {2, 8, 3, 3}, .classes = 300, .pool = FASTEE_POOL_MEAN}, "a pool before slices") == 2);
}

void rules() {
  for (auto measure : {FASTEE_MAX_PROB, FASTEE_MARGIN, FASTEE_ENTROPY, FASTEE_ENERGY})
    for (float threshold : {-INFINITY, -1.0f, 0.2f, INFINITY})
      launches_of({.shape = {11, 32},
                   .classes = 5,
                   .measure = measure,
                   .threshold = threshold,
                   .temperature = 1.7f,
                   .logits = true,
                   .second = true},
                  "rules", 4);
  launches_of({.shape = {19, 32}, .classes = 150, .threshold = 0.02f}, "NaN and infinity", 7);
}

void packing() {
  for (int format = 0; format < 4; ++format)
    for (float threshold : {-1.0f, 0.35f, 2.0f})
      for (int64_t rows : {0, 1, 4, 13}) {
        launches_of({.shape = {rows, 33}, .classes = 10, .threshold = threshold, .format = format}, "pack", rows ? 2 : -1);
        if (format != FASTEE_BF16)
          launches_of(
              {.shape = {rows, 12, 5}, .classes = 10, .pool = FASTEE_POOL_MEAN, .threshold = threshold, .format = format, .group = 15},
              "groups");
      }
  launches_of({.shape = {10, 48, 7, 7}, .classes = 200, .pool = FASTEE_POOL_MEAN, .threshold = 0.011f, .format = 0}, "large rows, slices");
}

void bad_arguments_are_refused() {
  std::vector<float> x(64);
  Tensor tx(x.data(), {2, 8}, kFloat, kDLCUDA), tw(x.data(), {3, 8}, kFloat, kDLCUDA), cpu(x.data(), {3, 8});
  auto says = [](const char* part) { return std::string(fastee_cuda_last_error()).find(part) != std::string::npos; };
  Results r(2, 3, {});
  DeviceMemory memory(2, 10);
  fastee_head h{FASTEE_POOL_NONE, FASTEE_NORM_NONE, FASTEE_MAX_PROB, 0.0f, 1.0f, 0.5f, &cpu, nullptr, nullptr, nullptr, nullptr, nullptr};
  CHECK(fastee_cuda_exit_head(&tx, &h, &r.out, &memory.m, nullptr) == FASTEE_WRONG_TYPE &&
        says("exit_head: weight must be float32, bfloat16 or float16 [C, D] on a CUDA device"));
  h.weight = &tw;
  CHECK(fastee_cuda_exit_head(&tx, &h, &r.out, &memory.m, nullptr) == FASTEE_INVALID_ARGUMENT &&
        says("memory must hold 32 bytes of sync and 88 of scratch, got 32 and 10"));
  h.threshold = NAN;
  CHECK(fastee_cuda_exit_head(&tx, &h, &r.out, &memory.m, nullptr) == FASTEE_INVALID_ARGUMENT && says("threshold must not be NaN"));
  h.threshold = 0.5f;
  int64_t extent[2];
  CHECK(fastee_cuda_exit_pack(&tx, &h, FASTEE_INT8, 0, &r.out, x.data(), 20, extent, &memory.m, nullptr) == FASTEE_INVALID_ARGUMENT &&
        says("capacity must be at least 24 bytes"));
}
}  // namespace

int main() {
#if defined(__SANITIZE_ADDRESS__)  // some 40 times slower: one order of threads is enough for addresses
  const bool sizes_too = false;
  for (uint64_t seed : {1}) {
#else
  const bool sizes_too = true;
  for (uint64_t seed : {0, 1}) {
#endif
    emulation::options().seed = seed;
    emulation::options().resident = seed ? 4 : 1;
    if (seed && sizes_too) sizes();
    kinds();
    rules();
    packing();
  }
  bad_arguments_are_refused();
  return report("test_cuda_head");
}
