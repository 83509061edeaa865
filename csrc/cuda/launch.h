// Launching, and what a failed launch says. Host side of the .cu files; compiled for the emulation too.
#pragma once
#include <cuda_runtime.h>

#include "core/check.h"
#include "fastee/cuda.h"

namespace fastee::cuda {

// A status for `error` of the call that `name` describes; keeps the name for the message of a later sticky error. launch.cu
fastee_status report(const char* name, cudaError_t error);

// Queue `kernel` with its arguments, which are structures passed by value.
template <typename... Args>
fastee_status launch(const char* name, void (*kernel)(Args...), int64_t blocks, unsigned threads, int64_t shared, void* stream,
                     std::type_identity_t<std::remove_const_t<Args>>... args) {
  if (blocks > 0x7fffffff)
    return fail(FASTEE_UNSUPPORTED, std::string(name) + ": a launch takes at most 2^31 - 1 blocks, got " + number(blocks));
  if (shared > 48 << 10)
    if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
      return report(name, e);
  void* pointers[] = {&args...};
  return report(name, cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, static_cast<size_t>(shared),
                                       static_cast<cudaStream_t>(stream)));
}

// A kernel as a graph's node parameters want it.
#ifdef FASTEE_EMULATED_DEVICE
using KernelAddress = emulation::AnyKernel;
#else
struct KernelAddress {
  template <typename F>
  KernelAddress(F* kernel) : address(reinterpret_cast<void*>(kernel)) {}
  operator void*() const { return address; }
  void* address;
};
#endif

inline fastee_status expect_memory(const char* op, const fastee_cuda_memory* memory, int64_t sync, int64_t scratch) {
  const int64_t has_sync = memory && memory->sync ? memory->sync_bytes : 0,
                has_scratch = memory && memory->scratch ? memory->scratch_bytes : 0;
  if (has_sync >= sync && has_scratch >= scratch) return FASTEE_OK;
  return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": memory must hold " + number(sync) + " bytes of sync and " + number(scratch) +
                                           " of scratch, got " + number(has_sync) + " and " + number(has_scratch));
}
}  // namespace fastee::cuda
