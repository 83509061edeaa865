// The checks of quantised rows, for tensors in FASTEE_HOME's memory (check.h).
#include <string>

#include "core/check.h"

using namespace fastee;

fastee_status fastee::expect_group(const char* op, int64_t row, int64_t* group) {
  if (*group == 0) *group = row ? row : 1;
  if (*group > 0 && row % *group == 0) return FASTEE_OK;
  return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": group must divide the " + number(row) + " elements of a row, got " + number(*group));
}

static fastee_status expect_scales(const char* op, const DLTensor* scale, int64_t rows, int64_t groups) {
  auto wanted = [&] { return "float32 with " + number(rows) + " x " + number(groups) + " elements, contiguous"; };
  FASTEE_TRY(expect(op, "scale", scale, kDLFloat, 32, -1, wanted));
  if (product(*scale, 0, scale->ndim) == rows * groups && contiguous_from(*scale, 0)) return FASTEE_OK;
  return wrong(FASTEE_INVALID_ARGUMENT, op, "scale", wanted(), scale);
}

int64_t fastee::row_bytes(int format, int64_t row) { return format == FASTEE_INT4 ? row / 2 + row % 2 : format == FASTEE_BF16 ? 2 * row : row; }

// `data` holds rows of `row` elements in `format`: shape of `like`, or [B, ceil(row / 2)] for int4.
fastee_status fastee::expect_packed(const char* op, const DLTensor* data, int format, const char* like_name, const DLTensor& like, int64_t row) {
  static const char* const names[] = {"int8", "uint8", "uint8", "bfloat16"};
  static const uint8_t codes[] = {kDLInt, kDLUInt, kDLUInt, kDLBfloat};
  if (format < FASTEE_INT8 || format > FASTEE_BF16) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": format must be 0 to 3, got " + number(format));
  const bool nibbles = format == FASTEE_INT4;
  auto wanted = [&] {
    return std::string(names[format]) + (nibbles ? " [B, " + number(row_bytes(format, row)) + "]" : " with the shape of " + (like_name + (" " + describe(like))));
  };
  FASTEE_TRY(expect(op, "data", data, codes[format], format == FASTEE_BF16 ? 16 : 8, nibbles ? 2 : like.ndim, wanted));
  const bool fits = nibbles ? data->shape[0] == like.shape[0] && data->shape[1] == row_bytes(format, row) : same_shape(like, *data);
  if (!fits) return wrong(FASTEE_INVALID_ARGUMENT, op, "data", wanted(), data);
  return contiguous_from(*data, 1) ? FASTEE_OK : unsupported_rows(op, "data", *data);
}

fastee_status fastee::expect_scales_of(const char* op, const DLTensor* scale, int format, int64_t rows, int64_t row, int64_t* group) {
  if (format != FASTEE_BF16) {
    FASTEE_TRY(expect_group(op, row, group));
    return expect_scales(op, scale, rows, row ? row / *group : 1);
  }
  if (*group != 0) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": bf16 has no scales, so group must be 0, got " + number(*group));
  *group = row ? row : 1;
  return FASTEE_OK;
}
