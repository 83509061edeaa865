#include "cuda/kernels/compact.cuh"

#include "cuda/launch.h"

using namespace fastee;

extern "C" fastee_status fastee_cuda_compact(const DLTensor* mask, int64_t* index, int64_t* count, const fastee_cuda_memory* memory,
                                             void* stream) {
  static const char op[] = "compact";
  const uint8_t code = mask && mask->dtype.code == kDLBool ? kDLBool : kDLUInt;
  FASTEE_TRY(expect(op, "mask", mask, code, 8, 1, "bool or uint8 [B]"));
  const int64_t rows = mask->shape[0];
  if (!count || (rows && !index)) return fail(FASTEE_INVALID_ARGUMENT, "compact: index and count must not be NULL");
  const int64_t tiles = rows <= cuda::kCompactTile ? 1 : (rows + cuda::kCompactTile - 1) / cuda::kCompactTile;
  if (tiles > 1) FASTEE_TRY(cuda::expect_memory(op, memory, cuda::sync_bytes(tiles), 0));
  const cuda::CompactArgs args{bytes_of<uint8_t>(*mask), rows, stride(*mask, 0), index, count, tiles, tiles > 1 ? memory->sync : nullptr};
  return cuda::launch(op, cuda::compact, tiles, cuda::kCompactThreads, 4 * (cuda::kCompactThreads / 32 + 4), stream, args);
}
