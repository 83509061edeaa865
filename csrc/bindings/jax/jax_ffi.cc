// The ops as XLA FFI calls: a library of its own, which jax loads (fastee/integrations/jax.py). Buffers go to the C ABI as they are;
// XLA hands in row-major memory and allocates the results. Shapes are those that the Python side asked for.
#include "bindings/jax/jax_ffi.h"

#include <algorithm>
#include <vector>

#define THRESHOLD ARG RET
#define SYNC
#define SCRATCH

namespace {

ffi::Error result(fastee_status status) { return error_of(status, fastee_last_error()); }

// jax has 32-bit integers unless told otherwise: the C ABI's 64-bit ones pass through memory of the thread.
struct Ints {
  explicit Ints(Out& out, std::vector<int64_t>& memory)
      : out(static_cast<int32_t*>(out->untyped_data())), count(out->element_count()), memory(memory) {
    memory.resize(count + 1);  // never empty, so that its address is never NULL
  }
  ~Ints() { std::copy_n(memory.begin(), count, out); }
  int64_t* data() { return memory.data(); }
  int32_t* out;
  size_t count;
  std::vector<int64_t>& memory;
};
thread_local std::vector<int64_t> first_ints, second_ints;

ffi::Error exit_head(Buffer x, Buffer weight, Buffer bias, Buffer norm_weight, Buffer norm_bias, Buffer mask, Out label, Out confidence,
                     Out max_prob, Out margin, Out entropy, Out lse, Out logits, int32_t pool, int32_t norm, int32_t measure, float eps,
                     float temperature, Buffer threshold, Out exits) {
  const View vx(x), vw(weight), vb(bias), vnw(norm_weight), vnb(norm_bias), vm(mask);
  const fastee_head head{static_cast<fastee_pool_kind>(pool), static_cast<fastee_norm_kind>(norm), static_cast<fastee_measure>(measure),
                         eps, temperature, *static_cast<const float*>(threshold.untyped_data()),
                         vw.get(), vb.get(), vnw.get(), vnb.get(), vm.get(), nullptr};
  Ints labels(label, first_ints);
  const fastee_row_stats_out stats{labels.data(),        data<float>(max_prob), data<float>(margin),
                                   data<float>(entropy), data<float>(lse),      nullptr};
  float* z = logits->element_count() ? data<float>(logits) : nullptr;
  const fastee_head_out out{stats, data<float>(confidence), data<uint8_t>(exits), z, nullptr, nullptr};
  return result(fastee_exit_head(&vx.t, &head, &out, nullptr));
}

ffi::Error row_stats(Buffer z, Out label, Out max_prob, Out margin, Out entropy, Out lse, float temperature) {
  const View v(z);
  Ints labels(label, first_ints);
  const fastee_row_stats_out out{labels.data(),        data<float>(max_prob), data<float>(margin),
                                 data<float>(entropy), data<float>(lse),      nullptr};
  return result(fastee_row_stats(&v.t, temperature, &out, nullptr));
}

ffi::Error pool(Buffer x, Buffer mask, Out out, int32_t kind) {
  const View vx(x), vm(mask), vo(*out);
  return result(fastee_pool(&vx.t, static_cast<fastee_pool_kind>(kind), vm.get(), &vo.t, nullptr));
}

ffi::Error compact(Buffer mask, Out index, Out count) {
  const View v(mask);
  Ints order(index, first_ints), survivors(count, second_ints);
  return result(fastee_compact(&v.t, order.data(), survivors.data(), nullptr));
}

ffi::Error gather_rows(Buffer x, Buffer index, Out out) {
  const View vx(x), vo(*out);
  View vi(index);
  const int32_t* given = static_cast<const int32_t*>(index.untyped_data());
  first_ints.assign(given, given + index.element_count());
  vi.t.data = first_ints.data(), vi.t.dtype = {kDLInt, 64, 1};
  return result(fastee_gather_rows(&vx.t, &vi.t, &vo.t, nullptr));
}

ffi::Error feature_delta(Buffer a, Buffer b, Out out) {
  const View va(a), vb(b);
  return result(fastee_feature_delta(&va.t, &vb.t, data<float>(out), nullptr));
}

ffi::Error mean_entropy(Buffer z, Buffer mask, Out out, float temperature) {
  const View vz(z), vm(mask);
  return result(fastee_mean_entropy(&vz.t, vm.get(), temperature, data<float>(out), nullptr));
}

ffi::Error quantize_rows(Buffer x, Out q, Out scale, int32_t format, int64_t group) {
  const View vx(x), vq(*q), vs(*scale);
  return result(fastee_quantize_rows(&vx.t, static_cast<fastee_format>(format), group, &vq.t, vs.get(), nullptr));
}

ffi::Error dequantize_rows(Buffer q, Buffer scale, Out out, int32_t format, int64_t group) {
  const View vq(q), vs(scale), vo(*out);
  return result(fastee_dequantize_rows(&vq.t, vs.get(), static_cast<fastee_format>(format), group, &vo.t, nullptr));
}

}  // namespace

#define TARGET(name, binding) FASTEE_JAX_TARGET(name, binding)
FASTEE_JAX_OPS(TARGET)
