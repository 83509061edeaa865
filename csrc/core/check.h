// What the C ABI's functions share: reading a DLTensor, and checks that fail with a text naming the argument.
#pragma once
#include <cstring>
#include <string>

#include "core/status.h"
#include "cpu/kernels.h"

#ifndef FASTEE_HOME
#define FASTEE_HOME kDLCPU  // where tensors must lie: the same checks serve libfastee_cuda, built with kDLCUDA
#endif

namespace fastee {

constexpr const char* kHome = FASTEE_HOME == kDLCPU ? " on the CPU" : " on a CUDA device";

inline std::string number(int64_t n) { return std::to_string(n); }

inline float* data_of(const DLTensor& t) { return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset); }
template <typename T>
T* bytes_of(const DLTensor& t) { return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset); }

inline int64_t stride(const DLTensor& t, int dim) {
  if (t.strides && t.shape[0] != 0) return t.strides[dim];  // without rows there is no layout: numpy gives such an array strides of 0
  int64_t s = 1;
  for (int i = t.ndim - 1; i > dim; --i) s *= t.shape[i];
  return s;
}

inline int64_t product(const DLTensor& t, int from, int to) {
  int64_t n = 1;
  for (int i = from; i < to; ++i) n *= t.shape[i];
  return n;
}

// Dimensions [from, ndim) lie one behind the other in memory.
inline bool contiguous_from(const DLTensor& t, int from) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= from; --i) {
    if (t.shape[i] != 1 && stride(t, i) != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

inline bool is(const DLTensor& t, uint8_t code, uint8_t bits) { return t.dtype.code == code && t.dtype.bits == bits && t.dtype.lanes == 1; }

inline fastee_status wrong(fastee_status status, const char* op, const char* name, const std::string& wanted, const DLTensor* got) {
  return fail(status, std::string(op) + ": " + name + " must be " + wanted + ", got " + (got ? describe(*got) : "NULL"));
}

// What was wanted: a literal, or a function that makes the text. Only an error calls it: in a call of 1 us three texts would be a tenth.
inline std::string text(const char* wanted) { return wanted; }
template <typename F>
std::string text(const F& wanted) { return wanted(); }

#define FASTEE_TRY(expression)                              \
  do {                                                      \
    if (fastee_status status_ = (expression)) return status_; \
  } while (0)

// A tensor in FASTEE_HOME's memory, of the given element type and number of dimensions (any when ndim < 0).
template <typename W>
fastee_status expect(const char* op, const char* name, const DLTensor* t, uint8_t code, uint8_t bits, int ndim, const W& wanted) {
  if (!t || (t->ndim > 0 && !t->shape)) return wrong(FASTEE_INVALID_ARGUMENT, op, name, text(wanted), nullptr);
  if (t->device.device_type != FASTEE_HOME) return wrong(FASTEE_WRONG_TYPE, op, name, text(wanted) + kHome, t);
  if (!is(*t, code, bits)) return wrong(FASTEE_WRONG_TYPE, op, name, text(wanted), t);
  if (ndim >= 0 && t->ndim != ndim) return wrong(FASTEE_INVALID_ARGUMENT, op, name, text(wanted), t);
  int64_t elements = 1;
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] < 0) return wrong(FASTEE_INVALID_ARGUMENT, op, name, text(wanted) + " with sizes >= 0", t);
    elements *= t->shape[i];
  }
  if (elements && !t->data) return wrong(FASTEE_INVALID_ARGUMENT, op, name, text(wanted) + " with memory", t);
  return FASTEE_OK;
}

// A floating-point tensor of a width that the kernels widen on load; its kind goes to *element.
inline fastee_status expect_float(const char* op, const char* name, const DLTensor* t, int ndim, const char* wanted, int* element) {
  *element = t && is(*t, kDLBfloat, 16) ? cpu::kBF16 : t && is(*t, kDLFloat, 16) ? cpu::kF16 : cpu::kF32;
  const uint8_t code = *element == cpu::kBF16 ? kDLBfloat : kDLFloat;
  return expect(op, name, t, code, *element == cpu::kF32 ? 32 : 16, ndim, wanted);
}

inline fastee_status expect_vector(const char* op, const char* name, const DLTensor* t, int64_t length, const char* of) {
  if (!t) return FASTEE_OK;
  auto wanted = [&] { return std::string("float32 [") + of + "] with " + number(length) + " elements, contiguous"; };
  FASTEE_TRY(expect(op, name, t, kDLFloat, 32, 1, wanted));
  if (t->shape[0] != length) return wrong(FASTEE_INVALID_ARGUMENT, op, name, wanted(), t);
  return contiguous_from(*t, 0) ? FASTEE_OK : wrong(FASTEE_UNSUPPORTED, op, name, wanted(), t);
}

inline fastee_status unsupported_rows(const char* op, const char* name, const DLTensor& t) {
  return fail(FASTEE_UNSUPPORTED, std::string(op) + ": the rows of " + name + " must be contiguous (or channels-last for a mean pool), got " + describe(t));
}

inline bool same_shape(const DLTensor& a, const DLTensor& b) {
  return a.ndim == b.ndim && std::memcmp(a.shape, b.shape, sizeof(int64_t) * static_cast<size_t>(a.ndim)) == 0;
}

// x as rows x inner x features; the head and where its results go, checked, as the kernel takes them (scratch excepted). head_args.cc
fastee_status see_activation(const char* op, const DLTensor* x, int kind, const DLTensor* mask, cpu::Activation* out);
fastee_status expect_temperature(const char* op, float temperature);
fastee_status head_args(const char* op, const DLTensor* x, const fastee_head* head, const fastee_head_out* out, cpu::HeadArgs* args);

// Quantised rows of `row` elements: bytes of one; `group` as given -> elements that share a scale; data and scales fit. pack_args.cc
int64_t row_bytes(int format, int64_t row);
fastee_status expect_group(const char* op, int64_t row, int64_t* group);
fastee_status expect_packed(const char* op, const DLTensor* data, int format, const char* like_name, const DLTensor& like, int64_t row);
fastee_status expect_scales_of(const char* op, const DLTensor* scale, int format, int64_t rows, int64_t row, int64_t* group);
}  // namespace fastee
