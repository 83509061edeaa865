// What tiles of a grid need of the tiles before them, in one pass (Merrill and Garland 2016): a tile publishes its own amount, then sums
// what is published before it. Tiles wait for smaller block indices only, which a device starts first, so waiting always ends. Amounts
// are integers: the result does not depend on who was first.
#pragma once
#include "cuda/device.cuh"

namespace fastee::cuda {

// Memory that a caller has set to zero once and that every launch leaves at zero: replays of a graph need no node that clears it.
struct Sync {
  unsigned* done;               // tiles that need no one's amount any more
  unsigned long long* amounts;  // [tiles]
  unsigned* tickets;            // [tiles] slices that have finished, used by exit_head
};
constexpr int64_t sync_bytes(int64_t tiles) { return 8 + 12 * tiles; }
__host__ __device__ inline Sync sync_at(void* memory, int64_t tiles) {
  unsigned char* p = static_cast<unsigned char*>(memory);
  return {reinterpret_cast<unsigned*>(p), reinterpret_cast<unsigned long long*>(p + 8), reinterpret_cast<unsigned*>(p + 8 + 8 * tiles)};
}

// What a published word says beside its amount; 0: nothing yet.
enum : unsigned long long { kOwn = 1ull << 62, kTotal = 2ull << 62, kAmount = kOwn - 1 };

__device__ __forceinline__ void publish(unsigned long long* to, unsigned long long word) {
  *static_cast<volatile unsigned long long*>(to) = word;
}

// The sum of the amounts of tiles 0 to tile - 1; called by one whole warp, every lane gets the result.
__device__ __forceinline__ unsigned long long look_back(unsigned long long* amounts, int64_t tile, unsigned long long own) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (lane == 0) publish(amounts + tile, (tile ? kOwn : kTotal) | own);
  unsigned long long before = 0;
  for (int64_t at = tile - 1; at >= 0; at -= 32) {
    unsigned long long word;
    for (;;) {
      word = at >= lane ? *static_cast<volatile unsigned long long*>(amounts + at - lane) : kTotal;
      if (__ballot_sync(kAll, word == 0) == 0) break;
      __nanosleep(20);
    }
    const unsigned total = __ballot_sync(kAll, word >> 63 != 0);
    const int nearest = total ? __ffs(static_cast<int>(total)) - 1 : 31;
    before += warp_sum(lane <= nearest ? word & kAmount : 0ull);
    if (total) break;
  }
  if (lane == 0 && tile) publish(amounts + tile, kTotal | (before + own));
  return before;
}

// True in every thread of the block that is the last of `tiles` to call this; called by all its threads when the block looks back no
// more. `shared` is one word. The last block finds what the others wrote before, and must clear the amounts.
__device__ __forceinline__ bool last_to_leave(unsigned* ticket, unsigned tiles, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(ticket, 1u);
  __syncthreads();
  const bool last = *shared == tiles - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

// Row `row` goes to its place among the survivors, or among the rest, which stand reversed behind them.
__device__ __forceinline__ void place(int64_t* index, int64_t rows, int64_t row, int64_t survivors_before, bool survives) {
  index[survives ? survivors_before : rows - 1 - (row - survivors_before)] = row;
}

__device__ __forceinline__ void clear_amounts(const Sync& sync, int64_t tiles) {
  for (int64_t i = threadIdx.x; i < tiles; i += blockDim.x) sync.amounts[i] = 0;
}
}  // namespace fastee::cuda
