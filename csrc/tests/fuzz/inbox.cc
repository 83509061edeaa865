// libFuzzer: a peer sends any messages in any order: whole frames, pieces, damage. Every one is refused, awaited or a frame whose
// payload is what was sent; what a peer holds never exceeds its bytes, and nothing is held once all is released.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "net/crc32c.h"
#include "net/inbox.h"

using namespace fastee::net;

namespace {
[[noreturn]] void broken() { std::abort(); }

constexpr uint64_t kPeerBytes = 5000;
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  Inbox inbox({}, 4096, kPeerBytes);
  const std::shared_ptr<Account> account = inbox.account("peer");
  std::vector<Arrival> kept;
  int64_t now = 0;
  std::vector<uint8_t> sent, head(kMaxHeader);
  size_t offset = 0;
  for (size_t at = 0; at + 4 <= size;) {
    const uint8_t action = input[at], a = input[at + 1], b = input[at + 2];
    const size_t length = std::min<size_t>(input[at + 3], size - at - 4);
    const uint8_t* bytes = input + at + 4;
    at += 4 + length;
    std::vector<uint8_t> first, second(bytes, bytes + length);
    size_t count = 2;
    if (action % 8 == 0) {  // a good frame, or its beginning
      Frame f;
      f.kind = Kind::kTask, f.task = a;
      sent.assign(static_cast<size_t>(a) * b % 4000, b);
      f.payload_bytes = sent.size();
      head.resize(kMaxHeader);
      head.resize(encode(f, crc32c(0, sent.data(), sent.size()), head.data()));
      first = head;
      offset = std::min(sent.size(), length ? sent.size() * length / 256 : sent.size());
      second.assign(sent.begin(), sent.begin() + static_cast<std::ptrdiff_t>(offset));
    } else if (action % 8 == 1 && !sent.empty()) {  // the next piece, as it should be
      first.resize(kChunkBytes);
      write_chunk_header(first.data(), offset);
      const size_t take = std::min<size_t>(sent.size() - offset, 1 + a * 4);
      second.assign(sent.begin() + static_cast<std::ptrdiff_t>(offset), sent.begin() + static_cast<std::ptrdiff_t>(offset + take));
      offset += take;
    } else if (action % 8 == 2) {  // a piece at any place
      first.resize(kChunkBytes);
      write_chunk_header(first.data(), a * 256u + b);
    } else if (action % 8 == 3) {  // time passes, or something is released
      now += a * 100;
      inbox.expire(now, 5000);
      if (!kept.empty()) kept.erase(kept.begin() + b % static_cast<int>(kept.size()));
      continue;
    } else if (action % 8 == 4) {  // a damaged header under a right length
      first = head;
      if (!first.empty()) first[a % first.size()] ^= b;
    } else {
      first.assign(bytes, bytes + std::min<size_t>(length, a));
      count = action % 8 == 5 ? 1 : action % 8 == 6 ? 2 : b % 4;
    }
    const Part parts[3] = {{first.data(), first.size()}, {second.data(), second.size()}, {second.data(), second.size()}};
    Arrival arrival;
    std::string why;
    const Inbox::Result result = inbox.take("peer", action & 64 ? false : true, parts, count, now, &arrival, &why);
    if (result == Inbox::Result::kBad && why.size() < 8) broken();
    if (result == Inbox::Result::kFrame) {
      if (arrival.payload.size() != arrival.frame.payload_bytes) broken();
      if (arrival.payload.size() && arrival.payload.data()[arrival.payload.size() - 1] == 0xff) arrival.payload.data()[0] ^= 1;  // writable
      kept.push_back(std::move(arrival));
    }
    if (account->bytes < 0 || static_cast<uint64_t>(account->bytes) > kPeerBytes) broken();
  }
  kept.clear();
  inbox.forget("peer");
  if (account->bytes != 0) broken();
  return 0;
}
