// The C ABI of packing: quantised rows, an exit with its survivors packed, lossless float planes.
#include <cstring>
#include <limits>
#include <string>

#include "core/check.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace fastee {
namespace {

// Lossless planes: magic, version, element, reserved, count; then the blocks' offsets in 4 bytes, one more than blocks.
constexpr char kMagic[4] = {'F', 'P', 'L', 'N'};
using cpu::kPlaneVersion;
constexpr int64_t kHeader = 16;

struct Planes {
  int element;
  int64_t count, blocks, start;
  const uint8_t* offsets;
};

int64_t planes_start(int64_t blocks) { return kHeader + 4 * (blocks + 1); }
int64_t width_of(int element) { return element == cpu::kF32 ? 4 : 2; }

int64_t offset_at(const Planes& p, int64_t block) {
  uint32_t units;
  std::memcpy(&units, p.offsets + 4 * block, 4);
  return 4 * static_cast<int64_t>(units);
}

fastee_status no_planes(const std::string& why) { return fail(FASTEE_INVALID_ARGUMENT, "unpack_planes: data holds no packed planes: " + why); }

fastee_status read_header(const void* data, int64_t nbytes, Planes* p) {
  if (!data || nbytes < kHeader) return no_planes(number(data ? nbytes : 0) + " bytes, a header has " + number(kHeader));
  const uint8_t* in = static_cast<const uint8_t*>(data);
  if (std::memcmp(in, kMagic, 4) != 0) return no_planes("it does not begin with FPLN");
  if (in[4] != kPlaneVersion) return no_planes("version " + number(in[4]) + ", this build reads " + number(kPlaneVersion));
  if (in[5] > cpu::kF16) return no_planes("element type " + number(in[5]) + ", expected 0 to 2");
  if (in[6] || in[7]) return no_planes("reserved bytes are not zero");
  p->element = in[5];
  std::memcpy(&p->count, in + 8, 8);
  // A block of 2,048 values takes at least an offset: more values than that cannot be in so few bytes.
  if (p->count < 0 || p->count / cpu::kPlaneBlock > nbytes / 4) return no_planes(number(p->count) + " values in " + number(nbytes) + " bytes");
  p->blocks = (p->count + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock;
  p->start = planes_start(p->blocks);
  p->offsets = in + kHeader;
  if (p->start > nbytes) return no_planes("it ends inside its offsets");
  if (offset_at(*p, 0) != 0 || p->start + offset_at(*p, p->blocks) != nbytes)
    return no_planes("its blocks end at byte " + number(p->start + offset_at(*p, p->blocks)) + ", it has " + number(nbytes));
  return FASTEE_OK;
}

}  // namespace
}  // namespace fastee

using namespace fastee;

extern "C" fastee_status fastee_quantize_rows(const DLTensor* x, fastee_format format, int64_t group, const DLTensor* data, const DLTensor* scale, void*) {
  static const char op[] = "quantize_rows";
  int element;
  FASTEE_TRY(expect_float(op, "x", x, -1, "float32, bfloat16 or float16 [B, ...]", &element));
  if (x->ndim < 1) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", "float32, bfloat16 or float16 [B, ...]", x);
  if (!contiguous_from(*x, 1)) return unsupported_rows(op, "x", *x);
  const int64_t row = product(*x, 1, x->ndim);
  FASTEE_TRY(expect_packed(op, data, format, "x", *x, row));
  FASTEE_TRY(expect_scales_of(op, scale, format, x->shape[0], row, &group));
  float* scales = format == FASTEE_BF16 ? nullptr : data_of(*scale);
  if (row == 0 && scales)
    for (int64_t i = 0; i < x->shape[0]; ++i) scales[i] = 0.0f;
  const int64_t width = format == FASTEE_BF16 ? 2 : 1;
  parallel::quantize_rows({format, element, bytes_of<void>(*x), x->shape[0], row, stride(*x, 0), group, bytes_of<uint8_t>(*data), width * stride(*data, 0), scales, nullptr});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_dequantize_rows(const DLTensor* data, const DLTensor* scale, fastee_format format, int64_t group, const DLTensor* out, void*) {
  static const char op[] = "dequantize_rows";
  FASTEE_TRY(expect(op, "out", out, kDLFloat, 32, -1, "float32 [B, ...]"));
  if (out->ndim < 1) return wrong(FASTEE_INVALID_ARGUMENT, op, "out", "float32 [B, ...]", out);
  if (!contiguous_from(*out, 1)) return unsupported_rows(op, "out", *out);
  const int64_t row = product(*out, 1, out->ndim);
  FASTEE_TRY(expect_packed(op, data, format, "out", *out, row));
  FASTEE_TRY(expect_scales_of(op, scale, format, out->shape[0], row, &group));
  const float* scales = format == FASTEE_BF16 ? nullptr : data_of(*scale);
  const int64_t element = format == FASTEE_BF16 ? 2 : 1;
  parallel::dequantize_rows({format, bytes_of<uint8_t>(*data), out->shape[0], row, element * stride(*data, 0), group, scales, data_of(*out), stride(*out, 0)});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_exit_pack(const DLTensor* x, const fastee_head* head, fastee_format format, int64_t group, const fastee_head_out* out, void* buffer,
                                          int64_t capacity, int64_t* offset, int64_t* nbytes, void*) {
  static const char op[] = "exit_pack";
  cpu::HeadArgs a;
  FASTEE_TRY(head_args(op, x, head, out, &a));
  if (!out->exits || !offset || !nbytes || (!buffer && capacity > 0)) return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: out.exits, buffer, offset and nbytes must not be NULL");
  if (!contiguous_from(*x, 1)) return unsupported_rows(op, "x", *x);
  if (format < FASTEE_INT8 || format > FASTEE_BF16) return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: format must be 0 to 3, got " + number(format));
  const int64_t row = product(*x, 1, x->ndim), rows = a.x.rows, bytes = row_bytes(format, row);
  if (format == FASTEE_BF16 && group) return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: bf16 has no scales, so group must be 0, got " + number(group));
  FASTEE_TRY(expect_group(op, row, &group));
  const int64_t groups = format == FASTEE_BF16 ? 0 : row / group, reserved = 4 * groups * rows;
  if (capacity < reserved) return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: capacity must be at least " + number(reserved) + " bytes for the scales, got " + number(capacity));
  // Scales of all rows at the front, data of the survivors behind; at the end the scales in use move up to the data.
  uint8_t* scales = static_cast<uint8_t*>(buffer);
  const int64_t count = parallel::exit_pack(a, {bytes_of<void>(*x), format, row, group, groups, bytes, scales, scales + reserved, capacity - reserved});
  if (count == -1) return fail(FASTEE_OUT_OF_MEMORY, "exit_pack: no memory for the working buffer");
  if (count < 0)
    return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: capacity must be at least " + number(reserved + (-2 - count) * bytes) + " bytes for the rows that stay, got " + number(capacity));
  if (out->index) *out->count = cpu::kernels().compact(out->exits, rows, 1, 1, out->index);
  *offset = 4 * groups * (rows - count);
  *nbytes = (4 * groups + bytes) * count;
  if (count && groups) std::memmove(scales + *offset, scales, static_cast<size_t>(4 * groups * count));
  return FASTEE_OK;
}

extern "C" int64_t fastee_pack_planes_bound(int64_t count, int64_t element_bytes) {
  const int64_t blocks = (count + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock;
  return planes_start(blocks) + (blocks * cpu::kPlaneHead + count * element_bytes + 3) / 4 * 4;  // only the last block can need filling up
}

extern "C" fastee_status fastee_pack_planes(const DLTensor* x, void* out, int64_t capacity, int64_t* nbytes, void*) {
  static const char op[] = "pack_planes", wanted[] = "float32, bfloat16 or float16, contiguous";
  int element;
  FASTEE_TRY(expect_float(op, "h", x, -1, wanted, &element));
  if (!contiguous_from(*x, 0)) return wrong(FASTEE_UNSUPPORTED, op, "h", wanted, x);
  if (!out || !nbytes) return fail(FASTEE_INVALID_ARGUMENT, "pack_planes: out and nbytes must not be NULL");
  const int64_t count = product(*x, 0, x->ndim), width = width_of(element), bound = fastee_pack_planes_bound(count, width);
  if (capacity < bound) return fail(FASTEE_INVALID_ARGUMENT, "pack_planes: capacity must be at least " + number(bound) + " bytes, got " + number(capacity));
  if (bound / 4 > std::numeric_limits<uint32_t>::max()) return fail(FASTEE_UNSUPPORTED, "pack_planes: h must be below 16 GiB, got " + describe(*x));
  uint8_t* to = static_cast<uint8_t*>(out);
  const int64_t blocks = (count + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock, start = planes_start(blocks);
  std::memset(to, 0, static_cast<size_t>(kHeader));
  std::memcpy(to, kMagic, 4);
  to[4] = kPlaneVersion, to[5] = static_cast<uint8_t>(element);
  std::memcpy(to + 8, &count, 8);
  *nbytes = start + parallel::pack_planes(bytes_of<const uint8_t>(*x), element, count, to + kHeader, to + start);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_planes_info(const void* data, int64_t nbytes, DLDataType* dtype, int64_t* count) {
  Planes p;
  FASTEE_TRY(read_header(data, nbytes, &p));
  if (dtype) *dtype = {static_cast<uint8_t>(p.element == cpu::kBF16 ? kDLBfloat : kDLFloat), static_cast<uint8_t>(8 * width_of(p.element)), 1};
  if (count) *count = p.count;
  return FASTEE_OK;
}

extern "C" fastee_status fastee_unpack_planes(const void* data, int64_t nbytes, int64_t first, const DLTensor* out, void*) {
  static const char op[] = "unpack_planes";
  Planes p;
  FASTEE_TRY(read_header(data, nbytes, &p));
  static const char* const names[] = {"float32, contiguous", "bfloat16, contiguous", "float16, contiguous"};
  int element;
  FASTEE_TRY(expect_float(op, "out", out, -1, names[p.element], &element));
  if (element != p.element) return wrong(FASTEE_WRONG_TYPE, op, "out", names[p.element], out);
  if (!contiguous_from(*out, 0)) return wrong(FASTEE_UNSUPPORTED, op, "out", names[p.element], out);
  const int64_t wanted = product(*out, 0, out->ndim);
  if (first < 0 || first > p.count || wanted > p.count - first)
    return fail(FASTEE_INVALID_ARGUMENT, "unpack_planes: out must lie within the " + number(p.count) + " packed values, got " + number(wanted) + " from " + number(first));
  const int64_t damaged = parallel::unpack_planes(static_cast<const uint8_t*>(data) + p.start, nbytes - p.start, p.offsets, element, p.count, first, wanted, bytes_of<uint8_t>(*out));
  if (damaged >= 0) return no_planes("block " + number(damaged) + " is damaged");
  return FASTEE_OK;
}
