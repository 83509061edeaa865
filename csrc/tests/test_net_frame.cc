// The C++ frame codec: checksum against its published values, round trip, and every single damaged bit refused.
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "net/crc32c.h"
#include "net/frame.h"

using namespace fastee::net;

namespace {

uint32_t slow_crc(uint32_t crc, const uint8_t* p, size_t n) {
  crc = ~crc;
  for (size_t i = 0; i < n; ++i) {
    crc ^= p[i];
    for (int k = 0; k < 8; ++k) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
  }
  return ~crc;
}

void checksum() {
  CHECK(crc32c(0, "123456789", 9) == 0xe3069283u);  // the check value of the Rocksoft model's catalogue
  uint8_t zeros[32] = {};
  CHECK(crc32c(0, zeros, 32) == 0x8a9136aau);  // RFC 3720, B.4
  std::vector<uint8_t> bytes(70001);
  uint32_t seed = 1;
  for (auto& b : bytes) b = static_cast<uint8_t>((seed = seed * 1664525 + 1013904223) >> 24);
  for (size_t n : {0, 1, 7, 8, 9, 63, 4095, 4096, 4097, 12289, 65536, 70000})
    for (size_t lead : {0, 1}) {
      const uint32_t whole = slow_crc(17, bytes.data() + lead, n);
      CHECK(crc32c(17, bytes.data() + lead, n) == whole);
      const size_t cut = n / 3;
      const uint32_t a = crc32c(17, bytes.data() + lead, cut), b = crc32c(0, bytes.data() + lead + cut, n - cut);
      CHECK(crc32c_join(a, b, n - cut) == whole);
    }
}

Frame sample(const std::vector<uint8_t>& payload) {
  Frame f;
  f.kind = Kind::kTask;
  f.task = 0x1122334455667788ull, f.sender = 5, f.origin = 6, f.segment = 2, f.exit = 1, f.codec = 0, f.hops = 257;
  f.fingerprint = {1, 2, 3};
  f.time_left = -4, f.wire_bytes = 99;
  f.route_bytes = 3, f.route = {0, 1, 255};
  f.tensor_count = 1;
  f.tensors[0].dtype = 1, f.tensors[0].dims = 2, f.tensors[0].shape = {2, 3}, f.tensors[0].bytes = payload.size();
  f.payload_bytes = payload.size();
  return f;
}

void round_trip() {
  const std::vector<uint8_t> payload(24, 7);
  const Frame f = sample(payload);
  std::vector<uint8_t> wire(kMaxHeader);
  const size_t head = encode(f, crc32c(0, payload.data(), payload.size()), wire.data());
  CHECK(head == kHeaderBytes + 3 + 12 + 8);
  wire.resize(head);
  wire.insert(wire.end(), payload.begin(), payload.end());
  Frame back;
  Part body{};
  std::string why;
  const Part two[] = {{wire.data(), head}, {wire.data() + head, payload.size()}}, one{wire.data(), wire.size()};
  CHECK(decode(two, 2, &f.fingerprint, kMaxPayload, &back, &body, &why) == Verdict::kOk);
  CHECK(decode(&one, 1, &f.fingerprint, kMaxPayload, &back, &body, &why) == Verdict::kOk);
  CHECK(back.task == f.task && back.time_left == -4 && back.route[2] == 255 && back.tensors[0].shape[1] == 3 && body.size == 24);
  const std::array<uint8_t, 16> other{};
  CHECK(decode(&one, 1, &other, kMaxPayload, &back, &body, &why) == Verdict::kForeign);
  CHECK(decode(&one, 1, nullptr, 23, &back, &body, &why) == Verdict::kMalformed && why.find("exceeds the cap of 23") != std::string::npos);
  for (size_t bit = 0; bit < wire.size() * 8; ++bit) {
    wire[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    why.clear();
    CHECK(decode(&one, 1, nullptr, kMaxPayload, &back, &body, &why) == Verdict::kMalformed && why.size() > 10);
    wire[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  }
  for (size_t n = 0; n < wire.size(); ++n) {
    const Part cut{wire.data(), n};
    CHECK(decode(&cut, 1, nullptr, kMaxPayload, &back, &body, &why) == Verdict::kMalformed);
  }
}

void sizes_that_overflow() {
  const std::vector<uint8_t> payload(24, 7);
  Frame f = sample(payload);
  f.tensor_count = 2;
  f.tensors[1] = f.tensors[0];
  f.tensors[0].bytes = UINT64_MAX - 7, f.tensors[1].bytes = 32;  // 24 modulo 2^64
  uint8_t head[kMaxHeader];
  const size_t n = encode(f, crc32c(0, payload.data(), 24), head);
  const Part parts[] = {{head, n}, {payload.data(), 24}};
  Part body{};
  std::string why;
  CHECK(decode(parts, 2, nullptr, kMaxPayload, &f, &body, &why) == Verdict::kMalformed);
  CHECK(why == "frame: the tensors need 18446744073709551640 bytes, the payload has 24");
}

}  // namespace

int main() {
  checksum();
  round_trip();
  sizes_that_overflow();
  return report("net_frame");
}
