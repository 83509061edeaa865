// Memory of received payloads (pooled, aligned to 64 bytes, given back from any thread) and of those on their way out.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastee::net {

// What one peer has in this process that nobody has released yet.
struct Account {
  std::atomic<int64_t> frames{0}, tasks{0}, bytes{0};
};

class BufferPool;

// A received payload; destroying it gives the memory back. Movable, shared by nobody.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { reset(); }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  void reset() noexcept;

 private:
  friend class BufferPool;
  std::shared_ptr<BufferPool> pool_;
  std::shared_ptr<Account> account_;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  int bin_ = 0;
};

// Free blocks by power of two. `take` belongs to one thread; blocks come back through a lock-free stack per size, which that
// thread empties as a whole, so that no block is popped while another thread looks at it.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  static constexpr size_t kAlign = 64;
  explicit BufferPool(size_t keep_bytes = 64u << 20) : keep_bytes_(keep_bytes) {}
  ~BufferPool();

  // `size` bytes on the account, uninitialised. Throws std::bad_alloc.
  Buffer take(size_t size, std::shared_ptr<Account> account);
  size_t kept_bytes() const { return kept_.load(std::memory_order_relaxed); }

 private:
  friend class Buffer;
  struct Free {
    Free* next;
  };
  static constexpr int kSmallest = 10, kBins = 20;  // 1 KiB to 512 MiB
  void give_back(uint8_t* data, int bin) noexcept;

  size_t keep_bytes_;
  std::atomic<size_t> kept_{0};
  std::array<std::atomic<Free*>, kBins> returned_{};
  std::array<Free*, kBins> own_{};
};

// Bytes on their way out, counted by everything that still needs them (queue entries, messages inside libzmq). The last one to let go
// calls `release` from whatever thread that is.
class Payload {
 public:
  Payload(const void* data, size_t size, void (*release)(void*), void* owner) : data_(data), size_(size), release_(release), owner_(owner) {}
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  size_t size() const { return size_; }
  void hold() { users_.fetch_add(1, std::memory_order_relaxed); }
  void drop() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    release_(owner_);
    delete this;
  }

 private:
  const void* data_;
  size_t size_;
  void (*release_)(void*);
  void* owner_;
  std::atomic<int> users_{1};
};

// A counted reference to a Payload.
class PayloadRef {
 public:
  PayloadRef() = default;
  explicit PayloadRef(Payload* adopted) : payload_(adopted) {}
  PayloadRef(PayloadRef&& other) noexcept : payload_(other.payload_) { other.payload_ = nullptr; }
  PayloadRef& operator=(PayloadRef&& other) noexcept {
    if (payload_ != other.payload_ && payload_) payload_->drop();
    payload_ = other.payload_;
    other.payload_ = nullptr;
    return *this;
  }
  ~PayloadRef() {
    if (payload_) payload_->drop();
  }
  Payload* get() const { return payload_; }
  const uint8_t* data() const { return payload_ ? payload_->data() : nullptr; }
  size_t size() const { return payload_ ? payload_->size() : 0; }

 private:
  Payload* payload_ = nullptr;
};

// A payload that owns a copy of its bytes.
PayloadRef copied(const void* data, size_t size);

}  // namespace fastee::net
