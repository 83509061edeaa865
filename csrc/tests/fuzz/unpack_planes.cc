// libFuzzer: any bytes are either refused or unpack, alike on every instruction set, and what unpacks is packed without loss.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "isas.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  const std::vector<std::string> names = two_isas(size);
  // As they are: mostly refused. Behind the first byte taken as values: packed, damaged in one place, unpacked.
  const std::vector<uint8_t> bytes(input, input + size);
  auto unpack = [&](const std::vector<uint8_t>& packed, bool must) {
    DLDataType dtype;
    int64_t count;
    if (fastee_planes_info(packed.data(), static_cast<int64_t>(packed.size()), &dtype, &count) != FASTEE_OK) {
      if (must) broken();
      return std::vector<uint8_t>();
    }
    if (count > (1 << 20)) return std::vector<uint8_t>();
    std::vector<uint8_t> first;
    fastee_status status = FASTEE_OK;
    for (size_t i = 0; i < names.size(); ++i) {
      select(names[i]);
      std::vector<uint8_t> out(static_cast<size_t>(count) * dtype.bits / 8);
      int64_t shape[1] = {count};
      DLTensor t{out.data(), {kDLCPU, 0}, 1, dtype, shape, nullptr, 0};
      const fastee_status s = fastee_unpack_planes(packed.data(), static_cast<int64_t>(packed.size()), 0, &t, nullptr);
      if (must && s != FASTEE_OK) broken();
      if (i && (s != status || (s == FASTEE_OK && out != first))) broken();
      status = s, first = out;
      if (s == FASTEE_OK && count > 2100) {  // a range that begins and ends inside blocks
        shape[0] = count - 2100;
        std::vector<uint8_t> part(static_cast<size_t>(shape[0]) * dtype.bits / 8);
        t.data = part.data();
        if (fastee_unpack_planes(packed.data(), static_cast<int64_t>(packed.size()), 2000, &t, nullptr) != FASTEE_OK) broken();
        if (std::memcmp(part.data(), out.data() + 2000 * dtype.bits / 8, part.size()) != 0) broken();
      }
    }
    return first;
  };
  unpack(bytes, false);
  if (size < 4) return 0;
  static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
  const DLDataType dtype = types[input[0] % 3];
  const size_t width = dtype.bits / 8, repeat = input[1] % 4 ? 1 : 1 + input[1] / 4 % 16;  // several blocks one run in four
  std::vector<uint8_t> values;
  for (size_t i = 0; i < repeat; ++i) values.insert(values.end(), input + 3, input + size);
  values.resize(values.size() / width * width);
  int64_t shape[1] = {static_cast<int64_t>(values.size() / width)}, nbytes = 0;
  uint8_t empty = 0;
  DLTensor t{values.empty() ? &empty : values.data(), {kDLCPU, 0}, 1, dtype, shape, nullptr, 0};
  std::vector<uint8_t> packed(static_cast<size_t>(fastee_pack_planes_bound(shape[0], static_cast<int64_t>(width))));
  if (fastee_pack_planes(&t, packed.data(), static_cast<int64_t>(packed.size()), &nbytes, nullptr) != FASTEE_OK) broken();
  packed.resize(static_cast<size_t>(nbytes));
  packed.shrink_to_fit();
  if (unpack(packed, true) != values) broken();
  packed[(input[2] * 131 + size) % packed.size()] ^= static_cast<uint8_t>(1 + input[1]);
  unpack(packed, false);
  return 0;
}
