// What comes from the peers: message parts in, whole checked frames out. No socket, no thread; the clock is handed in.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>

#include "net/buffers.h"
#include "net/frame.h"

namespace fastee::net {

// A later piece of a frame whose first message held less than its payload: "FSTC", four zero bytes, the offset in the payload.
constexpr size_t kChunkBytes = 16;
void write_chunk_header(uint8_t* out, uint64_t offset);

struct Arrival {
  Frame frame;
  Buffer payload;
  std::shared_ptr<Account> account;
};

class Inbox {
 public:
  enum class Result { kFrame, kIncomplete, kForeign, kBad };

  // `peer_bytes`: the most that one peer may have here that is not released yet, pieces included.
  Inbox(std::array<uint8_t, 16> fingerprint, uint64_t max_payload, uint64_t peer_bytes)
      : fingerprint_(fingerprint), max_payload_(max_payload), peer_bytes_(peer_bytes), pool_(std::make_shared<BufferPool>()) {}

  // Takes one message of `peer`. Pieces are joined on bulk connections only, one frame at a time per peer. kForeign and kFrame fill
  // `out`; kForeign (another model) and kBad give the reason.
  Result take(const std::string& peer, bool bulk, const Part* parts, size_t count, int64_t now, Arrival* out, std::string* why);

  // Forgets frames whose next piece did not come for `idle_ns` and returns how many; a peer that is gone leaves nothing here.
  int expire(int64_t now, int64_t idle_ns);
  void forget(const std::string& peer) { partial_.erase(peer); }
  std::shared_ptr<Account> account(const std::string& peer);

 private:
  struct Partial {
    Arrival arrival;
    std::array<uint8_t, kMaxHeader> head;
    size_t have = 0;
    uint32_t crc = 0;
    int64_t last = 0;
  };
  Result finish(const uint8_t* head, uint32_t payload_crc, Arrival* out, std::string* why);

  std::array<uint8_t, 16> fingerprint_;
  uint64_t max_payload_, peer_bytes_;
  std::shared_ptr<BufferPool> pool_;
  std::unordered_map<std::string, std::shared_ptr<Account>> accounts_;
  std::unordered_map<std::string, Partial> partial_;
};

}  // namespace fastee::net
