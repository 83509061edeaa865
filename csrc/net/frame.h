// The wire frame, byte by byte as docs/cluster.md lists it; fastee/cluster/frame.py is its twin and the tests' oracle.
// Whatever arrives is checked against caps before anything is allocated; nothing here executes what it reads.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastee::net {

constexpr uint16_t kVersion = 1;
constexpr uint64_t kMaxPayload = 256ull << 20;
constexpr int kMaxTensors = 16, kMaxDims = 8, kMaxRoute = 64;
constexpr int64_t kNoDeadline = INT64_MAX;
constexpr size_t kHeaderBytes = 92, kEntryBytes = 12;
constexpr size_t kMaxTable = kMaxRoute + kMaxTensors * (kEntryBytes + 4 * kMaxDims);
constexpr size_t kMaxHeader = kHeaderBytes + kMaxTable;

enum class Kind : uint8_t { kHello = 1, kHeartbeat, kTask, kAnswer, kMoved, kRefused, kCredit };
enum Flag : uint8_t { kExitsOff = 1, kForced = 2 };

struct Tensor {
  uint8_t dtype = 0, packing = 0, dims = 0;
  uint64_t bytes = 0;
  std::array<uint32_t, kMaxDims> shape{};
};

struct Frame {
  Kind kind = Kind::kHello;
  uint8_t flags = 0, codec = 255, tensor_count = 0, route_bytes = 0;
  uint64_t task = 0, sender = 0, origin = 0;
  std::array<uint8_t, 16> fingerprint{};
  uint16_t segment = 0, hops = 0;
  int16_t exit = -1;
  int64_t time_left = kNoDeadline;
  uint64_t wire_bytes = 0, payload_bytes = 0;
  uint32_t table_bytes = 0, crc = 0;
  std::array<uint8_t, kMaxRoute> route{};
  std::array<Tensor, kMaxTensors> tensors;

  size_t header_bytes() const { return kHeaderBytes + table_bytes; }
  uint64_t bytes() const { return header_bytes() + payload_bytes; }
};

struct Part {
  const uint8_t* data;
  size_t size;
};

enum class Verdict { kOk, kMalformed, kForeign };  // kForeign: whole and well-formed, but of another model

// Reads the fixed part and checks its caps; `why` gets the reason when it is refused. Enough to know how much memory a frame needs.
Verdict parse_fixed(const uint8_t* head, size_t bytes, uint64_t max_payload, Frame* out, std::string* why);

// Checks the checksum, the kind, the model and the table of a header whose fixed part was parsed into `out`.
Verdict parse_rest(const uint8_t* head, uint32_t payload_crc, const std::array<uint8_t, 16>* fingerprint, Frame* out, std::string* why);

// Both for a whole message: [header, payload] or one joined part. `payload` points into the parts.
Verdict decode(const Part* parts, size_t count, const std::array<uint8_t, 16>* fingerprint, uint64_t max_payload, Frame* out, Part* payload,
               std::string* why);

// Writes the header with route and table (out: kMaxHeader bytes) and returns its size; tensor_count, route_bytes and the caps
// must hold (see `unfit`). `payload_crc` is crc32c of the payload.
size_t encode(const Frame& frame, uint32_t payload_crc, uint8_t* out);

// Why a frame cannot be sent, empty when it can.
std::string unfit(const Frame& frame);

}  // namespace fastee::net
