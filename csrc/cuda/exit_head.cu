// exit_head, exit_step and exit_pack: how a head is divided over blocks, and the launch.
#include "cuda/kernels/exit_pack.cuh"
#include "cuda/launch.h"

namespace fastee::cuda {
namespace {

constexpr int64_t kMostFeatures = 20480;  // a thin tile's row then fills 80 KB of shared memory
constexpr int64_t kEnoughBlocks = 128;    // about one a multiprocessor: fewer leave bandwidth unused, more read the activation again

static_assert(head_shared(1, kMostFeatures, 1, 8 * 2 * kHeadWarps, 64, 4) <= 163 << 10, "sm_80 has 163 KB a block");

struct HeadPlan {
  HeadTile tile;
  bool thin;        // one row and eight classes a warp, else four rows and sixteen classes
  bool pool_first;  // the pool reduces and several slices would repeat it
  int64_t shared;
};

HeadPlan plan_head(const cpu::HeadArgs& a, int64_t* index, int64_t* count, const fastee_cuda_memory& memory) {
  HeadPlan p{};
  HeadTile& t = p.tile;
  const int64_t rows = a.x.rows;
  p.thin = rows == 1 || a.x.features > kMostFeatures / 4;
  const int row_warps = !p.thin && rows > 4 && a.x.features <= kMostFeatures / 8 ? 2 : 1;
  t.width = a.weight_element == kF32 ? 4 : a.weight_element == kI8 ? 1 : 2;
  t.head = a, t.index = index, t.count = count, t.sync = memory.sync;
  t.tile_rows = (p.thin ? 1 : 4) * row_warps;
  t.tiles = static_cast<int>((rows + t.tile_rows - 1) / t.tile_rows);
  for (t.class_warps = kHeadWarps / row_warps; t.class_warps > 1; t.class_warps /= 2) {
    t.classes = (p.thin ? 8 : 16) * t.class_warps;
    if (t.classes / 2 < a.classes && (a.classes + t.classes - 1) / t.classes * t.tiles >= kEnoughBlocks) break;
  }
  t.classes = (p.thin ? 8 : 16) * t.class_warps;
  t.slices = static_cast<int>((a.classes + t.classes - 1) / t.classes);
  t.chunk = kStageValues / t.classes;
  t.aligned = aligned16(a.weight) && a.weight_stride * t.width % 16 == 0;
  float* scratch = static_cast<float*>(memory.scratch);
  t.exchange = a.logits ? a.logits : scratch + rows * a.x.features;
  p.pool_first = t.slices > 1 && (a.x.inner > 1 || a.x.feature_stride != 1);
  if (p.pool_first) t.head.x = {scratch, kF32, rows, a.x.features, 1, a.x.features, 1, a.x.features, nullptr, 0};
  p.shared = head_shared(t.tile_rows, a.x.features, a.classes, t.classes, t.chunk, t.width);
  return p;
}

fastee_status check_head(const char* op, const cpu::HeadArgs& a, const fastee_cuda_memory* memory, int64_t groups) {
  if (a.x.features > kMostFeatures)
    return fail(FASTEE_UNSUPPORTED,
                std::string(op) + ": a head on CUDA takes at most " + number(kMostFeatures) + " features, got " + number(a.x.features));
  return expect_memory(op, memory, sync_bytes(a.x.rows), 4 * a.x.rows * (a.x.features + a.classes + groups));
}

fastee_status launch_head(const char* op, const cpu::HeadArgs& a, const fastee_head_out& out, const fastee_cuda_memory& memory,
                          const PackTile& pack, void* stream) {
  const HeadPlan p = plan_head(a, out.index, out.count, memory);
  if (p.pool_first)
    FASTEE_TRY(launch(op, pool, a.x.rows, 256, 16, stream, PoolArgs{a.x, static_cast<float*>(memory.scratch), a.x.features}));
  return launch(op, p.thin ? exit_pack<1, 1> : exit_pack<2, 4>, static_cast<int64_t>(p.tile.tiles) * p.tile.slices, kHeadThreads, p.shared,
                stream, p.tile, pack);
}
}  // namespace
}  // namespace fastee::cuda

using namespace fastee;

extern "C" int64_t fastee_cuda_sync_bytes(int64_t rows) { return cuda::sync_bytes(rows); }
extern "C" int64_t fastee_cuda_scratch_bytes(int64_t rows, int64_t features, int64_t classes, int64_t groups) {
  return 4 * rows * (features + classes + groups);
}

extern "C" fastee_status fastee_cuda_exit_head(const DLTensor* x, const fastee_head* head, const fastee_head_out* out,
                                               const fastee_cuda_memory* memory, void* stream) {
  static const char op[] = "exit_head";
  cpu::HeadArgs a;
  FASTEE_TRY(head_args(op, x, head, out, &a));
  FASTEE_TRY(cuda::check_head(op, a, memory, 0));
  if (a.x.rows == 0)
    return out->count ? cuda::report(op, cudaMemsetAsync(out->count, 0, sizeof(int64_t), static_cast<cudaStream_t>(stream))) : FASTEE_OK;
  return cuda::launch_head(op, a, *out, *memory, {}, stream);
}

extern "C" fastee_status fastee_cuda_exit_pack(const DLTensor* x, const fastee_head* head, fastee_format format, int64_t group,
                                               const fastee_head_out* out, void* buffer, int64_t capacity, int64_t* extent,
                                               const fastee_cuda_memory* memory, void* stream) {
  static const char op[] = "exit_pack";
  cpu::HeadArgs a;
  FASTEE_TRY(head_args(op, x, head, out, &a));
  if (!out->exits || !out->index || !extent || (!buffer && capacity > 0))
    return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: out.exits, out.index, out.count, buffer and extent must not be NULL");
  if (!contiguous_from(*x, 1)) return unsupported_rows(op, "x", *x);
  if (format < FASTEE_INT8 || format > FASTEE_BF16)
    return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: format must be 0 to 3, got " + number(format));
  const int64_t row = product(*x, 1, x->ndim), rows = a.x.rows;
  if (format == FASTEE_BF16 && group)
    return fail(FASTEE_INVALID_ARGUMENT, "exit_pack: bf16 has no scales, so group must be 0, got " + number(group));
  FASTEE_TRY(expect_group(op, row, &group));
  cuda::PackTile p{{format, row, group},
                   bytes_of<void>(*x),
                   a.x.element,
                   stride(*x, 0),
                   format == FASTEE_BF16 ? 0 : row / group,
                   row_bytes(format, row),
                   static_cast<uint8_t*>(buffer),
                   nullptr,
                   extent,
                   false};
  const int64_t needed = rows * (4 * p.groups + p.row_bytes);
  if (capacity < needed)
    return fail(FASTEE_INVALID_ARGUMENT,
                "exit_pack: capacity must be at least " + number(needed) + " bytes, room for all rows, got " + number(capacity));
  FASTEE_TRY(cuda::check_head(op, a, memory, p.groups));
  if (rows == 0) {
    FASTEE_TRY(cuda::report(op, cudaMemsetAsync(out->count, 0, sizeof(int64_t), static_cast<cudaStream_t>(stream))));
    return cuda::report(op, cudaMemsetAsync(extent, 0, 2 * sizeof(int64_t), static_cast<cudaStream_t>(stream)));
  }
  p.whole = cuda::whole_rows(p.x, p.element, p.row_stride, p.f);
  p.scales = static_cast<float*>(memory->scratch) + rows * (a.x.features + a.classes);
  return cuda::launch_head(op, a, *out, *memory, p, stream);
}
