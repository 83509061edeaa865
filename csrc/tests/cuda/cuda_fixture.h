// What the tests of the emulated CUDA library share: tensors on either side, guarded outputs, working memory that must stay zero.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../check.h"
#include "fastee/cuda.h"

constexpr DLDataType kFloat = {kDLFloat, 32, 1};

struct Tensor {
  Tensor(const void* data, std::vector<int64_t> shape, DLDataType type = kFloat, int32_t device = kDLCPU, std::vector<int64_t> strides = {})
      : shape(std::move(shape)), strides(std::move(strides)) {
    t = {const_cast<void*>(data),
         {device, 0},
         static_cast<int32_t>(this->shape.size()),
         type,
         this->shape.data(),
         this->strides.empty() ? nullptr : this->strides.data(),
         0};
  }
  Tensor(const Tensor&) = delete;
  const DLTensor* operator&() { return &t; }
  std::vector<int64_t> shape, strides;
  DLTensor t;
};

// n values between guard bytes, aligned to 16 bytes.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t n) : n_(static_cast<size_t>(n)), raw_(n_ * sizeof(T) + 128, 0xa5) {}
  T* data() { return reinterpret_cast<T*>(raw_.data() + 64); }
  std::vector<T> values() { return {data(), data() + n_}; }
  bool intact() const {
    for (size_t i = 0; i < 64; ++i)
      if (raw_[i] != 0xa5 || raw_[raw_.size() - 1 - i] != 0xa5) return false;
    return true;
  }

 private:
  size_t n_;
  std::vector<unsigned char> raw_;
};

struct DeviceMemory {
  DeviceMemory(int64_t rows, int64_t scratch_bytes)
      : sync(static_cast<size_t>(fastee_cuda_sync_bytes(rows))), scratch(static_cast<size_t>(scratch_bytes) + 1, 0xff) {
    m = {sync.data(), static_cast<int64_t>(sync.size()), scratch.data(), scratch_bytes};
  }
  bool clean() const {
    for (unsigned char b : sync)
      if (b) return false;
    return true;
  }
  std::vector<unsigned char> sync, scratch;
  fastee_cuda_memory m;
};

// x as fp32, bf16 (kind 1) or fp16 (kind 2), truncated; x becomes what that holds.
struct Narrow {
  Narrow(std::vector<float>& x, int kind)
      : kind(kind), wide(&x), type{static_cast<uint8_t>(kind == 1 ? kDLBfloat : kDLFloat), static_cast<uint8_t>(kind ? 16 : 32), 1} {
    if (kind == 0) return;
    bits.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      uint32_t u;
      std::memcpy(&u, &x[i], 4);
      if (kind == 1) {
        u &= 0xffff0000;
        bits[i] = static_cast<uint16_t>(u >> 16);
        std::memcpy(&x[i], &u, 4);
      } else {  // numbers of fp16's normal range, and NaN; anything smaller becomes 0
        const int e = static_cast<int>(u >> 23 & 255) - 127;
        const bool nan = x[i] != x[i];
        bits[i] = static_cast<uint16_t>(u >> 16 & 0x8000);
        if (nan)
          bits[i] |= 0x7e00;
        else if (e >= -14)
          bits[i] |= static_cast<uint16_t>((e > 15 ? 30 : e + 15) << 10 | (u >> 13 & 0x3ff));
        const int be = bits[i] >> 10 & 31;
        x[i] = nan       ? NAN
               : be == 0 ? std::copysign(0.0f, x[i])
                         : std::copysign(std::ldexp(1.0f + static_cast<float>(bits[i] & 0x3ff) / 1024.0f, be - 15), x[i]);
      }
    }
  }
  const void* data() const { return kind ? static_cast<const void*>(bits.data()) : wide->data(); }
  int kind;
  std::vector<float>* wide;
  std::vector<uint16_t> bits;
  DLDataType type;
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] != a[i] && b[i] != b[i]) && std::memcmp(&a[i], &b[i], 4) != 0) return false;
  return a.size() == b.size();
}
