// What the XLA FFI calls of a platform share: the table of ops, and XLA's buffers as tensors of the C ABI.
#pragma once
#include "xla/ffi/api/ffi.h"

#include "fastee/fastee.h"

#ifndef FASTEE_HOME
#define FASTEE_HOME kDLCPU  // where XLA's buffers lie; jax_cuda.cc is built with kDLCUDA
#endif

// The op table: ARG, RET and attributes are those of every platform. Beyond them stand, each empty where the platform has none, THRESHOLD
// (a device's kernels take no number from device memory: jax compares), SYNC and SCRATCH (a device's working memory, which XLA owns).
#define FASTEE_JAX_OPS_ON_CUDA(OP) \
  OP(exit_head, ARG ARG ARG ARG ARG ARG RET RET RET RET RET RET RET .Attr<int32_t>("pool").Attr<int32_t>("norm").Attr<int32_t>("measure") \
     .Attr<float>("eps").Attr<float>("temperature") THRESHOLD SYNC SCRATCH) \
  OP(compact, ARG RET RET SYNC) \
  OP(quantize_rows, ARG RET RET .Attr<int32_t>("format").Attr<int64_t>("group"))
#define FASTEE_JAX_OPS(OP) \
  FASTEE_JAX_OPS_ON_CUDA(OP) \
  OP(row_stats, ARG RET RET RET RET RET .Attr<float>("temperature")) \
  OP(pool, ARG ARG RET .Attr<int32_t>("kind")) \
  OP(gather_rows, ARG ARG RET) \
  OP(feature_delta, ARG ARG RET) \
  OP(mean_entropy, ARG ARG RET .Attr<float>("temperature")) \
  OP(dequantize_rows, ARG ARG RET .Attr<int32_t>("format").Attr<int64_t>("group"))
#define ARG .Arg<Buffer>()
#define RET .Ret<Buffer>()
#define FASTEE_JAX_TARGET(name, binding, ...) \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* fastee_jax_##name(XLA_FFI_CallFrame* frame) { \
    static auto* handler = ffi::Ffi::Bind() binding.To(name __VA_OPT__(, ) __VA_ARGS__).release(); \
    return handler->Call(frame); \
  }

namespace ffi = xla::ffi;

namespace {

inline DLDataType dtype_of(ffi::DataType t) {
  switch (t) {
    case ffi::F32: return {kDLFloat, 32, 1};
    case ffi::F16: return {kDLFloat, 16, 1};
    case ffi::BF16: return {kDLBfloat, 16, 1};
    case ffi::F64: return {kDLFloat, 64, 1};
    case ffi::PRED: return {kDLBool, 8, 1};
    case ffi::U8: return {kDLUInt, 8, 1};
    case ffi::S8: return {kDLInt, 8, 1};
    case ffi::S32: return {kDLInt, 32, 1};
    case ffi::S64: return {kDLInt, 64, 1};
    default: return {kDLUInt, 0, 1};  // the C ABI refuses it by name
  }
}

// A DLTensor over an XLA buffer; a buffer of no elements stands for an argument that was not given.
struct View {
  explicit View(const ffi::AnyBuffer& b) {
    const auto dims = b.dimensions();
    t = {b.untyped_data(), {FASTEE_HOME, 0}, static_cast<int32_t>(dims.size()), dtype_of(b.element_type()),
         const_cast<int64_t*>(dims.begin()), nullptr, 0};
    given = dims.size() != 1 || dims[0] != 0;
  }
  const DLTensor* get() const { return given ? &t : nullptr; }
  DLTensor t;
  bool given;
};

using Buffer = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

template <typename T>
T* data(Out& b) {
  static int64_t nothing;  // a result of no rows has no memory, but NULL would mean "not wanted"
  void* memory = b->untyped_data();
  return static_cast<T*>(memory ? memory : &nothing);
}

inline ffi::Error error_of(fastee_status status, const char* text) {
  return status == FASTEE_OK ? ffi::Error::Success()
                             : ffi::Error(status == FASTEE_OUT_OF_MEMORY   ? ffi::ErrorCode::kResourceExhausted
                                          : status == FASTEE_DEVICE_ERROR ? ffi::ErrorCode::kInternal
                                                                          : ffi::ErrorCode::kInvalidArgument,
                                          text);
}

}  // namespace
