// The ops as XLA FFI calls on XLA's stream, those that libfastee_cuda has. A call only queues: nothing is allocated, nothing waits, so XLA
// may capture it. 64-bit integers leave as pairs of 32-bit words, of which the Python side takes the low one: no launch of ours narrows.
#include "bindings/jax/jax_ffi.h"

#include "fastee/cuda.h"

#define THRESHOLD
#define SYNC ARG RET  // zeros, which XLA lets the call write: the operand is the result
#define SCRATCH RET

namespace {

ffi::Error result(fastee_status status) { return error_of(status, fastee_cuda_last_error()); }

int64_t bytes(Out& b) { return static_cast<int64_t>(b->size_bytes()); }

ffi::Error exit_head(void* stream, Buffer x, Buffer weight, Buffer bias, Buffer norm_weight, Buffer norm_bias, Buffer mask, Out label,
                     Out confidence, Out max_prob, Out margin, Out entropy, Out lse, Out logits, int32_t pool, int32_t norm,
                     int32_t measure, float eps, float temperature, Buffer, Out sync, Out scratch) {
  const View vx(x), vw(weight), vb(bias), vnw(norm_weight), vnb(norm_bias), vm(mask);
  const fastee_head head{static_cast<fastee_pool_kind>(pool), static_cast<fastee_norm_kind>(norm), static_cast<fastee_measure>(measure),
                         eps, temperature, 0, vw.get(), vb.get(), vnw.get(), vnb.get(), vm.get(), nullptr};
  const fastee_row_stats_out stats{data<int64_t>(label), data<float>(max_prob), data<float>(margin),
                                   data<float>(entropy), data<float>(lse),      nullptr};
  float* z = logits->element_count() ? data<float>(logits) : nullptr;
  const fastee_head_out out{stats, data<float>(confidence), nullptr, z, nullptr, nullptr};
  const fastee_cuda_memory memory{data<void>(sync), bytes(sync), data<void>(scratch), bytes(scratch)};
  return result(fastee_cuda_exit_head(&vx.t, &head, &out, &memory, stream));
}

ffi::Error compact(void* stream, Buffer mask, Out index, Out count, Buffer, Out sync) {
  const View v(mask);
  const fastee_cuda_memory memory{data<void>(sync), bytes(sync), nullptr, 0};
  return result(fastee_cuda_compact(&v.t, data<int64_t>(index), data<int64_t>(count), &memory, stream));
}

ffi::Error quantize_rows(void* stream, Buffer x, Out q, Out scale, int32_t format, int64_t group) {
  const View vx(x), vq(*q), vs(*scale);
  return result(fastee_cuda_quantize_rows(&vx.t, static_cast<fastee_format>(format), group, &vq.t, vs.get(), stream));
}

}  // namespace

#ifdef FASTEE_EMULATED_DEVICE  // runs under XLA's CPU, which has no stream
struct NoStream {};
template <>
struct xla::ffi::CtxDecoding<NoStream> {
  using Type = void*;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) { return nullptr; }
};
#define STREAM .Ctx<NoStream>()
#else
#define STREAM .Ctx<ffi::PlatformStream<void*>>()
#endif
#define TARGET(name, binding) FASTEE_JAX_TARGET(name, STREAM binding, {ffi::Traits::kCmdBufferCompatible})
FASTEE_JAX_OPS_ON_CUDA(TARGET)
