// libFuzzer: any bytes are refused with a reason or read as a frame that encodes to the very same header; a right checksum over damaged
// bytes, which random input would not hit, is put in for half of them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "net/crc32c.h"
#include "net/frame.h"

using namespace fastee::net;

namespace {
[[noreturn]] void broken() { std::abort(); }

void seal(std::vector<uint8_t>* bytes) {
  const char magic[] = {'F', 'S', 'T', 'E', 1, 0};
  std::memcpy(bytes->data(), magic, sizeof magic);
  const uint32_t crc = crc32c(crc32c(0, bytes->data(), 88), bytes->data() + kHeaderBytes, bytes->size() - kHeaderBytes);
  std::memcpy(bytes->data() + 88, &crc, 4);
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  if (size < 2) return 0;
  std::vector<uint8_t> bytes(input + 2, input + size);
  if (input[0] & 1 && bytes.size() >= kHeaderBytes) seal(&bytes);
  Part parts[2] = {{bytes.data(), bytes.size()}, {nullptr, 0}};
  size_t count = 1, cut = bytes.size() * input[1] / 255;
  if (input[0] & 2) parts[0].size = cut, parts[1] = {bytes.data() + cut, bytes.size() - cut}, count = 2;
  Frame frame;
  Part payload{};
  std::string why;
  const Verdict verdict = decode(parts, count, nullptr, 4096, &frame, &payload, &why);
  if ((verdict == Verdict::kOk) != why.empty()) broken();
  if (verdict != Verdict::kOk) return 0;
  if (payload.data < bytes.data() || payload.data + payload.size != bytes.data() + bytes.size()) broken();
  uint8_t again[kMaxHeader];
  if (!unfit(frame).empty() || encode(frame, crc32c(0, payload.data, payload.size), again) != frame.header_bytes()) broken();
  if (std::memcmp(again, bytes.data(), frame.header_bytes()) != 0) broken();
  return 0;
}
