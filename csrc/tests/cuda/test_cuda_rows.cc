// The CUDA kernels that move and pack rows, run by the emulation and compared with the CPU's kernels bit for bit.
#include "cuda_fixture.h"

namespace {
std::vector<float> some_rows(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  x.reserve(1);  // memory even for no values
  for (auto& v : x) v = normal(random);
  return x;
}

void compact_orders_like_the_cpu() {
  std::mt19937 random(1);
  for (int64_t rows : {0, 1, 3, 31, 32, 33, 255, 257, 1023, 4095, 4096, 4097, 20000}) {
    const DeviceMemory memory(rows, 0);
    for (int kind = 0; kind < 6; ++kind)
      for (int64_t stride : {1, 3}) {
        std::vector<uint8_t> mask(static_cast<size_t>(rows * stride + 1), 7);
        for (int64_t i = 0; i < rows; ++i)
          mask[static_cast<size_t>(i * stride)] = kind == 0   ? 0
                                                  : kind == 1 ? 1
                                                  : kind == 2 ? i & 1
                                                  : kind == 3 ? i == 0
                                                  : kind == 4 ? (i == rows - 1) * 255
                                                              : random() & 1;
        Tensor here(mask.data(), {rows}, {kDLUInt, 8, 1}, kDLCPU, {stride}), there(mask.data(), {rows}, {kDLUInt, 8, 1}, kDLCUDA, {stride});
        Guarded<int64_t> index(rows), wanted(rows);
        int64_t count = -1, wanted_count = -1;
        CHECK(fastee_compact(&here, wanted.data(), &wanted_count, nullptr) == FASTEE_OK);
        CHECK(fastee_cuda_compact(&there, index.data(), &count, &memory.m, nullptr) == FASTEE_OK);
        CHECK(count == wanted_count && index.values() == wanted.values() && index.intact());
        CHECK(memory.clean());
      }
  }
}

void quantized_rows_have_the_cpus_bits() {
  const DLDataType types[] = {{kDLInt, 8, 1}, {kDLUInt, 8, 1}, {kDLUInt, 8, 1}, {kDLBfloat, 16, 1}};
  struct Shape {
    int64_t rows, row, group, gap;
  };
  for (const Shape& s : {Shape{3, 1, 0, 0},
                         {2, 7, 0, 0},
                         {4, 64, 0, 0},
                         {3, 96, 32, 0},
                         {2, 9, 3, 0},
                         {3, 15, 5, 2},
                         {2, 4100, 0, 4},
                         {2, 6144, 2048, 0},
                         {1, 6150, 2050, 0},
                         {2, 3075, 1025, 1},
                         {0, 5, 0, 0},
                         {2, 0, 0, 0},
                         {1, 30000, 0, 0}})
    for (int format = 0; format < 4; ++format)
      for (int narrow = 0; narrow < 3; ++narrow) {
        if (format == FASTEE_BF16 && s.group) continue;
        const int64_t stride = s.row + s.gap;
        std::vector<float> x = some_rows(s.rows * stride + 1, 5);
        if (s.rows > 1 && s.row > 2) {
          x[1] = NAN;                                                                        // a group that comes back as NaN
          for (int64_t i = 0; i < s.row; ++i) x[static_cast<size_t>(stride + i)] *= 1e-36f;  // a row that needs lifting
          if (s.rows > 2)
            for (int64_t i = 0; i < s.row; ++i) x[static_cast<size_t>(2 * stride + i)] = i & 1 ? -0.0f : 0.0f;
        }
        const Narrow given(x, narrow);  // as fp32, bf16 or fp16; x becomes what that holds
        const int64_t bytes = format == FASTEE_INT4 ? (s.row + 1) / 2 : s.row, groups = s.group ? s.row / s.group : 1,
                      width = format == FASTEE_BF16 ? 2 : 1;
        const std::vector<int64_t> shape = {s.rows, bytes}, scales = {s.rows, groups};
        Guarded<uint8_t> data(s.rows * bytes * width), wanted(s.rows * bytes * width);
        Guarded<float> scale(s.rows * groups), wanted_scale(s.rows * groups);
        const bool scaled = format != FASTEE_BF16;
        Tensor here(x.data(), {s.rows, s.row}, kFloat, kDLCPU, {stride, 1}),
            there(given.data(), {s.rows, s.row}, given.type, kDLCUDA, {stride, 1});
        Tensor d0(wanted.data(), shape, types[format]), d1(data.data(), shape, types[format], kDLCUDA), s0(wanted_scale.data(), scales),
            s1(scale.data(), scales, kFloat, kDLCUDA);
        const auto f = static_cast<fastee_format>(format);
        CHECK(fastee_quantize_rows(&here, f, s.group, &d0, scaled ? &s0 : nullptr, nullptr) == FASTEE_OK);
        CHECK(fastee_cuda_quantize_rows(&there, f, s.group, &d1, scaled ? &s1 : nullptr, nullptr) == FASTEE_OK);
        const bool same = data.values() == wanted.values() && same_bits(scale.values(), wanted_scale.values());
        CHECK(same && data.intact() && scale.intact());
        if (!same)
          std::fprintf(stderr, "  rows %d x %d, group %d, format %d, type %d\n", int(s.rows), int(s.row), int(s.group), format, narrow);
      }
}

// Values whose exponents need codes, escapes of both forms, and raw blocks.
std::vector<float> plane_values(int64_t n, int kind) {
  std::vector<float> x = some_rows(n, static_cast<unsigned>(kind));
  std::mt19937 random(9);
  for (auto& v : x) {
    if (kind == 1 && random() % 50 == 0) v *= 1e-30f;
    if (kind == 2) v = std::ldexp(v, static_cast<int>(random() % 200) - 100);
    if (kind == 3) v = random() % 3 ? 0.0f : -0.0f;
    if (kind == 4 && random() % 9 == 0) v = NAN;
  }
  return x;
}

void planes_have_the_cpus_bytes_and_come_back() {
  for (int64_t n : {0, 1, 63, 64, 65, 2047, 2048, 2049, 4100, 10000})
    for (int kind = 0; kind < 5; ++kind)
      for (int narrow = 0; narrow < 3; ++narrow) {
        std::vector<float> x = plane_values(n, kind);
        const Narrow given(x, narrow);
        const int64_t width = narrow ? 2 : 4, bound = fastee_pack_planes_bound(n, width);
        Tensor here(given.data(), {n}, given.type), there(given.data(), {n}, given.type, kDLCUDA);
        std::vector<uint8_t> wanted(static_cast<size_t>(bound));
        Guarded<uint8_t> packed(bound);
        int64_t size = -1, wanted_size = -1, damaged = 0;
        const DeviceMemory memory((n + 2047) / 2048, 0);
        CHECK(fastee_pack_planes(&here, wanted.data(), bound, &wanted_size, nullptr) == FASTEE_OK);
        CHECK(fastee_cuda_pack_planes(&there, packed.data(), bound, &size, &memory.m, nullptr) == FASTEE_OK);
        CHECK(size == wanted_size && packed.intact() && memory.clean());
        CHECK(size == wanted_size && std::memcmp(packed.data(), wanted.data(), static_cast<size_t>(size)) == 0);
        for (auto [first, count] : {std::pair<int64_t, int64_t>{0, n}, {n / 3, n / 2}, {n, 0}, {n / 2, n > 0}}) {
          Guarded<uint8_t> back(count * width);
          Tensor out(back.data(), {count}, given.type, kDLCUDA);
          CHECK(fastee_cuda_unpack_planes(wanted.data(), wanted_size, n, first, &out, &damaged, nullptr) == FASTEE_OK);
          CHECK(damaged == -1 && back.intact());
          CHECK(count == 0 || std::memcmp(back.data(), static_cast<const uint8_t*>(given.data()) + first * width,
                                          static_cast<size_t>(count * width)) == 0);
        }
      }
}

// Any bytes are safe to hand in: each single damage is either found or harmless, as the CPU's reader decides.
void damaged_planes_are_found() {
  const int64_t n = 4500;
  std::vector<float> x = plane_values(n, 1);
  const Narrow given(x, 1);
  std::vector<uint8_t> packed(static_cast<size_t>(fastee_pack_planes_bound(n, 2)));
  int64_t size = 0;
  Tensor here(given.data(), {n}, given.type);
  CHECK(fastee_pack_planes(&here, packed.data(), static_cast<int64_t>(packed.size()), &size, nullptr) == FASTEE_OK);
  packed.resize(static_cast<size_t>(size));
  std::mt19937 random(3);
  int found = 0;
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<uint8_t> bad = packed;
    const size_t at = trial < 100 ? 16 + random() % 16 : trial < 150 ? 32 + random() % 12 : 32 + random() % (bad.size() - 32);
    bad[at] ^= static_cast<uint8_t>(1 + random() % 255);
    std::vector<uint16_t> cpu(n, 1), gpu(n, 1);
    Tensor out0(cpu.data(), {n}, given.type), out1(gpu.data(), {n}, given.type, kDLCUDA);
    int64_t damaged = 0;
    uint32_t end;  // the reader on the host has checked the header, the first and the last offset
    std::memcpy(&end, bad.data() + 16 + 4 * 3, 4);
    const bool header = std::memcmp(bad.data() + 16, "\0\0\0\0", 4) == 0 && 32 + 4 * static_cast<int64_t>(end) == size;
    const fastee_status s = fastee_unpack_planes(bad.data(), size, 0, &out0, nullptr);
    CHECK(fastee_cuda_unpack_planes(bad.data(), size, n, 0, &out1, &damaged, nullptr) == FASTEE_OK);
    if (!header) continue;
    CHECK((s == FASTEE_OK) == (damaged == -1));
    if (s == FASTEE_OK) CHECK(cpu == gpu);
    found += damaged != -1;
  }
  CHECK(found > 20);
}

void bad_arguments_are_refused() {
  std::vector<float> x(8);
  std::vector<uint8_t> mask(8), bytes(64);
  std::vector<int64_t> index(8);
  int64_t count;
  auto says = [](const char* part) { return std::string(fastee_cuda_last_error()).find(part) != std::string::npos; };
  Tensor cpu(mask.data(), {8}, {kDLUInt, 8, 1}), wide(x.data(), {8}, kFloat, kDLCUDA);
  CHECK(fastee_cuda_compact(&cpu, index.data(), &count, nullptr, nullptr) == FASTEE_WRONG_TYPE &&
        says("compact: mask must be bool or uint8 [B] on a CUDA device, got uint8 [8]"));
  CHECK(fastee_cuda_compact(&wide, index.data(), &count, nullptr, nullptr) == FASTEE_WRONG_TYPE && says("got float32 [8]"));
  Tensor large(mask.data(), {5000}, {kDLBool, 8, 1}, kDLCUDA, {0});
  CHECK(fastee_cuda_compact(&large, index.data(), &count, nullptr, nullptr) == FASTEE_INVALID_ARGUMENT &&
        says("compact: memory must hold 32 bytes of sync and 0 of scratch, got 0 and 0"));
  CHECK(fastee_cuda_pack_planes(&wide, bytes.data(), 10, &count, nullptr, nullptr) == FASTEE_INVALID_ARGUMENT &&
        says("capacity must be at least 68 bytes, got 10"));
  CHECK(fastee_cuda_unpack_planes(bytes.data(), 64, 8, 4, &wide, &count, nullptr) == FASTEE_INVALID_ARGUMENT && says("got 8 from 4"));
}

void errors_of_the_device_name_the_launch() {
  auto says = [](const char* part) { return std::string(fastee_cuda_last_error()).find(part) != std::string::npos; };
  std::vector<uint8_t> mask(8);
  std::vector<int64_t> index(8);
  int64_t count;
  Tensor there(mask.data(), {8}, {kDLUInt, 8, 1}, kDLCUDA);
  CHECK(fastee_cuda_compact(&there, index.data(), &count, nullptr, nullptr) == FASTEE_OK);
  emulation::options().fail_launch = cudaErrorNoDevice;
  CHECK(fastee_cuda_compact(&there, index.data(), &count, nullptr, nullptr) == FASTEE_DEVICE_ERROR &&
        says("compact: CUDA error 100: no CUDA-capable device is detected") && !says("sticky"));
  emulation::options().fail_launch = cudaErrorIllegalAddress;
  CHECK(fastee_cuda_compact(&there, index.data(), &count, nullptr, nullptr) == FASTEE_DEVICE_ERROR && says("it is sticky") &&
        says("before this one: compact"));
  emulation::options().fail_launch = 0;
}
}  // namespace

int main() {
  for (uint64_t seed : {0, 1, 2}) {
    emulation::options().seed = seed;
    compact_orders_like_the_cpu();
    if (seed < 2) quantized_rows_have_the_cpus_bits(), planes_have_the_cpus_bytes_and_come_back();
  }
  damaged_planes_are_found();
  bad_arguments_are_refused();
  errors_of_the_device_name_the_launch();
  return report("test_cuda_rows");
}
