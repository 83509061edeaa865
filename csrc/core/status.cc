#include "core/status.h"

namespace fastee {
namespace {
thread_local std::string last_error;
}

fastee_status fail(fastee_status status, std::string text) {
  last_error = std::move(text);
  return status;
}

std::string describe(const DLTensor& t) {
  std::string name;
  switch (t.dtype.code) {
    case kDLFloat: name = "float"; break;
    case kDLBfloat: name = "bfloat"; break;
    case kDLInt: name = "int"; break;
    case kDLUInt: name = "uint"; break;
    case kDLBool: name = "bool"; break;
    default: name = "dtype(" + std::to_string(t.dtype.code) + ")"; break;
  }
  if (t.dtype.code != kDLBool) name += std::to_string(t.dtype.bits);
  name += " [";
  for (int i = 0; i < t.ndim; ++i) name += (i ? ", " : "") + std::to_string(t.shape[i]);
  name += "]";
  if (t.device.device_type != kDLCPU) name += " on device type " + std::to_string(t.device.device_type);
  return name;
}
}  // namespace fastee

extern "C" int32_t fastee_abi_version(void) { return FASTEE_ABI_VERSION; }
extern "C" const char* fastee_last_error(void) { return fastee::last_error.c_str(); }
