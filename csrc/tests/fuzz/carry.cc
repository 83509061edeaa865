// libFuzzer: any table over any payload, as a peer under a right checksum may send it. Whatever is read in place lies inside the payload, is
// aligned and has the size that its shape needs; reading touches every byte.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "net/carry.h"
#include "net/crc32c.h"

using namespace fastee::net;

namespace {
[[noreturn]] void broken() { std::abort(); }
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  if (size < 2) return 0;
  Frame made;
  made.kind = input[0] & 1 ? Kind::kAnswer : Kind::kTask;
  made.tensor_count = static_cast<uint8_t>(input[1] % (kMaxTensors + 1));
  size_t at = 2;
  const auto next = [&] { return at < size ? input[at++] : uint8_t{0}; };
  for (size_t i = 0; i < made.tensor_count; ++i) {
    Tensor& t = made.tensors[i];
    t.dtype = static_cast<uint8_t>(1 + next() % 10), t.packing = next() % 8 == 7, t.dims = static_cast<uint8_t>(next() % (kMaxDims + 1));
    uint64_t fits = dtype_bytes(t.dtype);
    for (int d = 0; d < t.dims; ++d) {
      const uint8_t b = next();
      t.shape[d] = b < 250 ? b % 6 : 0x40000000u >> (b - 250);
      fits *= t.shape[d];
    }
    const uint8_t how = next();  // mostly the size that its shape needs
    t.bytes = how < 200 ? fits : how * 7u;
    made.table_bytes += static_cast<uint32_t>(kEntryBytes + 4u * t.dims);
  }
  alignas(64) static uint8_t memory[4096 + 64];
  uint8_t* payload = memory + next() % 9;
  const size_t most = std::min<size_t>(size - at, 4096);
  std::memcpy(payload, input + at, most);
  uint64_t sum = 0;
  for (size_t i = 0; i < made.tensor_count; ++i) sum += std::min<uint64_t>(made.tensors[i].bytes, 1u << 30);
  made.payload_bytes = sum <= 4096 ? sum : most;
  std::vector<uint8_t> head(kMaxHeader);
  head.resize(encode(made, crc32c(0, payload, made.payload_bytes), head.data()));
  const Part parts[] = {{head.data(), head.size()}, {payload, made.payload_bytes}};
  Frame frame;
  Part body{};
  std::string why;
  if (decode(parts, 2, nullptr, 4096, &frame, &body, &why) != Verdict::kOk) return 0;
  std::array<size_t, kMaxTensors> offsets{};
  uint64_t touched = 0;
  if (place_raw(frame, payload, &offsets)) {
    uint64_t end = 0;
    for (size_t i = 0; i < frame.tensor_count; ++i) {
      const Tensor& t = frame.tensors[i];
      uint64_t need = dtype_bytes(t.dtype);
      for (int d = 0; d < t.dims; ++d) need *= t.shape[d];
      if (offsets[i] != end || need != t.bytes || need == 0 || reinterpret_cast<uintptr_t>(payload + offsets[i]) % dtype_bytes(t.dtype)) broken();
      for (uint64_t b = 0; b < t.bytes; ++b) touched += payload[offsets[i] + b];
      end += t.bytes;
    }
    if (end != frame.payload_bytes) broken();
  }
  RawAnswer answer;
  if (read_answer(frame, payload, &answer)) {
    if (answer.logits != payload || answer.bytes != answer.classes * dtype_bytes(answer.dtype) || answer.bytes + 12 != frame.payload_bytes) broken();
    for (uint64_t b = 0; b < answer.bytes; ++b) touched += answer.logits[b];
  }
  return touched == UINT64_MAX;
}
