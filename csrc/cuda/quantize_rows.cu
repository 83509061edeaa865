#include "cuda/kernels/quantize_rows.cuh"

#include "cuda/launch.h"

namespace fastee::cuda {
namespace {
constexpr int kQuantizeMost = 256;  // threads

struct QuantizeArgs {
  RowFormat f;
  const void* x;
  int element;
  int64_t rows, row_stride;
  uint8_t* data;
  int64_t data_stride;  // bytes
  float* scale;         // [rows, row / group]; null for bf16
  bool staged;          // the row is copied to shared memory: 16-byte aligned, and there is room
  bool whole;
};

__global__ void __launch_bounds__(kQuantizeMost, 4) quantize_rows(const __grid_constant__ QuantizeArgs a) {
  unsigned* words = reinterpret_cast<unsigned*>(shared_memory());
  const int64_t b = blockIdx.x, width = a.element == kF32 ? 4 : 2;
  Row x{static_cast<const uint8_t*>(a.x) + b * a.row_stride * width, a.element, a.whole};
  if (a.staged) {
    uint8_t* row = reinterpret_cast<uint8_t*>(words + 32);
#pragma unroll 4
    for (int64_t i = 16 * threadIdx.x; i < a.f.row * width; i += 16 * blockDim.x) copy_async(row + i, static_cast<const uint8_t*>(x.x) + i);
    close_copies();
    wait_copies<0>();
    __syncthreads();
    x.x = row;
  }
  quantize_row(x, a.f, a.data + b * a.data_stride, a.scale ? a.scale + b * (a.f.row / a.f.group) : nullptr, words);
}
}  // namespace
}  // namespace fastee::cuda

using namespace fastee;

extern "C" fastee_status fastee_cuda_quantize_rows(const DLTensor* x, fastee_format format, int64_t group, const DLTensor* data,
                                                   const DLTensor* scale, void* stream) {
  static const char op[] = "quantize_rows", wanted[] = "float32, bfloat16 or float16 [B, ...]";
  int element;
  FASTEE_TRY(expect_float(op, "x", x, -1, wanted, &element));
  if (x->ndim < 1) return wrong(FASTEE_INVALID_ARGUMENT, op, "x", wanted, x);
  if (!contiguous_from(*x, 1)) return unsupported_rows(op, "x", *x);
  const int64_t row = product(*x, 1, x->ndim), rows = x->shape[0];
  FASTEE_TRY(expect_packed(op, data, format, "x", *x, row));
  FASTEE_TRY(expect_scales_of(op, scale, format, rows, row, &group));
  float* scales = format == FASTEE_BF16 ? nullptr : data_of(*scale);
  if (rows == 0) return FASTEE_OK;
  if (row == 0)
    return scales
               ? cuda::report(op, cudaMemsetAsync(scales, 0, sizeof(float) * static_cast<size_t>(rows), static_cast<cudaStream_t>(stream)))
               : FASTEE_OK;
  const int64_t width = x->dtype.bits / 8, bytes = row * width, element_bytes = format == FASTEE_BF16 ? 2 : 1;
  cuda::QuantizeArgs a{{format, row, group},
                       bytes_of<void>(*x),
                       element,
                       rows,
                       stride(*x, 0),
                       bytes_of<uint8_t>(*data),
                       element_bytes * stride(*data, 0),
                       scales,
                       false,
                       false};
  a.whole = cuda::whole_rows(a.x, element, a.row_stride, a.f);
  // Walked once (bf16 codes) or too long for two blocks a multiprocessor: from memory directly, the second walk through L2.
  a.staged = format != FASTEE_BF16 && bytes <= 96 << 10 && bytes % 16 == 0 && cuda::aligned16(a.x) && a.row_stride * width % 16 == 0;
  const int64_t wish = (row / 16 + 31) / 32 * 32;
  const unsigned threads = static_cast<unsigned>(wish < 32 ? 32 : wish > cuda::kQuantizeMost ? cuda::kQuantizeMost : wish);
  const int64_t shared = 128 + (a.staged ? bytes : 0);
  return cuda::launch(op, cuda::quantize_rows, rows, threads, shared, stream, a);
}
