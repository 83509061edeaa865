// Packing over all cores. What is packed one behind the other is first written where it fits whatever comes before it, a range a thread, and
// then moved down: the same bytes for every number of threads.
#include <atomic>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace fastee::parallel {
namespace {

// Call f(range, first, last) on at most `most` ranges; range i begins at i * the returned size.
template <typename F>
int64_t for_ranges(int64_t rows, double work_per_row, int most, F f) {
  const int64_t size = rows < most ? 1 : (rows + most - 1) / most;
  for_rows(rows, work_per_row, size, size, [&](int64_t first, int64_t last) { f(first / size, first, last); });
  return size;
}

// Quantised rows and their scales shared out; `skip` moves the floats' side of `args` on by as many rows.
template <typename Args, typename Skip>
void for_quantized(const Args& args, void (*kernel)(const Args&), Skip skip) {
  const int64_t groups = args.group ? args.row / args.group : 0;
  for_rows(args.rows, static_cast<double>(args.row), 1, kAnyLength, [&](int64_t first, int64_t last) {
    Args a = args;
    a.rows = last - first;
    a.data += first * a.data_stride;
    if (a.scale) a.scale += first * groups;
    skip(a, first);
    kernel(a);
  });
}
}  // namespace

void mean_entropy(const cpu::MeanEntropyArgs& args) {
  const cpu::Kernels& k = cpu::kernels();
  for_rows(args.rows, 2.0 * static_cast<double>(args.frames) * static_cast<double>(args.classes), 1, kAnyLength, [&](int64_t first, int64_t last) {
    cpu::MeanEntropyArgs a = args;
    a.logits = past_elements(a.logits, a.element, first * a.row_stride);
    if (a.mask) a.mask += first * a.mask_stride;
    a.rows = last - first;
    a.out += first;
    k.mean_entropy(a);
  });
}

void feature_delta(const cpu::FeatureDeltaArgs& args) {
  const cpu::Kernels& k = cpu::kernels();
  for_rows(args.rows, 2.0 * static_cast<double>(args.row), 1, kAnyLength, [&](int64_t first, int64_t last) {
    cpu::FeatureDeltaArgs a = args;
    a.a = past_elements(a.a, a.element, first * a.a_stride), a.b = past_elements(a.b, a.element, first * a.b_stride);
    a.rows = last - first;
    a.out += first;
    k.feature_delta(a);
  });
}

void quantize_rows(const cpu::QuantizeArgs& args) {
  for_quantized(args, cpu::kernels().quantize_rows, [](cpu::QuantizeArgs& a, int64_t rows) { a.x = past_elements(a.x, a.element, rows * a.row_stride); });
}

void dequantize_rows(const cpu::DequantizeArgs& args) {
  for_quantized(args, cpu::kernels().dequantize_rows, [](cpu::DequantizeArgs& a, int64_t rows) { a.out += rows * a.out_stride; });
}

int64_t exit_pack(const cpu::HeadArgs& args, const Packing& to) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t rows = args.x.rows, width = args.x.element == cpu::kF32 ? 4 : 2, scale_bytes = 4 * to.groups;
  // As many rows as stay in the L2 cache between the head's reading and the packing; a head whose weights leave the L1 cache wants at least four.
  const int64_t fit = (512 << 10) / (width * to.row), least = args.classes * args.x.features > 4096 ? 4 : 1;
  const int64_t chunk = fit < least ? least : fit > cpu::kRowChunk ? cpu::kRowChunk : fit;
  // Where the pool reads every value of a row, it finds the largest for the packing, which then reads the row once.
  const bool pooled = !args.direct && args.x.feature_stride > 1 && to.group == to.row && to.format != cpu::kBf16Rows;
  std::atomic<int64_t> trouble{0};
  const int ranges = num_threads();
  std::vector<int64_t> kept(static_cast<size_t>(ranges));
  auto pack = [&](int64_t range, int64_t first, int64_t last) {
    int64_t count = 0;
    for (int64_t at = first; at < last; at += chunk) {
      cpu::HeadArgs part = slice(args, at, at + chunk < last ? at + chunk : last);
      part.scratch = static_cast<float*>(Scratch::here().reserve(sizeof(float) * static_cast<size_t>(cpu::head_scratch(part.x.rows, part.x.features, part.classes))));
      if (!part.scratch) return trouble.store(-1, std::memory_order_relaxed);
      uint32_t largest[cpu::kRowChunk];
      if (pooled) part.largest = largest;
      k.exit_head(part);
      for (int64_t b = 0; b < part.x.rows; ++b) {
        if (part.exits[b]) continue;
        if ((first + count + 1) * to.bytes > to.room) return trouble.store(-2 - (first + count + 1), std::memory_order_relaxed);
        const void* row = past_elements(to.x, args.x.element, (at + b) * args.x.row_stride);
        k.quantize_rows({to.format, args.x.element, row, 1, to.row, 0, to.group, to.data + (first + count) * to.bytes, to.bytes,
                         to.groups ? reinterpret_cast<float*>(to.scales + (first + count) * scale_bytes) : nullptr, pooled ? largest + b : nullptr});
        ++count;
      }
    }
    kept[static_cast<size_t>(range)] = count;
  };
  if (to.room < rows * to.bytes) {  // only rows one behind the other fit
    pack(0, 0, rows);
    return trouble ? trouble.load() : kept[0];
  }
  const double d = static_cast<double>(args.x.features);
  const double work = 3 * static_cast<double>(to.row) + d * static_cast<double>(args.classes) / 12 + 2 * static_cast<double>(args.classes);
  const int64_t size = for_ranges(rows, work, ranges, pack);
  if (trouble) return trouble;
  int64_t count = kept[0];
  for (int64_t range = 1; range * size < rows; ++range) {
    const int64_t here = kept[static_cast<size_t>(range)];
    std::memmove(to.data + count * to.bytes, to.data + range * size * to.bytes, static_cast<size_t>(here * to.bytes));
    std::memmove(to.scales + count * scale_bytes, to.scales + range * size * scale_bytes, static_cast<size_t>(here * scale_bytes));
    count += here;
  }
  return count;
}

// Packing costs a value about four elements of quantize_rows, unpacking about one and a half (0.3 and 0.1 ns, Zen 5, AVX-512).
int64_t pack_planes(const uint8_t* values, int element, int64_t count, uint8_t* offsets, uint8_t* out) {
  const auto pack = cpu::kernels().pack_planes;
  const int64_t width = element == cpu::kF32 ? 4 : 2, blocks = (count + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock, most = cpu::plane_block_bound(cpu::kPlaneBlock, width);
  auto put = [&](int64_t block, int64_t at) {
    const uint32_t units = static_cast<uint32_t>(at / 4);
    std::memcpy(offsets + 4 * block, &units, 4);
  };
  const int ranges = kPieces * num_threads();
  std::vector<int64_t> packed(static_cast<size_t>(ranges));
  const int64_t size = for_ranges(blocks, 4.0 * cpu::kPlaneBlock, ranges, [&](int64_t range, int64_t first, int64_t last) {
    int64_t at = 0;
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * cpu::kPlaneBlock, n = count - begin < cpu::kPlaneBlock ? count - begin : cpu::kPlaneBlock;
      put(b, at);
      at += pack(values + begin * width, element, n, out + first * most + at);
    }
    packed[static_cast<size_t>(range)] = at;
  });
  int64_t end = packed[0];
  for (int64_t range = 1; range * size < blocks; ++range) {
    const int64_t here = packed[static_cast<size_t>(range)];
    if (here == 0) continue;  // the whole was one range
    std::memmove(out + end, out + range * size * most, static_cast<size_t>(here));
    for (int64_t b = range * size; b < blocks && b < (range + 1) * size; ++b) {
      uint32_t units;
      std::memcpy(&units, offsets + 4 * b, 4);
      put(b, end + 4 * static_cast<int64_t>(units));
    }
    end += here;
  }
  put(blocks, end);
  return end;
}

int64_t unpack_planes(const uint8_t* blocks, int64_t bytes, const uint8_t* offsets, int element, int64_t count, int64_t first, int64_t wanted, uint8_t* out) {
  if (wanted == 0) return -1;
  const auto unpack = cpu::kernels().unpack_planes;
  const int64_t width = element == cpu::kF32 ? 4 : 2, begin = first / cpu::kPlaneBlock, stop = first + wanted;
  std::atomic<int64_t> damaged{INT64_MAX};
  auto offset = [&](int64_t block) {
    uint32_t units;
    std::memcpy(&units, offsets + 4 * block, 4);
    return 4 * static_cast<int64_t>(units);
  };
  for_rows((stop + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock - begin, 1.5 * cpu::kPlaneBlock, 1, kAnyLength, [&](int64_t from_block, int64_t to_block) {
    alignas(64) uint8_t whole[4 * cpu::kPlaneBlock];
    for (int64_t b = begin + from_block; b < begin + to_block; ++b) {
      const int64_t at = b * cpu::kPlaneBlock, n = count - at < cpu::kPlaneBlock ? count - at : cpu::kPlaneBlock;
      const int64_t low = at < first ? first : at, high = at + n < stop ? at + n : stop, from = offset(b), until = offset(b + 1);
      uint8_t* to = out + (low - first) * width;
      const bool direct = high - low == n;
      if (from > until || until > bytes || !unpack(blocks + from, until - from, element, n, direct ? to : whole)) {
        for (int64_t seen = damaged.load(std::memory_order_relaxed); b < seen && !damaged.compare_exchange_weak(seen, b, std::memory_order_relaxed);) {}
        return;
      }
      if (!direct) std::memcpy(to, whole + (low - at) * width, static_cast<size_t>((high - low) * width));
    }
  });
  return damaged == INT64_MAX ? -1 : damaged.load();
}
}  // namespace fastee::parallel
