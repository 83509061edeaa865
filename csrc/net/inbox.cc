#include "net/inbox.h"

#include <cstring>
#include <utility>

#include "net/crc32c.h"

namespace fastee::net {
namespace {
constexpr char kChunkMagic[8] = {'F', 'S', 'T', 'C', 0, 0, 0, 0};
constexpr size_t kAccountsKept = 4096;

Inbox::Result bad(std::string* why, std::string text) {
  *why = "frame: " + text;
  return Inbox::Result::kBad;
}
}  // namespace

void write_chunk_header(uint8_t* out, uint64_t offset) {
  std::memcpy(out, kChunkMagic, 8);
  std::memcpy(out + 8, &offset, 8);
}

std::shared_ptr<Account> Inbox::account(const std::string& peer) {
  if (accounts_.size() > kAccountsKept)  // names are the peers' choice: one that comes with a new one each time must not fill the table
    std::erase_if(accounts_, [](const auto& a) { return a.second.use_count() == 1; });
  auto& found = accounts_[peer];
  if (!found) found = std::make_shared<Account>();
  return found;
}

Inbox::Result Inbox::finish(const uint8_t* head, uint32_t payload_crc, Arrival* out, std::string* why) {
  const Verdict v = parse_rest(head, payload_crc, &fingerprint_, &out->frame, why);
  return v == Verdict::kOk ? Result::kFrame : v == Verdict::kForeign ? Result::kForeign : Result::kBad;
}

Inbox::Result Inbox::take(const std::string& peer, bool bulk, const Part* parts, size_t count, int64_t now, Arrival* out, std::string* why) {
  if (count < 1 || count > 2) return bad(why, std::to_string(count) + " message parts, expected header and payload");
  if (bulk && count == 2 && parts[0].size == kChunkBytes && std::memcmp(parts[0].data, kChunkMagic, 8) == 0) {
    const auto found = partial_.find(peer);
    uint64_t offset;
    std::memcpy(&offset, parts[0].data + 8, 8);
    if (found == partial_.end() || offset != found->second.have) {
      partial_.erase(peer);
      return bad(why, "a piece at offset " + std::to_string(offset) + " that no frame waits for");
    }
    Partial& p = found->second;
    const size_t size = parts[1].size;
    if (!size || size > p.arrival.payload.size() - p.have) {
      partial_.erase(found);
      return bad(why, "a piece of " + std::to_string(size) + " bytes does not fit its frame");
    }
    std::memcpy(p.arrival.payload.data() + p.have, parts[1].data, size);
    p.crc = crc32c(p.crc, p.arrival.payload.data() + p.have, size);
    p.have += size, p.last = now;
    if (p.have < p.arrival.payload.size()) return Result::kIncomplete;
    *out = std::move(p.arrival);
    const auto head = p.head;
    const uint32_t crc = p.crc;
    partial_.erase(found);
    return finish(head.data(), crc, out, why);
  }
  Frame& frame = out->frame;
  if (parse_fixed(parts[0].data, parts[0].size, max_payload_, &frame, why) != Verdict::kOk) return Result::kBad;
  const size_t end = frame.header_bytes();
  if (count == 2 ? parts[0].size != end : parts[0].size < end)
    return bad(why, "header part of " + std::to_string(parts[0].size) + " bytes, its table says " + std::to_string(end));
  const Part body = count == 2 ? parts[1] : Part{parts[0].data + end, parts[0].size - end};
  if (body.size > frame.payload_bytes || (body.size < frame.payload_bytes && !(bulk && count == 2 && body.size)))
    return bad(why, "payload of " + std::to_string(body.size) + " bytes, the header says " + std::to_string(frame.payload_bytes));
  out->account = account(peer);
  if (frame.payload_bytes) {
    const auto held = static_cast<uint64_t>(out->account->bytes.load(std::memory_order_relaxed));
    if (held + frame.payload_bytes > peer_bytes_)
      return bad(why, "the peer has " + std::to_string(held) + " bytes here already, with " + std::to_string(frame.payload_bytes) +
                          " more it would exceed its " + std::to_string(peer_bytes_));
    out->payload = pool_->take(frame.payload_bytes, out->account);
    std::memcpy(out->payload.data(), body.data, body.size);
  }
  const uint32_t crc = body.size ? crc32c(0, out->payload.data(), body.size) : 0;  // of the copy, which is in the cache now
  if (body.size == frame.payload_bytes) return finish(parts[0].data, crc, out, why);
  Partial& p = partial_[peer];  // a frame that stopped half-way is replaced
  p.arrival = std::move(*out);
  std::memcpy(p.head.data(), parts[0].data, end);
  p.have = body.size, p.crc = crc, p.last = now;
  return Result::kIncomplete;
}

int Inbox::expire(int64_t now, int64_t idle_ns) {
  return static_cast<int>(std::erase_if(partial_, [&](const auto& p) { return now - p.second.last > idle_ns; }));
}

}  // namespace fastee::net
