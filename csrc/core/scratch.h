// Thread-local working memory that grows and stays: a call allocates only when it needs more than any call before it on its
// thread (malloc of 64 KB costs more than a whole batch-1 exit head).
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace fastee {
class Scratch {
 public:
  static constexpr size_t kAlign = 64;
  ~Scratch() { std::free(memory_); }

  // Memory for `bytes`, 64-byte aligned, valid until the next reserve() on this thread; nullptr when there is none.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_t wanted = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(kAlign, wanted);
      size_ = memory_ ? wanted : 0;
    }
    return memory_;
  }

  static Scratch& here() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};
}  // namespace fastee
