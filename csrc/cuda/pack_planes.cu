#include "cuda/kernels/pack_planes.cuh"

#include <limits>

#include "cuda/launch.h"

using namespace fastee;

namespace {
int64_t blocks_of(int64_t count) { return (count + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock; }
int64_t start_of(int64_t blocks) { return 16 + 4 * (blocks + 1); }
}  // namespace

extern "C" fastee_status fastee_cuda_pack_planes(const DLTensor* x, void* out, int64_t capacity, int64_t* nbytes,
                                                 const fastee_cuda_memory* memory, void* stream) {
  static const char op[] = "pack_planes", wanted[] = "float32, bfloat16 or float16, contiguous";
  int element;
  FASTEE_TRY(expect_float(op, "h", x, -1, wanted, &element));
  if (!contiguous_from(*x, 0)) return wrong(FASTEE_UNSUPPORTED, op, "h", wanted, x);
  if (!out || !nbytes || reinterpret_cast<uintptr_t>(out) % 4)
    return fail(FASTEE_INVALID_ARGUMENT, "pack_planes: out and nbytes must not be NULL, out aligned to 4 bytes");
  const int64_t count = product(*x, 0, x->ndim), blocks = blocks_of(count), start = start_of(blocks);
  const int64_t bound = start + blocks * cpu::plane_block_bound(0, 0) + count * cuda::width_of(element);
  if (capacity < bound)
    return fail(FASTEE_INVALID_ARGUMENT, "pack_planes: capacity must be at least " + number(bound) + " bytes, got " + number(capacity));
  if (bound / 4 > std::numeric_limits<uint32_t>::max())
    return fail(FASTEE_UNSUPPORTED, "pack_planes: h must be below 16 GiB, got " + describe(*x));
  if (blocks > 1) FASTEE_TRY(cuda::expect_memory(op, memory, cuda::sync_bytes(blocks), 0));
  uint8_t* to = static_cast<uint8_t*>(out);
  FASTEE_TRY(cuda::launch(op, cuda::planes_header, 1, 32, 0, stream, cuda::PlanesHeaderArgs{to, element, count, nbytes}));
  if (count == 0) return FASTEE_OK;
  const uint8_t* values = bytes_of<const uint8_t>(*x);
  const cuda::PackPlanesArgs a{
      values, element, count, blocks, cuda::aligned16(values), to, start, nbytes, blocks > 1 ? memory->sync : nullptr};
  return cuda::launch(op, cuda::pack_planes, blocks, cuda::kPlaneThreads, sizeof(cuda::PlaneScratch), stream, a);
}

extern "C" fastee_status fastee_cuda_unpack_planes(const void* data, int64_t nbytes, int64_t count, int64_t first, const DLTensor* out,
                                                   int64_t* damaged, void* stream) {
  static const char op[] = "unpack_planes", wanted[] = "float32, bfloat16 or float16, contiguous";
  int element;
  FASTEE_TRY(expect_float(op, "out", out, -1, wanted, &element));
  if (!contiguous_from(*out, 0)) return wrong(FASTEE_UNSUPPORTED, op, "out", wanted, out);
  if (!data || !damaged || reinterpret_cast<uintptr_t>(data) % 4)
    return fail(FASTEE_INVALID_ARGUMENT, "unpack_planes: data and damaged must not be NULL, data aligned to 4 bytes");
  const int64_t n = product(*out, 0, out->ndim), start = start_of(blocks_of(count));
  if (count < 0 || start > nbytes)
    return fail(FASTEE_INVALID_ARGUMENT,
                "unpack_planes: data of " + number(count) + " values has at least " + number(start) + " bytes, got " + number(nbytes));
  if (first < 0 || first > count || n > count - first)
    return fail(FASTEE_INVALID_ARGUMENT,
                "unpack_planes: out must lie within the " + number(count) + " packed values, got " + number(n) + " from " + number(first));
  // All ones: -1 for the caller, and as unsigned what the kernel's minimum starts from.
  FASTEE_TRY(cuda::report(op, cudaMemsetAsync(damaged, 0xff, sizeof(int64_t), static_cast<cudaStream_t>(stream))));
  if (n == 0) return FASTEE_OK;
  uint8_t* to = bytes_of<uint8_t>(*out);
  const int64_t begin = first / cpu::kPlaneBlock * cpu::kPlaneBlock;
  const cuda::UnpackPlanesArgs a{
      static_cast<const uint8_t*>(data),
      nbytes,
      element,
      count,
      start,
      first,
      n,
      to,
      (reinterpret_cast<uintptr_t>(to) - static_cast<uintptr_t>((first - begin) * cuda::width_of(element))) % 16 == 0,
      reinterpret_cast<unsigned long long*>(damaged)};
  return cuda::launch(op, cuda::unpack_planes, (first + n + cpu::kPlaneBlock - 1) / cpu::kPlaneBlock - first / cpu::kPlaneBlock,
                      cuda::kPlaneThreads, sizeof(cuda::PlaneScratch), stream, a);
}
