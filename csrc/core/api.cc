// The C ABI on the CPU: check every argument, describe it to a kernel as pointers and strides, call the table in use.
#include <cmath>
#include <cstring>
#include <string>

#include "core/scratch.h"
#include "core/status.h"
#include "cpu/kernels.h"

namespace fastee {
namespace {

std::string number(int64_t n) { return std::to_string(n); }

float* data_of(const DLTensor& t) { return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset); }
template <typename T>
T* bytes_of(const DLTensor& t) { return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset); }

int64_t stride(const DLTensor& t, int dim) {
  if (t.strides) return t.strides[dim];
  int64_t s = 1;
  for (int i = t.ndim - 1; i > dim; --i) s *= t.shape[i];
  return s;
}

int64_t product(const DLTensor& t, int from, int to) {
  int64_t n = 1;
  for (int i = from; i < to; ++i) n *= t.shape[i];
  return n;
}

// Dimensions [from, ndim) lie one behind the other in memory.
bool contiguous_from(const DLTensor& t, int from) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= from; --i) {
    if (t.shape[i] != 1 && stride(t, i) != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

bool is(const DLTensor& t, uint8_t code, uint8_t bits) { return t.dtype.code == code && t.dtype.bits == bits && t.dtype.lanes == 1; }

fastee_status wrong(fastee_status status, const char* op, const char* name, const std::string& wanted, const DLTensor* got) {
  return fail(status, std::string(op) + ": " + name + " must be " + wanted + ", got " + (got ? describe(*got) : "NULL"));
}

#define FASTEE_TRY(expression)                              \
  do {                                                      \
    if (fastee_status status_ = (expression)) return status_; \
  } while (0)

// A tensor on the CPU of the given element type and number of dimensions (any when ndim < 0).
fastee_status expect(const char* op, const char* name, const DLTensor* t, uint8_t code, uint8_t bits, int ndim, const char* wanted) {
  if (!t || (t->ndim > 0 && !t->shape)) return wrong(FASTEE_INVALID_ARGUMENT, op, name, wanted, nullptr);
  if (t->device.device_type != kDLCPU) return wrong(FASTEE_WRONG_TYPE, op, name, std::string(wanted) + " on the CPU", t);
  if (!is(*t, code, bits)) return wrong(FASTEE_WRONG_TYPE, op, name, wanted, t);
  if (ndim >= 0 && t->ndim != ndim) return wrong(FASTEE_INVALID_ARGUMENT, op, name, wanted, t);
  int64_t elements = 1;
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] < 0) return wrong(FASTEE_INVALID_ARGUMENT, op, name, std::string(wanted) + " with sizes >= 0", t);
    elements *= t->shape[i];
  }
  if (elements && !t->data) return wrong(FASTEE_INVALID_ARGUMENT, op, name, std::string(wanted) + " with memory", t);
  return FASTEE_OK;
}

fastee_status expect_vector(const char* op, const char* name, const DLTensor* t, int64_t length, const char* of) {
  if (!t) return FASTEE_OK;
  const std::string wanted = std::string("float32 [") + of + "] with " + number(length) + " elements, contiguous";
  FASTEE_TRY(expect(op, name, t, kDLFloat, 32, 1, wanted.c_str()));
  if (t->shape[0] != length) return wrong(FASTEE_INVALID_ARGUMENT, op, name, wanted, t);
  return contiguous_from(*t, 0) ? FASTEE_OK : wrong(FASTEE_UNSUPPORTED, op, name, wanted, t);
}

fastee_status unsupported_rows(const char* op, const char* name, const DLTensor& t) {
  return fail(FASTEE_UNSUPPORTED, std::string(op) + ": the rows of " + name + " must be contiguous (or channels-last for a mean pool), got " + describe(t));
}

// See x as rows x inner x features.
fastee_status see(const char* op, const DLTensor* x, int kind, const DLTensor* mask, cpu::Activation* out) {
  static const char* const shapes[] = {"float32 [B, D] or [B, D, ...]", "float32 [B, T, D]", "float32 [B, T, D]", "float32 [B, T, D]", "float32 [B, D]"};
  if (kind < FASTEE_POOL_MEAN || kind > FASTEE_POOL_NONE) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": pool must be 0 to 4, got " + number(kind));
  FASTEE_TRY(expect(op, "x", x, kDLFloat, 32, -1, shapes[kind]));
  const bool tokens = kind == FASTEE_POOL_MEAN_TOKENS || kind == FASTEE_POOL_CLS || kind == FASTEE_POOL_LAST;
  if (tokens ? x->ndim != 3 : kind == FASTEE_POOL_NONE ? x->ndim != 2 : x->ndim < 2) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", shapes[kind], x);
  for (int i = 1; i < x->ndim; ++i)
    if (x->shape[i] == 0) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", std::string(shapes[kind]) + ", empty in B only", x);
  cpu::Activation a{};
  a.data = data_of(*x);
  a.rows = x->shape[0];
  a.row_stride = stride(*x, 0);
  if (tokens) {
    a.inner = x->shape[1], a.features = x->shape[2];
    a.inner_stride = stride(*x, 1), a.feature_stride = 1;
    if (a.features > 1 && stride(*x, 2) != 1) return unsupported_rows(op, "x", *x);
    if (kind == FASTEE_POOL_LAST) a.data += (a.inner - 1) * a.inner_stride;
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
  *out = a;
  return FASTEE_OK;
}

fastee_status expect_temperature(const char* op, float temperature) {
  if (temperature > 0.0f && std::isfinite(temperature)) return FASTEE_OK;
  return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": temperature must be positive and finite, got " + std::to_string(temperature));
}

// index int64 [N], contiguous, every entry in [0, rows).
fastee_status expect_index(const char* op, const DLTensor* index, int64_t rows) {
  FASTEE_TRY(expect(op, "index", index, kDLInt, 64, 1, "int64 [N], contiguous"));
  if (!contiguous_from(*index, 0)) return wrong(FASTEE_UNSUPPORTED, op, "index", "int64 [N], contiguous", index);
  const int64_t* at = bytes_of<int64_t>(*index);
  for (int64_t i = 0; i < index->shape[0]; ++i)
    if (at[i] < 0 || at[i] >= rows) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": index must lie in [0, " + number(rows) + "), got " + number(at[i]));
  return FASTEE_OK;
}

// `part` [N, ...] matches `whole` [B, ...] in dtype and row shape; both have contiguous rows.
fastee_status expect_rows(const char* op, const char* whole_name, const DLTensor* whole, const char* part_name, const DLTensor* part, int64_t n) {
  for (auto [name, t] : {std::pair{whole_name, whole}, std::pair{part_name, part}}) {
    if (!t || t->ndim < 1 || !t->shape) return wrong(FASTEE_INVALID_ARGUMENT, op, name, "a tensor [B, ...]", t && t->shape ? t : nullptr);
    if (t->device.device_type != kDLCPU) return wrong(FASTEE_WRONG_TYPE, op, name, "on the CPU", t);
    if (t->dtype.bits % 8 || t->dtype.lanes != 1) return wrong(FASTEE_WRONG_TYPE, op, name, "of whole-byte elements", t);
    if (!contiguous_from(*t, 1)) return unsupported_rows(op, name, *t);
  }
  bool same = whole->ndim == part->ndim && std::memcmp(&whole->dtype, &part->dtype, sizeof(DLDataType)) == 0 && part->shape[0] == n;
  for (int i = 1; same && i < whole->ndim; ++i) same = whole->shape[i] == part->shape[i];
  return same ? FASTEE_OK : wrong(FASTEE_INVALID_ARGUMENT, op, part_name, "[" + number(n) + ", ...] with the rows of " + whole_name + " " + describe(*whole), part);
}

fastee_status expect_group(const char* op, int64_t row, int64_t* group) {
  if (*group == 0) *group = row ? row : 1;
  if (*group > 0 && row % *group == 0) return FASTEE_OK;
  return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": group must divide the " + number(row) + " elements of a row, got " + number(*group));
}

fastee_status expect_scales(const char* op, const DLTensor* scale, int64_t rows, int64_t groups) {
  const std::string wanted = "float32 with " + number(rows) + " x " + number(groups) + " elements, contiguous";
  FASTEE_TRY(expect(op, "scale", scale, kDLFloat, 32, -1, wanted.c_str()));
  if (product(*scale, 0, scale->ndim) == rows * groups && contiguous_from(*scale, 0)) return FASTEE_OK;
  return wrong(FASTEE_INVALID_ARGUMENT, op, "scale", wanted, scale);
}

bool same_shape(const DLTensor& a, const DLTensor& b) {
  return a.ndim == b.ndim && std::memcmp(a.shape, b.shape, sizeof(int64_t) * static_cast<size_t>(a.ndim)) == 0;
}

}  // namespace
}  // namespace fastee

using namespace fastee;

extern "C" fastee_status fastee_pool(const DLTensor* x, fastee_pool_kind kind, const DLTensor* mask, const DLTensor* out, void*) {
  cpu::Activation a;
  FASTEE_TRY(see("pool", x, kind, mask, &a));
  FASTEE_TRY(expect("pool", "out", out, kDLFloat, 32, 2, "float32 [B, D]"));
  if (out->shape[0] != a.rows || out->shape[1] != a.features || (a.features > 1 && stride(*out, 1) != 1))
    return wrong(FASTEE_INVALID_ARGUMENT, "pool", "out", "float32 [" + number(a.rows) + ", " + number(a.features) + "] with contiguous rows", out);
  cpu::kernels().pool(a, data_of(*out), stride(*out, 0));
  return FASTEE_OK;
}

extern "C" fastee_status fastee_row_stats(const DLTensor* logits, float temperature, const fastee_row_stats_out* out, void*) {
  FASTEE_TRY(expect("row_stats", "logits", logits, kDLFloat, 32, 2, "float32 [B, C]"));
  if (logits->shape[1] == 0) return wrong(FASTEE_INVALID_ARGUMENT, "row_stats", "logits", "float32 [B, C] with at least one class", logits);
  if (logits->shape[1] > 1 && stride(*logits, 1) != 1) return unsupported_rows("row_stats", "logits", *logits);
  FASTEE_TRY(expect_temperature("row_stats", temperature));
  if (!out || !out->label) return fail(FASTEE_INVALID_ARGUMENT, "row_stats: out.label must not be NULL");
  cpu::kernels().row_stats({data_of(*logits), logits->shape[0], logits->shape[1], stride(*logits, 0), 1.0f / temperature, out->label, out->max_prob,
                            out->margin, out->entropy, out->lse, out->entropy_p2});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_exit_head(const DLTensor* x, const fastee_head* head, const fastee_head_out* out, void*) {
  static const char op[] = "exit_head";
  if (!head || !out || !out->stats.label) return fail(FASTEE_INVALID_ARGUMENT, "exit_head: head, out and out.stats.label must not be NULL");
  cpu::HeadArgs a{};
  FASTEE_TRY(see(op, x, head->pool, head->mask, &a.x));
  FASTEE_TRY(expect(op, "weight", head->weight, kDLFloat, 32, 2, "float32 [C, D]"));
  const DLTensor& w = *head->weight;
  if (w.shape[1] != a.x.features || w.shape[0] == 0)
    return wrong(FASTEE_INVALID_ARGUMENT, op, "weight", "float32 [C, " + number(a.x.features) + "] with at least one class", &w);
  if (w.shape[1] > 1 && stride(w, 1) != 1) return unsupported_rows(op, "weight", w);
  FASTEE_TRY(expect_vector(op, "bias", head->bias, w.shape[0], "C"));
  FASTEE_TRY(expect_vector(op, "norm_weight", head->norm_weight, a.x.features, "D"));
  FASTEE_TRY(expect_vector(op, "norm_bias", head->norm_bias, a.x.features, "D"));
  FASTEE_TRY(expect_temperature(op, head->temperature));
  if (std::isnan(head->threshold)) return fail(FASTEE_INVALID_ARGUMENT, "exit_head: threshold must not be NaN");
  if (head->norm < FASTEE_NORM_NONE || head->norm > FASTEE_NORM_AFFINE || !(head->norm_eps >= 0.0f))
    return fail(FASTEE_INVALID_ARGUMENT, "exit_head: norm must be 0 to 3 with eps >= 0, got " + number(head->norm) + " and " + std::to_string(head->norm_eps));
  if (head->measure < FASTEE_MAX_PROB || head->measure > FASTEE_ENERGY)
    return fail(FASTEE_INVALID_ARGUMENT, "exit_head: measure must be 0 to 3, got " + number(head->measure));
  if ((out->index != nullptr) != (out->count != nullptr) || (out->index && !out->exits))
    return fail(FASTEE_INVALID_ARGUMENT, "exit_head: out.index goes with out.count and out.exits");
  a.direct = a.x.inner == 1 && a.x.feature_stride == 1 && head->norm == FASTEE_NORM_NONE && !a.x.mask;
  a.norm = head->norm;
  a.norm_eps = head->norm_eps;
  a.norm_weight = head->norm_weight ? data_of(*head->norm_weight) : nullptr;
  a.norm_bias = head->norm_bias ? data_of(*head->norm_bias) : nullptr;
  a.weight = data_of(w);
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
  a.scratch = static_cast<float*>(Scratch::here().reserve(sizeof(float) * static_cast<size_t>(cpu::head_scratch(a.x.rows, a.x.features, a.classes))));
  if (!a.scratch) return fail(FASTEE_OUT_OF_MEMORY, "exit_head: no memory for the working buffer");
  const cpu::Kernels& k = cpu::kernels();
  k.exit_head(a);
  if (out->index) *out->count = k.compact(out->exits, a.x.rows, 1, 1, out->index);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_compact(const DLTensor* mask, int64_t* index, int64_t* count, void*) {
  const uint8_t code = mask && mask->dtype.code == kDLBool ? kDLBool : kDLUInt;
  FASTEE_TRY(expect("compact", "mask", mask, code, 8, 1, "bool or uint8 [B]"));
  if (!count || (mask->shape[0] && !index)) return fail(FASTEE_INVALID_ARGUMENT, "compact: index and count must not be NULL");
  *count = cpu::kernels().compact(bytes_of<uint8_t>(*mask), mask->shape[0], stride(*mask, 0), 0, index);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_gather_rows(const DLTensor* x, const DLTensor* index, const DLTensor* out, void*) {
  if (!x || x->ndim < 1 || !x->shape) return wrong(FASTEE_INVALID_ARGUMENT, "gather_rows", "x", "a tensor [B, ...]", nullptr);
  FASTEE_TRY(expect_index("gather_rows", index, x->shape[0]));
  FASTEE_TRY(expect_rows("gather_rows", "x", x, "out", out, index->shape[0]));
  const size_t bytes = static_cast<size_t>(product(*x, 1, x->ndim)) * (x->dtype.bits / 8);
  const int64_t from = stride(*x, 0) * (x->dtype.bits / 8), to = stride(*out, 0) * (x->dtype.bits / 8);
  const int64_t* at = bytes_of<int64_t>(*index);
  if (bytes)
    for (int64_t i = 0; i < index->shape[0]; ++i) std::memcpy(bytes_of<char>(*out) + i * to, bytes_of<const char>(*x) + at[i] * from, bytes);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_scatter_rows(const DLTensor* out, const DLTensor* index, const DLTensor* rows, void*) {
  if (!out || out->ndim < 1 || !out->shape) return wrong(FASTEE_INVALID_ARGUMENT, "scatter_rows", "out", "a tensor [B, ...]", nullptr);
  FASTEE_TRY(expect_index("scatter_rows", index, out->shape[0]));
  FASTEE_TRY(expect_rows("scatter_rows", "out", out, "rows", rows, index->shape[0]));
  const size_t bytes = static_cast<size_t>(product(*out, 1, out->ndim)) * (out->dtype.bits / 8);
  const int64_t from = stride(*rows, 0) * (out->dtype.bits / 8), to = stride(*out, 0) * (out->dtype.bits / 8);
  const int64_t* at = bytes_of<int64_t>(*index);
  if (bytes)
    for (int64_t i = 0; i < index->shape[0]; ++i) std::memcpy(bytes_of<char>(*out) + at[i] * to, bytes_of<const char>(*rows) + i * from, bytes);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_quantize_rows(const DLTensor* x, int64_t group, const DLTensor* data, const DLTensor* scale, void*) {
  static const char op[] = "quantize_rows";
  FASTEE_TRY(expect(op, "x", x, kDLFloat, 32, -1, "float32 [B, ...]"));
  FASTEE_TRY(expect(op, "data", data, kDLInt, 8, x->ndim, "int8 with the shape of x"));
  if (x->ndim < 1 || !same_shape(*x, *data)) return wrong(FASTEE_INVALID_ARGUMENT, op, "data", "int8 with the shape of x " + describe(*x), data);
  if (!contiguous_from(*x, 1)) return unsupported_rows(op, "x", *x);
  if (!contiguous_from(*data, 1)) return unsupported_rows(op, "data", *data);
  const int64_t row = product(*x, 1, x->ndim);
  FASTEE_TRY(expect_group(op, row, &group));
  FASTEE_TRY(expect_scales(op, scale, x->shape[0], row ? row / group : 1));
  if (row == 0)
    for (int64_t i = 0; i < x->shape[0]; ++i) data_of(*scale)[i] = 0.0f;
  cpu::kernels().quantize_rows({data_of(*x), x->shape[0], row, stride(*x, 0), group, bytes_of<int8_t>(*data), stride(*data, 0), data_of(*scale)});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_dequantize_rows(const DLTensor* data, const DLTensor* scale, int64_t group, const DLTensor* out, void*) {
  static const char op[] = "dequantize_rows";
  FASTEE_TRY(expect(op, "data", data, kDLInt, 8, -1, "int8 [B, ...]"));
  FASTEE_TRY(expect(op, "out", out, kDLFloat, 32, data->ndim, "float32 with the shape of data"));
  if (data->ndim < 1 || !same_shape(*data, *out)) return wrong(FASTEE_INVALID_ARGUMENT, op, "out", "float32 with the shape of data " + describe(*data), out);
  if (!contiguous_from(*data, 1)) return unsupported_rows(op, "data", *data);
  if (!contiguous_from(*out, 1)) return unsupported_rows(op, "out", *out);
  const int64_t row = product(*data, 1, data->ndim);
  FASTEE_TRY(expect_group(op, row, &group));
  FASTEE_TRY(expect_scales(op, scale, data->shape[0], row ? row / group : 1));
  cpu::kernels().dequantize_rows({bytes_of<int8_t>(*data), data->shape[0], row, stride(*data, 0), group, data_of(*scale), data_of(*out), stride(*out, 0)});
  return FASTEE_OK;
}
