// What the kernels stand on: elements, asynchronous copies, the warp. The kernels compute in the CPU kernels' sixteen logical lanes, with
// the same fused multiply-adds and the same trees, so that a decision does not depend on whether a CPU or a GPU took it; nvcc gets
// -fmad=false, and what is fused is written as fused. Sources here also compile against csrc/tests/cuda/cuda_runtime.h, without a device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"

namespace fastee::cuda {

using cpu::kBF16;
using cpu::kF16;
using cpu::kF32;
using cpu::kI8;

constexpr unsigned kAll = 0xffffffffu;
constexpr float kInf = __builtin_inff(), kNaN = __builtin_nanf("");

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  if (magnitude >= 0x0400) return __uint_as_float(sign | ((magnitude << 13) + 0x38000000));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -tiny : tiny;
#endif
}

// Sixteen bytes of memory as values.
template <typename T>
union Vector {
  static constexpr int kValues = 16 / sizeof(T);
  uint4 bytes;
  T values[kValues];
};
template <typename T>
__device__ __forceinline__ Vector<T> load16(const T* p) {
  Vector<T> v;
  v.bytes = *reinterpret_cast<const uint4*>(p);
  return v;
}

__host__ __device__ inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Call f with a null pointer of the element type that `element` (cpu/kernels.h) names.
template <typename F>
__device__ __forceinline__ void with_float(int element, F f) {
  if (element == kBF16)
    f(static_cast<const bf16*>(nullptr));
  else if (element == kF16)
    f(static_cast<const f16*>(nullptr));
  else
    f(static_cast<const float*>(nullptr));
}

// The block's dynamic shared memory; its size is the launch's.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef FASTEE_EMULATED_DEVICE
  return emulation::machine().now->block->shared.get();
#else
  extern __shared__ uint4 fastee_shared[];
  return reinterpret_cast<unsigned char*>(fastee_shared);
#endif
}

// Sixteen bytes from global to shared memory, past the registers; closed into groups, which are waited for oldest first.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef FASTEE_EMULATED_DEVICE
  if (!aligned16(shared) || !aligned16(global)) emulation::Machine::stop("an asynchronous copy is not aligned to 16 bytes");
  emulation::machine().now->open.push_back({shared, global});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
#endif
}
__device__ __forceinline__ void close_copies() {
#ifdef FASTEE_EMULATED_DEVICE
  auto& f = *emulation::machine().now;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Pending>  // wait until at most so many groups are under way
__device__ __forceinline__ void wait_copies() {
#ifdef FASTEE_EMULATED_DEVICE
  for (auto& groups = emulation::machine().now->groups; static_cast<int>(groups.size()) > Pending; groups.pop_front())
    for (auto& c : groups.front()) __builtin_memcpy(c.to, c.from, 16);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// x86's rule for NaN and signed zeros: the second operand unless the comparison holds.
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }

// The CPU kernels' tree over the sixteen lanes of a half warp, lane i with i + 8, then + 4, + 2, + 1; every lane gets lane 0's result.
template <typename F>
__device__ __forceinline__ float tree16(float v, F f) {
#pragma unroll
  for (int w = 8; w; w /= 2) v = f(v, __shfl_xor_sync(kAll, v, w));
  return __shfl_sync(kAll, v, static_cast<int>(threadIdx.x & 16));
}
__device__ __forceinline__ float sum16(float v) {
  return tree16(v, [](float a, float b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int w = 16; w; w /= 2) v += __shfl_xor_sync(kAll, v, w);
  return v;
}
}  // namespace fastee::cuda
