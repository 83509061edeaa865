// Any bytes are safe to hand to unpack_planes: it refuses or fills exactly what was asked for; what it accepts packs again.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fastee/fastee.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const char* const isas[] = {"scalar", "emu16", ""};
  if (size < 2) return 0;
  if (fastee_select_isa(isas[data[0] % 3])) std::abort();
  const std::vector<uint8_t> bytes(data + 2, data + size);  // of its own, so that reading past it is seen
  const auto nbytes = static_cast<int64_t>(bytes.size());
  DLDataType type;
  int64_t count = 0;
  if (fastee_planes_info(bytes.data(), nbytes, &type, &count) != FASTEE_OK) return 0;
  if (count < 0 || count > (1 << 20)) return 0;  // a header may promise more than is there; the memory would be ours
  int64_t first = count ? data[1] % count : 0, n = count - first;
  std::vector<uint8_t> out(static_cast<size_t>(n * type.bits / 8));
  const DLTensor t{out.data(), {kDLCPU, 0}, 1, type, &n, nullptr, 0};
  if (fastee_unpack_planes(bytes.data(), nbytes, first, &t, nullptr) != FASTEE_OK) return 0;
  const int64_t bound = fastee_pack_planes_bound(n, type.bits / 8);
  std::vector<uint64_t> again(static_cast<size_t>(bound / 8 + 1));
  int64_t packed = 0;
  std::vector<uint8_t> back(out.size());
  const DLTensor b{back.data(), {kDLCPU, 0}, 1, type, &n, nullptr, 0};
  if (fastee_pack_planes(&t, again.data(), bound, &packed, nullptr) != FASTEE_OK || fastee_unpack_planes(again.data(), packed, 0, &b, nullptr) != FASTEE_OK) std::abort();
  if (!out.empty() && std::memcmp(out.data(), back.data(), out.size())) std::abort();
  return 0;
}
