// Packing on every instruction set of this CPU: the same bytes from each, guard bytes around outputs, capacities checked.
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace {
constexpr unsigned char kGuard = 0xa5;

struct Guarded {
  explicit Guarded(int64_t bytes) : raw(static_cast<size_t>(bytes) + 128, kGuard) {}
  unsigned char* data() { return raw.data() + 64; }
  std::vector<unsigned char> bytes() const { return {raw.begin() + 64, raw.end() - 64}; }
  bool intact() const {
    for (size_t i = 0; i < 64; ++i)
      if (raw[i] != kGuard || raw[raw.size() - 1 - i] != kGuard) return false;
    return true;
  }
  std::vector<unsigned char> raw;
};

bool says(const char* part) { return std::string(fastee_last_error()).find(part) != std::string::npos; }

template <typename F>
void on_every_isa(F f) {
  const std::string all = fastee_isas();
  for (size_t from = 0; from < all.size();) {
    const size_t comma = all.find(',', from), to = comma == std::string::npos ? all.size() : comma;
    CHECK(fastee_select_isa(all.substr(from, to - from).c_str()) == FASTEE_OK);
    f();
    from = to + 1;
  }
  CHECK(fastee_select_isa("") == FASTEE_OK);
}

std::vector<float> values(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 5 == 0 ? -0.0f : i % 97 == 3 ? normal(random) * 1e-6f : normal(random);
  return x;
}

void rows_are_the_same_bytes_everywhere() {
  const DLDataType types[] = {{kDLInt, 8, 1}, {kDLUInt, 8, 1}, {kDLUInt, 8, 1}, {kDLBfloat, 16, 1}};
  for (int format = 0; format < 4; ++format)
    for (const auto& sizes : {std::array<int64_t, 3>{0, 5, 5}, {3, 1, 1}, {2, 33, 11}, {5, 64, 4}, {2, 2049, 2049}, {1, 1027, 79}}) {
      const int64_t rows = sizes[0], row = sizes[1], group = sizes[2];
      std::vector<float> x = values(rows * row, 7);
      if (rows > 1) x[1] = NAN, x[static_cast<size_t>(row)] = 1e-39f;
      const int64_t width = format == FASTEE_INT4 ? (row + 1) / 2 : row, asked = format == FASTEE_BF16 ? 0 : group;
      std::vector<unsigned char> first, back_first;
      on_every_isa([&] {
        Guarded data(rows * width * types[format].bits / 8), scale(4 * rows * (row / group)), back(4 * rows * row);
        Tensor tx(x.data(), {rows, row}), td(data.data(), {rows, width}, types[format]), ts(scale.data(), {rows, row / group}), tb(back.data(), {rows, row});
        const DLTensor* s = format == FASTEE_BF16 ? nullptr : &ts;
        CHECK(fastee_quantize_rows(&tx, static_cast<fastee_format>(format), asked, &td, s, nullptr) == FASTEE_OK);
        CHECK(fastee_dequantize_rows(&td, s, static_cast<fastee_format>(format), asked, &tb, nullptr) == FASTEE_OK);
        CHECK(data.intact() && scale.intact() && back.intact());
        for (int64_t i = 0; i < rows * row; ++i) {  // NaN payloads of a product are the machine's affair
          float v;
          std::memcpy(&v, back.data() + 4 * i, 4);
          if (std::isnan(v)) std::memset(back.data() + 4 * i, 0xff, 4);
        }
        CHECK(first.empty() || (data.bytes() == first && back.bytes() == back_first));
        first = data.bytes(), back_first = back.bytes();
      });
    }
}

void planes_are_the_same_bytes_everywhere() {
  const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
  for (const DLDataType& type : types)
    for (int64_t n : {0, 1, 63, 64, 65, 1023, 2047, 2048, 2049, 5000}) {
      const int64_t width = type.bits / 8;
      const std::vector<float> x = values(n, 9);
      std::vector<unsigned char> raw(static_cast<size_t>(n * width + 8)), first;
      for (int64_t i = 0; i < n; ++i) std::memcpy(&raw[static_cast<size_t>(i * width)], reinterpret_cast<const char*>(&x[static_cast<size_t>(i)]) + 4 - width, static_cast<size_t>(width));
      raw.resize(static_cast<size_t>(n * width));
      on_every_isa([&] {
        const int64_t bound = fastee_pack_planes_bound(n, width);
        Guarded packed(bound), back(n * width);
        int64_t nbytes = 0, count = -1;
        unsigned char none = 0;
        Tensor tx(raw.empty() ? &none : raw.data(), {n}, type), tb(back.data(), {n}, type);
        CHECK(fastee_pack_planes(&tx, packed.data(), bound - 1, &nbytes, nullptr) == FASTEE_INVALID_ARGUMENT && says("capacity must be at least"));
        CHECK(fastee_pack_planes(&tx, packed.data(), bound, &nbytes, nullptr) == FASTEE_OK && nbytes <= bound);
        CHECK(fastee_planes_info(packed.data(), nbytes, nullptr, &count) == FASTEE_OK && count == n);
        CHECK(fastee_unpack_planes(packed.data(), nbytes, 0, &tb, nullptr) == FASTEE_OK && back.bytes() == raw);
        CHECK(packed.intact() && back.intact());
        CHECK(fastee_unpack_planes(packed.data(), nbytes, 1, &tb, nullptr) == FASTEE_INVALID_ARGUMENT || n == 0);
        CHECK(fastee_planes_info(packed.data(), nbytes - 1, nullptr, &count) == FASTEE_INVALID_ARGUMENT);
        const std::vector<unsigned char> bytes(packed.data(), packed.data() + nbytes);
        CHECK(first.empty() || bytes == first);
        first = bytes;
      });
    }
}

// Nine values of twelve features are pooled four features abreast, seventy of twenty one after another.
void an_exit_packs_into_the_callers_buffer(int64_t features, int64_t inner) {
  constexpr int64_t rows = 70;
  const int64_t row = features * inner;
  std::vector<float> x = values(rows * row, 11), w = values(3 * features, 12);
  Tensor tx(x.data(), {rows, features, inner}), tw(w.data(), {3, features});
  std::vector<int64_t> label(rows), index(rows);
  std::vector<uint8_t> exits(rows);
  int64_t count = 0, offset = 0, nbytes = 0;
  const fastee_head head{FASTEE_POOL_MEAN, FASTEE_NORM_NONE, FASTEE_MAX_PROB, 0.0f, 1.0f, 0.4f, &tw, nullptr, nullptr, nullptr, nullptr, nullptr};
  const fastee_head_out out{{label.data(), nullptr, nullptr, nullptr, nullptr, nullptr}, nullptr, exits.data(), nullptr, index.data(), &count};
  std::vector<unsigned char> first;
  on_every_isa([&] {
    Guarded buffer(rows * (row + 4));
    CHECK(fastee_exit_pack(&tx, &head, FASTEE_INT8, 0, &out, buffer.data(), rows * (row + 4), &offset, &nbytes, nullptr) == FASTEE_OK);
    CHECK(buffer.intact() && count > 0 && count < rows && nbytes == count * (row + 4) && offset == 4 * (rows - count));
    Guarded rest(count * row), data(count * row), scale(4 * count);
    Tensor ti(index.data(), {count}, {kDLInt, 64, 1}), td(data.data(), {count, features, inner}, {kDLInt, 8, 1}), ts(scale.data(), {count});
    std::vector<float> kept(static_cast<size_t>(count * row));
    Tensor tk(kept.data(), {count, features, inner});
    CHECK(fastee_gather_rows(&tx, &ti, &tk, nullptr) == FASTEE_OK);
    CHECK(fastee_quantize_rows(&tk, FASTEE_INT8, 0, &td, &ts, nullptr) == FASTEE_OK);
    CHECK(std::memcmp(buffer.data() + offset, scale.data(), static_cast<size_t>(4 * count)) == 0);
    CHECK(std::memcmp(buffer.data() + offset + 4 * count, data.data(), static_cast<size_t>(count * row)) == 0);
    const std::vector<unsigned char> wire(buffer.data() + offset, buffer.data() + offset + nbytes);
    CHECK(first.empty() || wire == first);
    first = wire;
    const int64_t exact = 4 * rows + count * row;  // what is written ends there; one byte less must be refused, and not written past
    Guarded tight(exact - 1);
    CHECK(fastee_exit_pack(&tx, &head, FASTEE_INT8, 0, &out, tight.data(), exact - 1, &offset, &nbytes, nullptr) == FASTEE_INVALID_ARGUMENT);
    CHECK(says("exit_pack: capacity must be at least") && tight.intact());
    CHECK(fastee_exit_pack(&tx, &head, FASTEE_INT8, 0, &out, tight.data(), 8, &offset, &nbytes, nullptr) == FASTEE_INVALID_ARGUMENT && says("for the scales"));
    CHECK(fastee_exit_pack(&tx, &head, FASTEE_BF16, 4, &out, buffer.data(), 8, &offset, &nbytes, nullptr) == FASTEE_INVALID_ARGUMENT && says("bf16 has no scales"));
    CHECK(fastee_exit_pack(&tx, &head, static_cast<fastee_format>(9), 0, &out, buffer.data(), 8, &offset, &nbytes, nullptr) == FASTEE_INVALID_ARGUMENT);
  });
}
}  // namespace

int main() {
  rows_are_the_same_bytes_everywhere();
  planes_are_the_same_bytes_everywhere();
  an_exit_packs_into_the_callers_buffer(12, 9);
  an_exit_packs_into_the_callers_buffer(20, 70);
  return report("test_pack");
}
