// exit_pack: exit_step, and the survivors' rows quantised into one buffer, in one launch. A row tile's last slice knows from its look
// back where its survivors go and packs them while they are in L2; the last tile of all moves the scales up to the data. The activation is
// read from memory once; only survivors are written. exit_head and exit_step are the same kernel with nothing to pack: a second copy of it
// took nvcc another ten seconds per architecture.
#pragma once
#include "cuda/kernels/exit_head.cuh"
#include "cuda/kernels/quantize_rows.cuh"

namespace fastee::cuda {

struct PackTile {
  RowFormat f;
  const void* x;  // the activation's rows, contiguous inside
  int element;
  int64_t row_stride, groups, row_bytes;
  uint8_t* buffer;  // room for the scales of all rows, then for the data of all rows
  float* scales;    // [rows, groups], where scales wait until the count is known
  int64_t* extent;  // [2]: the byte at which the packed rows begin, their bytes. null: nothing is packed
  bool whole;
};

template <int N, int R>
__global__ void __launch_bounds__(kHeadThreads, 1) exit_pack(const __grid_constant__ HeadTile t, const __grid_constant__ PackTile p) {
  const Judged j = head_tile<N, R>(t);
  if (!j.here || (!p.extent && (!t.index || t.tiles == 1))) return;
  const int64_t rows = t.head.x.rows, reserved = 4 * p.groups * rows, width = p.element == kF32 ? 4 : 2;
  if (p.extent) {
    unsigned* words = j.words + 16;  // of the logits' memory, which is done with
    int64_t at = j.stay_before;
    for (int r = 0; r < j.rows; ++r) {
      if (j.leaving >> r & 1) continue;
      const Row x{static_cast<const uint8_t*>(p.x) + (j.first + r) * p.row_stride * width, p.element, p.whole};
      quantize_row(x, p.f, p.buffer + reserved + at * p.row_bytes, p.scales + at * p.groups, words);
      ++at;
    }
  }
  const Sync sync = sync_at(t.sync, t.tiles);
  if (!last_to_leave(sync.done, static_cast<unsigned>(t.tiles), j.words + 4)) return;
  clear_amounts(sync, t.tiles);
  if (!p.extent) return;
  const int64_t stay = *static_cast<volatile int64_t*>(t.count), offset = 4 * p.groups * (rows - stay);
  for (int64_t i = threadIdx.x; i < stay * p.groups; i += kHeadThreads)
    reinterpret_cast<float*>(p.buffer + offset)[i] = __ldcg(p.scales + i);
  if (threadIdx.x == 0) p.extent[0] = offset, p.extent[1] = (4 * p.groups + p.row_bytes) * stay;
}
}  // namespace fastee::cuda
