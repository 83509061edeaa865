#include "net/buffers.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <utility>

namespace fastee::net {

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  reset();
  pool_ = std::move(other.pool_), account_ = std::move(other.account_);
  data_ = std::exchange(other.data_, nullptr), size_ = std::exchange(other.size_, 0), bin_ = other.bin_;
  return *this;
}

void Buffer::reset() noexcept {
  if (account_) account_->bytes.fetch_sub(static_cast<int64_t>(size_), std::memory_order_relaxed);
  if (data_) pool_->give_back(data_, bin_);
  pool_.reset(), account_.reset();
  data_ = nullptr, size_ = 0;
}

BufferPool::~BufferPool() {
  for (int bin = 0; bin < kBins; ++bin)
    for (Free* list : {own_[bin], returned_[bin].load(std::memory_order_acquire)})
      while (list) ::operator delete(std::exchange(list, list->next), std::align_val_t{kAlign});
}

Buffer BufferPool::take(size_t size, std::shared_ptr<Account> account) {
  Buffer out;
  const int bin = std::max(0, static_cast<int>(std::bit_width(size ? size - 1 : 0)) - kSmallest);
  const size_t block = size_t{1} << (bin + kSmallest);
  if (bin < kBins && !own_[bin]) own_[bin] = returned_[bin].exchange(nullptr, std::memory_order_acquire);
  if (bin < kBins && own_[bin]) {
    out.data_ = reinterpret_cast<uint8_t*>(std::exchange(own_[bin], own_[bin]->next));
    kept_.fetch_sub(block, std::memory_order_relaxed);
  } else {
    out.data_ = static_cast<uint8_t*>(::operator new(bin < kBins ? block : size, std::align_val_t{kAlign}));
  }
  out.size_ = size, out.bin_ = bin;
  out.pool_ = shared_from_this();
  if (account) account->bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  out.account_ = std::move(account);
  return out;
}

void BufferPool::give_back(uint8_t* data, int bin) noexcept {
  const size_t block = size_t{1} << (bin + kSmallest);
  if (bin >= kBins || kept_.fetch_add(block, std::memory_order_relaxed) + block > keep_bytes_) {
    if (bin < kBins) kept_.fetch_sub(block, std::memory_order_relaxed);
    ::operator delete(data, std::align_val_t{kAlign});
    return;
  }
  auto* node = new (data) Free{returned_[bin].load(std::memory_order_relaxed)};
  while (!returned_[bin].compare_exchange_weak(node->next, node, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

PayloadRef copied(const void* data, size_t size) {
  if (!size) return {};
  auto* bytes = new uint8_t[size];
  std::memcpy(bytes, data, size);
  return PayloadRef(new Payload(bytes, size, [](void* p) { delete[] static_cast<uint8_t*>(p); }, bytes));
}

}  // namespace fastee::net
