#include "cuda/launch.h"

#include <atomic>

namespace fastee::cuda {
namespace {
std::atomic<const char*> last_launch{nullptr};

// A kernel has broken the context: every later call of this process gets the same error. (cudaErrorIllegalAddress, ...Assert,
// ...HardwareStackError to ...LaunchFailure, ...LaunchTimeout, and errors of memory and NVLink.)
bool sticky(int error) {
  return error == 700 || error == 702 || error == 710 || (error >= 714 && error <= 719) || error == 214 || error == 220;
}
}  // namespace

fastee_status report(const char* name, cudaError_t error) {
  if (error == cudaSuccess) {
    last_launch.store(name, std::memory_order_relaxed);
    return FASTEE_OK;
  }
  cudaGetLastError();  // an error of this launch alone must not be found by the next one
  std::string text = std::string(name) + ": CUDA error " + std::to_string(static_cast<int>(error)) + ": " + cudaGetErrorString(error);
  if (sticky(static_cast<int>(error))) {
    const char* before = last_launch.load(std::memory_order_relaxed);
    text += std::string(
                "; it is sticky: a kernel queued earlier broke the device's context, and this process cannot use the device any more "
                "(fastee's launch before this one: ") +
            (before ? before : "none") + "). CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds the kernel";
  }
  return fail(FASTEE_DEVICE_ERROR, text);
}
}  // namespace fastee::cuda

extern "C" int32_t fastee_cuda_abi_version(void) { return FASTEE_ABI_VERSION; }
extern "C" const char* fastee_cuda_last_error(void) { return fastee_last_error(); }
