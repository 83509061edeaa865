// What a task or an answer carries when it travels as it lies in memory: where each tensor is in the payload. No tensor library, nothing copied.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "net/frame.h"

namespace fastee::net {

size_t dtype_bytes(uint8_t id);  // by wire id; 0 for none

// Offsets of the tensors of a decoded frame in its payload of frame.payload_bytes. False where that cannot be read in place: a tensor is packed,
// empty or not aligned to its values, its size is not what its shape needs, a bool is neither 0 nor 1.
bool place_raw(const Frame& frame, const uint8_t* payload, std::array<size_t, kMaxTensors>* offsets);

struct RawAnswer {
  const uint8_t* logits = nullptr;  // one row
  uint8_t dtype = 0;
  uint32_t classes = 0;
  uint64_t bytes = 0;
  int64_t label = -1;
  float confidence = 0;
};
// Logits [1, C], an int64 label and an fp32 confidence, at any address; false for a frame that holds anything else.
bool read_answer(const Frame& frame, const uint8_t* payload, RawAnswer* out);

}  // namespace fastee::net
