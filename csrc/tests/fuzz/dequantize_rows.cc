// libFuzzer: any bytes in any format and grouping dequantise alike on every instruction set; what quantize_rows makes of any values
// comes back within its step, and wrong sizes are refused.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "isas.h"

namespace {
DLDataType type_of(int format) {
  static const DLDataType types[] = {{kDLInt, 8, 1}, {kDLUInt, 8, 1}, {kDLUInt, 8, 1}, {kDLBfloat, 16, 1}};
  return types[format];
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  if (size < 8) return 0;
  const std::vector<std::string> names = two_isas(size);
  const int format = input[0] % 4;
  const int64_t rows = input[1] % 4, group = 1 + input[2] % 40, groups = 1 + input[3] % 5, row = group * groups;
  const int64_t width = format == FASTEE_INT4 ? (row + 1) / 2 : row, bytes = format == FASTEE_BF16 ? 2 * width : width;
  auto fill = [&](std::vector<uint8_t>& to) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = input[4 + i % (size - 4)];
  };
  std::vector<uint8_t> data(static_cast<size_t>(rows * bytes)), scale(static_cast<size_t>(4 * rows * groups)), x(static_cast<size_t>(4 * rows * row));
  fill(data), fill(scale), fill(x);
  uint8_t none = 0;
  auto at = [&](std::vector<uint8_t>& v) { return v.empty() ? &none : v.data(); };
  int64_t data_shape[2] = {rows, width}, row_shape[2] = {rows, row}, scale_shape[2] = {rows, groups};
  DLTensor td{at(data), {kDLCPU, 0}, 2, type_of(format), data_shape, nullptr, 0};
  DLTensor ts{at(scale), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, scale_shape, nullptr, 0};
  const fastee_format f = static_cast<fastee_format>(format);
  const int64_t asked = format == FASTEE_BF16 ? 0 : group;
  const DLTensor* scales = format == FASTEE_BF16 ? nullptr : &ts;
  std::vector<uint8_t> first;
  for (const std::string& name : names) {
    select(name);
    std::vector<uint8_t> out(x.size());
    DLTensor to{at(out), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, row_shape, nullptr, 0};
    if (fastee_dequantize_rows(&td, scales, f, asked, &to, nullptr) != FASTEE_OK) broken();
    for (size_t i = 0; i < out.size(); i += 4) {  // which of two NaN a product keeps is the machine's affair
      float v;
      std::memcpy(&v, &out[i], 4);
      if (std::isnan(v)) std::memset(&out[i], 0xff, 4);
    }
    if (!first.empty() && out != first) broken();
    first = out;
    if (format != FASTEE_BF16 && fastee_dequantize_rows(&td, scales, f, row + 1, &to, nullptr) == FASTEE_OK) broken();
  }
  std::vector<uint8_t> packed_first, scale_first;
  for (const std::string& name : names) {
    select(name);
    std::vector<uint8_t> packed(data.size()), s(scale.size()), out(x.size());
    DLTensor tx{at(x), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, row_shape, nullptr, 0}, tp = td, tq = ts, to = tx;
    tp.data = at(packed), tq.data = at(s), to.data = at(out);
    if (fastee_quantize_rows(&tx, f, asked, &tp, format == FASTEE_BF16 ? nullptr : &tq, nullptr) != FASTEE_OK) broken();
    if (fastee_dequantize_rows(&tp, format == FASTEE_BF16 ? nullptr : &tq, f, asked, &to, nullptr) != FASTEE_OK) broken();
    if (!packed_first.empty() && packed != packed_first) broken();
    packed_first = packed;
    for (int64_t g = 0; g < rows * groups && format != FASTEE_BF16; ++g) {
      float step;
      std::memcpy(&step, &s[static_cast<size_t>(4 * g)], 4);
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        float a, b;
        std::memcpy(&a, &x[static_cast<size_t>(4 * i)], 4), std::memcpy(&b, &out[static_cast<size_t>(4 * i)], 4);
        const float reach = format == FASTEE_FP8_E4M3 ? std::fabs(a) / 8 + step : step;  // three bits behind the leading one
        if (std::isnan(step) ? !std::isnan(b) : !(std::fabs(a - b) <= 0.51f * reach + 0x1p-140f) && step > 0x1p-120f) broken();
      }
    }
  }
  return 0;
}
