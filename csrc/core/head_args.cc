// The checks of an exit head's arguments, and what the kernels see of them. Built into libfastee for tensors on the CPU, into
// libfastee_cuda for tensors on a GPU (FASTEE_HOME).
#include <cmath>
#include <cstring>
#include <string>

#include "core/check.h"

using namespace fastee;

fastee_status fastee::see_activation(const char* op, const DLTensor* x, int kind, const DLTensor* mask, cpu::Activation* out) {
  static const char* const shapes[] = {"float32, bfloat16 or float16 [B, D] or [B, D, ...]", "float32, bfloat16 or float16 [B, T, D]",
                                       "float32, bfloat16 or float16 [B, T, D]", "float32, bfloat16 or float16 [B, T, D]",
                                       "float32, bfloat16 or float16 [B, D]"};
  if (kind < FASTEE_POOL_MEAN || kind > FASTEE_POOL_NONE) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": pool must be 0 to 4, got " + number(kind));
  int element;
  FASTEE_TRY(expect_float(op, "x", x, -1, shapes[kind], &element));
  const bool tokens = kind == FASTEE_POOL_MEAN_TOKENS || kind == FASTEE_POOL_CLS || kind == FASTEE_POOL_LAST;
  if (tokens ? x->ndim != 3 : kind == FASTEE_POOL_NONE ? x->ndim != 2 : x->ndim < 2) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", shapes[kind], x);
  for (int i = 1; i < x->ndim; ++i)
    if (x->shape[i] == 0) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", std::string(shapes[kind]) + ", empty in B only", x);
  cpu::Activation a{};
  const char* data = bytes_of<const char>(*x);
  a.element = element;
  a.rows = x->shape[0];
  a.row_stride = stride(*x, 0);
  if (tokens) {
    a.inner = x->shape[1], a.features = x->shape[2];
    a.inner_stride = stride(*x, 1), a.feature_stride = 1;
    if (a.features > 1 && stride(*x, 2) != 1) return unsupported_rows(op, "x", *x);
    if (kind == FASTEE_POOL_LAST) data += (a.inner - 1) * a.inner_stride * (x->dtype.bits / 8);
    if (kind != FASTEE_POOL_MEAN_TOKENS) a.inner = 1;
  } else {
    a.features = x->shape[1], a.inner = product(*x, 2, x->ndim);
    if (x->ndim == 2) {
      if (a.features > 1 && stride(*x, 1) != 1) return unsupported_rows(op, "x", *x);
      a.feature_stride = 1, a.inner_stride = a.features;
    } else if (contiguous_from(*x, 1)) {
      a.feature_stride = a.inner, a.inner_stride = 1;
    } else {  // channels-last: the feature is the fastest dimension
      int64_t expected = a.features;
      bool fits = a.features == 1 || stride(*x, 1) == 1;
      for (int i = x->ndim - 1; i >= 2; --i) {
        fits = fits && (x->shape[i] == 1 || stride(*x, i) == expected);
        expected *= x->shape[i];
      }
      if (!fits) return unsupported_rows(op, "x", *x);
      a.feature_stride = 1, a.inner_stride = a.features;
    }
  }
  if (mask) {
    if (kind != FASTEE_POOL_MEAN_TOKENS) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": mask goes with the mean_tokens pool");
    const uint8_t code = mask->dtype.code == kDLBool ? kDLBool : kDLUInt;
    FASTEE_TRY(expect(op, "mask", mask, code, 8, 2, "uint8 or bool [B, T]"));
    if (mask->shape[0] != a.rows || mask->shape[1] != a.inner) return wrong(FASTEE_INVALID_ARGUMENT, op, "mask", "[B, T] like x", mask);
    if (a.inner > 1 && stride(*mask, 1) != 1) return unsupported_rows(op, "mask", *mask);
    a.mask = bytes_of<uint8_t>(*mask);
    a.mask_stride = stride(*mask, 0);
  }
  a.data = data;
  *out = a;
  return FASTEE_OK;
}

fastee_status fastee::expect_temperature(const char* op, float temperature) {
  if (temperature > 0.0f && std::isfinite(temperature)) return FASTEE_OK;
  return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": temperature must be positive and finite, got " + std::to_string(temperature));
}

fastee_status fastee::head_args(const char* op, const DLTensor* x, const fastee_head* head, const fastee_head_out* out, cpu::HeadArgs* args) {
  if (!head || !out || !out->stats.label) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": head, out and out.stats.label must not be NULL");
  cpu::HeadArgs& a = *args = {};
  FASTEE_TRY(see_activation(op, x, head->pool, head->mask, &a.x));
  const bool narrow = head->weight_scale != nullptr;
  a.weight_element = cpu::kI8;
  if (narrow)
    FASTEE_TRY(expect(op, "weight", head->weight, kDLInt, 8, 2, "int8 [C, D] beside weight_scale"));
  else
    FASTEE_TRY(expect_float(op, "weight", head->weight, 2, "float32, bfloat16 or float16 [C, D]", &a.weight_element));
  const DLTensor& w = *head->weight;
  FASTEE_TRY(expect_vector(op, "weight_scale", head->weight_scale, w.shape[0], "C"));
  if (w.shape[1] != a.x.features || w.shape[0] == 0)
    return wrong(FASTEE_INVALID_ARGUMENT, op, "weight", "[C, " + number(a.x.features) + "] with at least one class", &w);
  if (w.shape[1] > 1 && stride(w, 1) != 1) return unsupported_rows(op, "weight", w);
  FASTEE_TRY(expect_vector(op, "bias", head->bias, w.shape[0], "C"));
  FASTEE_TRY(expect_vector(op, "norm_weight", head->norm_weight, a.x.features, "D"));
  FASTEE_TRY(expect_vector(op, "norm_bias", head->norm_bias, a.x.features, "D"));
  FASTEE_TRY(expect_temperature(op, head->temperature));
  if (std::isnan(head->threshold)) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": threshold must not be NaN");
  if (head->norm < FASTEE_NORM_NONE || head->norm > FASTEE_NORM_AFFINE || !(head->norm_eps >= 0.0f))
    return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": norm must be 0 to 3 with eps >= 0, got " + number(head->norm) + " and " + std::to_string(head->norm_eps));
  if (head->measure < FASTEE_MAX_PROB || head->measure > FASTEE_ENERGY)
    return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": measure must be 0 to 3, got " + number(head->measure));
  if ((out->index != nullptr) != (out->count != nullptr) || (out->index && !out->exits))
    return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": out.index goes with out.count and out.exits");
  a.direct = a.x.element == cpu::kF32 && a.x.inner == 1 && a.x.feature_stride == 1 && head->norm == FASTEE_NORM_NONE && !a.x.mask;
  a.norm = head->norm;
  a.norm_eps = head->norm_eps;
  a.norm_weight = head->norm_weight ? data_of(*head->norm_weight) : nullptr;
  a.norm_bias = head->norm_bias ? data_of(*head->norm_bias) : nullptr;
  a.weight = bytes_of<void>(w);
  a.weight_scale = narrow ? data_of(*head->weight_scale) : nullptr;
  a.classes = w.shape[0];
  a.weight_stride = stride(w, 0);
  a.bias = head->bias ? data_of(*head->bias) : nullptr;
  a.inverse_temperature = 1.0f / head->temperature;
  a.measure = head->measure;
  a.temperature = head->temperature;
  a.threshold = head->threshold;
  a.label = out->stats.label;
  a.max_prob = out->stats.max_prob, a.margin = out->stats.margin, a.entropy = out->stats.entropy;
  a.lse = out->stats.lse, a.entropy_p2 = out->stats.entropy_p2;
  a.confidence = out->confidence, a.exits = out->exits, a.logits = out->logits;
  return FASTEE_OK;
}
