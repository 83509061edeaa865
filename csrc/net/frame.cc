#include "net/frame.h"

#include <bit>
#include <cstdio>
#include <cstring>

#include "net/crc32c.h"

static_assert(std::endian::native == std::endian::little, "the wire is little-endian; a big-endian host would need to swap");

namespace fastee::net {
namespace {

constexpr char kMagic[4] = {'F', 'S', 'T', 'E'};
constexpr size_t kCrcAt = kHeaderBytes - 4;
constexpr uint64_t kMostElements = 1ull << 40;
constexpr int kLastDtype = 10, kLastKind = static_cast<int>(Kind::kCredit);

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <typename T>
void store(uint8_t* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

std::string number(uint64_t n) { return std::to_string(n); }

std::string hex(uint64_t n, const char* format) {
  char text[32];
  std::snprintf(text, sizeof text, format, static_cast<unsigned long long>(n));
  return text;
}

std::string hex(const std::array<uint8_t, 16>& bytes) {
  std::string out;
  for (uint8_t b : bytes) out += hex(b, "%02llx");
  return out;
}

// As Python prints bytes, so that both decoders say the same.
std::string quoted(const uint8_t* p, size_t n) {
  const bool single = std::memchr(p, '\'', n) != nullptr, twice = std::memchr(p, '"', n) != nullptr;
  const char mark = single && !twice ? '"' : '\'';
  std::string out = std::string("b") + mark;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t c = p[i];
    if (c == '\\' || c == mark) out += std::string("\\") + static_cast<char>(c);
    else if (c == '\t') out += "\\t";
    else if (c == '\n') out += "\\n";
    else if (c == '\r') out += "\\r";
    else if (c < 32 || c > 126) out += hex(c, "\\x%02llx");
    else out += static_cast<char>(c);
  }
  return out + mark;
}

std::string shape_text(const Tensor& t) {
  std::string out = "(";
  for (int i = 0; i < t.dims; ++i) out += (i ? ", " : "") + number(t.shape[i]);
  return out + (t.dims == 1 ? ",)" : ")");
}

// The checksum covers the header without its own field, the route and table, the payload: in this order.
uint32_t checksum(const uint8_t* head, size_t table_bytes, uint32_t payload_crc, uint64_t payload_bytes) {
  const uint32_t crc = crc32c(crc32c(0, head, kCrcAt), head + kHeaderBytes, table_bytes);
  return payload_bytes ? crc32c_join(crc, payload_crc, payload_bytes) : crc;
}

Verdict refuse(std::string* why, std::string text, Verdict verdict = Verdict::kMalformed) {
  *why = "frame: " + text;
  return verdict;
}

}  // namespace

Verdict parse_fixed(const uint8_t* head, size_t bytes, uint64_t max_payload, Frame* out, std::string* why) {
  if (bytes < kHeaderBytes) return refuse(why, number(bytes) + " bytes, a header has " + number(kHeaderBytes));
  if (std::memcmp(head, kMagic, 4) != 0)
    return refuse(why, "magic is " + quoted(head, 4) + ", expected b'FSTE': the peer does not speak this protocol");
  if (const auto version = load<uint16_t>(head + 4); version != kVersion)
    return refuse(why, "version " + number(version) + ", this program speaks " + number(kVersion) + ": install the same fastee on all nodes");
  if (head[55] || load<uint16_t>(head + 58)) return refuse(why, "reserved bytes are not zero");
  Frame& f = *out;
  f.kind = static_cast<Kind>(head[6]);
  f.flags = head[7];
  f.task = load<uint64_t>(head + 8);
  f.sender = load<uint64_t>(head + 16);
  f.origin = load<uint64_t>(head + 24);
  std::memcpy(f.fingerprint.data(), head + 32, 16);
  f.segment = load<uint16_t>(head + 48);
  f.exit = load<int16_t>(head + 50);
  f.codec = head[52];
  f.tensor_count = head[53];
  f.route_bytes = head[54];
  f.hops = load<uint16_t>(head + 56);
  f.time_left = load<int64_t>(head + 60);
  f.wire_bytes = load<uint64_t>(head + 68);
  f.table_bytes = load<uint32_t>(head + 76);
  f.payload_bytes = load<uint64_t>(head + 80);
  f.crc = load<uint32_t>(head + kCrcAt);
  if (f.payload_bytes > max_payload)
    return refuse(why, "payload of " + number(f.payload_bytes) + " bytes exceeds the cap of " + number(max_payload));
  if (f.tensor_count > kMaxTensors || f.route_bytes > kMaxRoute || f.table_bytes > kMaxTable)
    return refuse(why, number(f.tensor_count) + " tensors, route " + number(f.route_bytes) + ", table " + number(f.table_bytes) +
                           " bytes exceed the caps");
  return Verdict::kOk;
}

Verdict parse_rest(const uint8_t* head, uint32_t payload_crc, const std::array<uint8_t, 16>* fingerprint, Frame* out, std::string* why) {
  Frame& f = *out;
  const uint32_t found = checksum(head, f.table_bytes, payload_crc, f.payload_bytes);
  if (found != f.crc)
    return refuse(why, "CRC32C is " + hex(found, "0x%08llx") + ", the header says " + hex(f.crc, "0x%08llx") + ": the bytes were damaged");
  const int kind = static_cast<int>(f.kind);
  if (kind < 1 || kind > kLastKind) return refuse(why, number(kind) + " is not a valid Kind");
  if (f.flags & ~(kExitsOff | kForced)) return refuse(why, "unknown flags " + hex(f.flags, "0x%llx"));
  if (fingerprint != nullptr && f.fingerprint != *fingerprint)
    return refuse(why, "model fingerprint " + hex(f.fingerprint) + ", this node runs " + hex(*fingerprint) + ": load the same net on all nodes",
                  Verdict::kForeign);
  const uint8_t* p = head + kHeaderBytes;
  size_t left = f.table_bytes;
  if (left < f.route_bytes)
    return refuse(why, "table of " + number(left) + " bytes is shorter than its route of " + number(f.route_bytes));
  std::memcpy(f.route.data(), p, f.route_bytes);
  p += f.route_bytes, left -= f.route_bytes;
  uint64_t sum = 0;
  bool over = false;
  for (int i = 0; i < f.tensor_count; ++i) {
    if (left < kEntryBytes) return refuse(why, "the table ends inside tensor " + number(i));
    Tensor& t = f.tensors[i];
    t.dtype = p[0], t.packing = p[1], t.dims = p[2];
    t.bytes = load<uint64_t>(p + 4);
    const bool padded = p[3] != 0;
    p += kEntryBytes, left -= kEntryBytes;
    if (padded || t.dtype < 1 || t.dtype > kLastDtype || t.dims > kMaxDims || left < 4u * t.dims)
      return refuse(why, "tensor " + number(i) + " has dtype id " + number(t.dtype) + " and " + number(t.dims) + " dimensions, which cannot be");
    // Zeros count as ones, or a shape with a zero could hide sizes that overflow whoever multiplies them.
    unsigned __int128 elements = 1;
    for (int d = 0; d < t.dims; ++d) {
      t.shape[d] = load<uint32_t>(p + 4 * d);
      if (elements <= kMostElements) elements *= t.shape[d] ? t.shape[d] : 1;
    }
    p += 4 * t.dims, left -= 4 * t.dims;
    if (elements > kMostElements)
      return refuse(why, "tensor " + number(i) + " of shape " + shape_text(t) + " is beyond the cap of " + number(kMostElements) + " elements");
    over = over || t.bytes > f.payload_bytes - (sum < f.payload_bytes ? sum : f.payload_bytes);
    sum = over ? sum : sum + t.bytes;
  }
  if (left) return refuse(why, number(left) + " stray bytes after the tensor table");
  if (f.tensor_count && (over || sum != f.payload_bytes)) {
    unsigned __int128 need = 0;  // sixteen sizes of 64 bits: in Python the sum cannot overflow either
    for (int i = 0; i < f.tensor_count; ++i) need += f.tensors[i].bytes;
    std::string digits;
    do digits.insert(digits.begin(), static_cast<char>('0' + static_cast<int>(need % 10)));
    while (need /= 10);
    return refuse(why, "the tensors need " + digits + " bytes, the payload has " + number(f.payload_bytes));
  }
  return Verdict::kOk;
}

Verdict decode(const Part* parts, size_t count, const std::array<uint8_t, 16>* fingerprint, uint64_t max_payload, Frame* out, Part* payload,
               std::string* why) {
  if (count < 1 || count > 2) return refuse(why, number(count) + " message parts, expected header and payload");
  const uint8_t* head = parts[0].data;
  const size_t bytes = parts[0].size;
  if (const Verdict v = parse_fixed(head, bytes, max_payload, out, why); v != Verdict::kOk) return v;
  const size_t end = out->header_bytes();
  if (count == 2) {
    if (bytes != end)
      return refuse(why, "header part of " + number(bytes <= kMaxHeader ? bytes : kMaxHeader + 1) + " bytes, its table says " + number(end));
    *payload = parts[1];
  } else {
    if (bytes < end) return refuse(why, number(bytes) + " bytes, header and table need " + number(end));
    *payload = {head + end, bytes - end};
  }
  if (payload->size != out->payload_bytes)
    return refuse(why, "payload of " + number(payload->size) + " bytes, the header says " + number(out->payload_bytes));
  return parse_rest(head, crc32c(0, payload->data, payload->size), fingerprint, out, why);
}

std::string unfit(const Frame& f) {
  if (f.tensor_count > kMaxTensors || f.route_bytes > kMaxRoute)
    return "frame: " + number(f.tensor_count) + " tensors and a route of " + number(f.route_bytes) + " exceed the caps " + number(kMaxTensors) +
           " and " + number(kMaxRoute);
  for (int i = 0; i < f.tensor_count; ++i)
    if (f.tensors[i].dims > kMaxDims)
      return "frame: a tensor of " + number(f.tensors[i].dims) + " dimensions cannot travel, the cap is " + number(kMaxDims);
  if (f.payload_bytes > kMaxPayload)
    return "frame: payload of " + number(f.payload_bytes) + " bytes exceeds the cap of " + number(kMaxPayload);
  return "";
}

size_t encode(const Frame& f, uint32_t payload_crc, uint8_t* out) {
  uint8_t* p = out + kHeaderBytes;
  std::memcpy(p, f.route.data(), f.route_bytes);
  p += f.route_bytes;
  for (int i = 0; i < f.tensor_count; ++i) {
    const Tensor& t = f.tensors[i];
    p[0] = t.dtype, p[1] = t.packing, p[2] = t.dims, p[3] = 0;
    store(p + 4, t.bytes);
    std::memcpy(p + kEntryBytes, t.shape.data(), 4u * t.dims);
    p += kEntryBytes + 4u * t.dims;
  }
  const auto table = static_cast<uint32_t>(p - out - kHeaderBytes);
  std::memcpy(out, kMagic, 4);
  store(out + 4, kVersion);
  out[6] = static_cast<uint8_t>(f.kind);
  out[7] = f.flags;
  store(out + 8, f.task);
  store(out + 16, f.sender);
  store(out + 24, f.origin);
  std::memcpy(out + 32, f.fingerprint.data(), 16);
  store(out + 48, f.segment);
  store(out + 50, f.exit);
  out[52] = f.codec, out[53] = f.tensor_count, out[54] = f.route_bytes, out[55] = 0;
  store(out + 56, f.hops);
  store(out + 58, uint16_t{0});
  store(out + 60, f.time_left);
  store(out + 68, f.wire_bytes);
  store(out + 76, table);
  store(out + 80, f.payload_bytes);
  store(out + kCrcAt, checksum(out, table, payload_crc, f.payload_bytes));
  return kHeaderBytes + table;
}

}  // namespace fastee::net
