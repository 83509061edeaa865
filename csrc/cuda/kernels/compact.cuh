// compact: survivors in order, then the rest reversed. A tile of 4,096 flags per block: sixteen ballots per warp, a scan over the warps;
// tiles beyond the first look back. Floor: read B bytes, write 8 B.
#pragma once
#include "cuda/kernels/look_back.cuh"

namespace fastee::cuda {

constexpr int kCompactThreads = 256, kCompactRounds = 16, kCompactTile = kCompactThreads * kCompactRounds;

struct CompactArgs {
  const uint8_t* mask;
  int64_t rows, stride;
  int64_t *index, *count;
  int64_t tiles;
  void* sync;  // sync_bytes(tiles), unused with one tile
};

static __global__ void __launch_bounds__(kCompactThreads) compact(const __grid_constant__ CompactArgs a) {
  unsigned* shared = reinterpret_cast<unsigned*>(shared_memory());  // [warps] survivors, [2] what came before, [1] ticket
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32), warps = kCompactThreads / 32;
  const int64_t tile = blockIdx.x, first = tile * kCompactTile + warp * 32 * kCompactRounds;
  unsigned kept[kCompactRounds], own = 0;
  uint8_t flags[kCompactRounds];
#pragma unroll
  for (int k = 0; k < kCompactRounds; ++k) {
    const int64_t row = first + 32 * k + lane;
    flags[k] = row < a.rows ? a.mask[row * a.stride] : 0;
  }
#pragma unroll
  for (int k = 0; k < kCompactRounds; ++k) {
    kept[k] = __ballot_sync(kAll, flags[k] != 0);
    own += static_cast<unsigned>(__popc(kept[k]));
  }
  if (lane == 0) shared[warp] = own;
  __syncthreads();
  unsigned before_warp = 0, all = 0;
  for (int w = 0; w < warps; ++w) {
    before_warp += w < warp ? shared[w] : 0;
    all += shared[w];
  }
  int64_t k0 = before_warp;
  if (a.tiles > 1) {
    const Sync sync = sync_at(a.sync, a.tiles);
    int64_t* before = reinterpret_cast<int64_t*>(shared + warps);
    if (warp == 0) {
      const unsigned long long b = look_back(sync.amounts, tile, all);
      if (lane == 0) *before = static_cast<int64_t>(b);
    }
    __syncthreads();
    k0 += *before;
    if (tile == a.tiles - 1 && threadIdx.x == 0) *a.count = *before + all;
    if (last_to_leave(sync.done, static_cast<unsigned>(a.tiles), shared + warps + 2)) clear_amounts(sync, a.tiles);
  } else if (threadIdx.x == 0) {
    *a.count = all;
  }
#pragma unroll
  for (int k = 0; k < kCompactRounds; ++k) {
    const int64_t row = first + 32 * k + lane;
    const unsigned below = kept[k] & ((1u << lane) - 1);
    if (row < a.rows) place(a.index, a.rows, row, k0 + __popc(below), kept[k] >> lane & 1);
    k0 += __popc(kept[k]);
  }
}
}  // namespace fastee::cuda
