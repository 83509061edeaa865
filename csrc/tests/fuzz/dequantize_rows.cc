// dequantize_rows over any bytes, scales, sizes and formats: a status, and never a byte outside its tensors.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fastee/fastee.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const char* const isas[] = {"scalar", "emu16", ""};
  if (size < 6) return 0;
  if (fastee_select_isa(isas[data[0] % 3])) std::abort();
  const int format = data[1] % 5;  // 4 is none
  const int64_t rows = data[2] % 9, row = data[3], group = data[4] % 65;
  const int64_t groups = group ? (row + group - 1) / group : 1, width = format == FASTEE_INT4 ? (row + 1) / 2 : row;
  std::vector<uint8_t> q(static_cast<size_t>(rows * width * (format == FASTEE_BF16 ? 2 : 1)));
  std::vector<float> scale(static_cast<size_t>(rows * groups)), out(static_cast<size_t>(rows * row));
  size_t at = 5;
  for (uint8_t& b : q) b = data[at = at + 1 < size ? at + 1 : 5];
  for (float& s : scale) {
    uint8_t four[4];
    for (uint8_t& b : four) b = data[at = at + 1 < size ? at + 1 : 5];
    std::memcpy(&s, four, 4);
  }
  int64_t shape[2] = {rows, width}, wide[2] = {rows, row}, scales[2] = {rows, groups};
  const DLDataType type{static_cast<uint8_t>(format == FASTEE_INT8 ? kDLInt : format == FASTEE_BF16 ? kDLBfloat : kDLUInt), static_cast<uint8_t>(format == FASTEE_BF16 ? 16 : 8), 1};
  const DLTensor tq{q.data(), {kDLCPU, 0}, 2, type, shape, nullptr, 0}, ts{scale.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, scales, nullptr, 0};
  const DLTensor to{out.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, wide, nullptr, 0};
  fastee_dequantize_rows(&tq, format == FASTEE_BF16 ? nullptr : &ts, static_cast<fastee_format>(format), group, &to, nullptr);
  return 0;
}
