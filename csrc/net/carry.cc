#include "net/carry.h"

#include <algorithm>
#include <cstring>

namespace fastee::net {
namespace {
constexpr uint8_t kDtypeBytes[] = {0, 4, 2, 2, 8, 8, 4, 2, 1, 1, 1};
constexpr uint8_t kFp32 = 1, kInt64 = 5, kBool = 10;

// At most 2^40 elements: the decoder saw to it that no product overflows.
uint64_t size_of(const Tensor& t) {
  uint64_t bytes = dtype_bytes(t.dtype);
  for (int d = 0; d < t.dims; ++d) bytes *= t.shape[d];
  return bytes;
}

bool is_one(const Tensor& t, uint8_t dtype) {
  return t.dtype == dtype && !t.packing && t.bytes == dtype_bytes(dtype) && (t.dims == 0 || (t.dims == 1 && t.shape[0] == 1));
}
}  // namespace

size_t dtype_bytes(uint8_t id) { return id < std::size(kDtypeBytes) ? kDtypeBytes[id] : 0; }

bool place_raw(const Frame& f, const uint8_t* payload, std::array<size_t, kMaxTensors>* offsets) {
  uint64_t at = 0;
  for (size_t i = 0; i < f.tensor_count; ++i) {
    const Tensor& t = f.tensors[i];
    if (t.packing || !t.bytes || t.bytes != size_of(t) || t.bytes > f.payload_bytes - at) return false;
    const uint8_t* data = payload + at;
    if (reinterpret_cast<uintptr_t>(data) % dtype_bytes(t.dtype)) return false;
    if (t.dtype == kBool && std::any_of(data, data + t.bytes, [](uint8_t b) { return b > 1; })) return false;
    (*offsets)[i] = at;
    at += t.bytes;
  }
  return at == f.payload_bytes;
}

bool read_answer(const Frame& f, const uint8_t* payload, RawAnswer* out) {
  if (f.kind != Kind::kAnswer || f.tensor_count != 3 || !is_one(f.tensors[1], kInt64) || !is_one(f.tensors[2], kFp32)) return false;
  const Tensor& logits = f.tensors[0];
  if (logits.packing || logits.dims != 2 || logits.shape[0] != 1 || !logits.shape[1] || logits.dtype == kBool || logits.bytes != size_of(logits)) return false;
  if (f.payload_bytes != logits.bytes + sizeof out->label + sizeof out->confidence) return false;
  out->logits = payload, out->dtype = logits.dtype, out->classes = logits.shape[1], out->bytes = logits.bytes;
  std::memcpy(&out->label, payload + logits.bytes, sizeof out->label);
  std::memcpy(&out->confidence, payload + logits.bytes + sizeof out->label, sizeof out->confidence);
  return true;
}

}  // namespace fastee::net
