// pack_planes and unpack_planes: a block of 2,048 values per block of threads, the bytes of cpu/pack_planes-inl.h (layout:
// fastee/reference/pack_planes.py). A packed block is put together in shared memory at its own offsets, then written in words of four
// bytes where the look back says. Floor: read 2 (4) bytes a value, write about 0.7 (0.85) of that.
#pragma once
#include "cuda/kernels/look_back.cuh"

namespace fastee::cuda {

constexpr int kPlaneThreads = 256, kPlaneValues = static_cast<int>(cpu::kPlaneBlock), kPlaneOwn = kPlaneValues / kPlaneThreads;
constexpr int kPlaneHead = static_cast<int>(cpu::kPlaneHead);
constexpr int kPlaneWords = kPlaneValues / 32;  // of a bit plane, in 32 bits
static_assert(kPlaneOwn == 8 && kPlaneWords == 64 && kPlaneHead % 4 == 0);

struct Sections {  // of a coded block's bytes
  int planes, low, halves, list;
};
__host__ __device__ inline Sections sections(int element, int n) {
  const int planes = element == kF16 ? 6 : 3, low = kPlaneHead + (n + 63) / 64 * 8 * planes, halves = low + n;
  return {planes, low, halves, halves + (element == kF32 ? 2 * n : 0)};
}
__host__ __device__ inline int width_of(int element) { return element == kF32 ? 4 : 2; }

struct PlaneScratch {
  uint8_t image[kPlaneHead + 4 * kPlaneValues + kPlaneValues + 16];  // a coded block before it is known whether it shrinks
  uint8_t exponent[kPlaneValues];
  uint8_t top[kPlaneValues];  // fp16: the three bits that have planes of their own
  unsigned seen[256];
  unsigned escapes[kPlaneWords], before[kPlaneWords];  // bits; escapes in the words before
  unsigned lowest, highest, count, leave;
  int64_t offset;
  uint8_t table[8];
};

struct PackPlanesArgs {
  const uint8_t* values;
  int element;
  int64_t count, blocks;
  bool whole;  // values are aligned to 16 bytes
  uint8_t* out;
  int64_t start;  // of the first block
  int64_t* nbytes;
  void* sync;  // sync_bytes(blocks)
};

// The block's escapes from their bits: words' counts, scanned by the first warp; -> all of them, for every thread after a barrier.
__device__ __forceinline__ void count_escapes(PlaneScratch& s) {
  if (threadIdx.x < 32) {
    const unsigned lane = threadIdx.x;
    const unsigned a = static_cast<unsigned>(__popc(s.escapes[2 * lane])), b = static_cast<unsigned>(__popc(s.escapes[2 * lane + 1]));
    unsigned sum = a + b;
#pragma unroll
    for (unsigned w = 1; w < 32; w *= 2) {
      const unsigned other = __shfl_up_sync(kAll, sum, w);
      if (lane >= w) sum += other;
    }
    s.before[2 * lane] = sum - a - b;
    s.before[2 * lane + 1] = sum - b;
    if (lane == 31) s.count = sum;
  }
  __syncthreads();
}
__device__ __forceinline__ unsigned rank_of(const PlaneScratch& s, int i) {
  return s.before[i / 32] + static_cast<unsigned>(__popc(s.escapes[i / 32] & ((1u << (i & 31)) - 1)));
}

// The seven commonest exponents by the first warp, eight bins a lane; the smaller one first among equals.
__device__ __forceinline__ void choose_table(PlaneScratch& s) {
  const unsigned lane = threadIdx.x;
  unsigned key[8];
#pragma unroll
  for (unsigned k = 0; k < 8; ++k) key[k] = s.seen[lane + 32 * k] << 8 | (255 - (lane + 32 * k));
  for (int t = 0; t < 7; ++t) {
    unsigned own = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) own = key[k] > own ? key[k] : own;
    const unsigned best = __reduce_max_sync(kAll, own);
#pragma unroll
    for (int k = 0; k < 8; ++k) key[k] = key[k] == best ? 0 : key[k];  // keys differ
    if (lane == 0) s.table[t] = static_cast<uint8_t>(255 - (best & 255));
  }
}

// Bit k of codes 32 j to 32 j + 31, one per lane, to the planes from `first` on.
__device__ __forceinline__ void store_planes(uint8_t* image, int words, int first, int j, unsigned code) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const unsigned bits = __ballot_sync(kAll, static_cast<int>(code >> k & 1));
    if ((threadIdx.x & 31) == 0) *reinterpret_cast<unsigned*>(image + kPlaneHead + 8 * words * (first + k) + 4 * j) = bits;
  }
}

static __global__ void __launch_bounds__(kPlaneThreads) pack_planes(const __grid_constant__ PackPlanesArgs a) {
  PlaneScratch& s = *reinterpret_cast<PlaneScratch*>(shared_memory());
  const int rank = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, first = block * kPlaneValues;
  const int n = static_cast<int>(a.count - first < kPlaneValues ? a.count - first : kPlaneValues), words = (n + 63) / 64;
  const int width = width_of(a.element), raw = n * width, own = rank * kPlaneOwn;
  const Sections at = sections(a.element, n);
  const uint8_t* from = a.values + (first + own) * width;

  // Eight neighbouring values a thread, in one or two loads.
  uint32_t v[kPlaneOwn] = {};
  if (a.whole && n == kPlaneValues) {
    uint4 q[2];
    q[0] = *reinterpret_cast<const uint4*>(from);
    if (width == 4) {
      q[1] = *reinterpret_cast<const uint4*>(from + 16);
      const uint32_t w[8] = {q[0].x, q[0].y, q[0].z, q[0].w, q[1].x, q[1].y, q[1].z, q[1].w};
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = w[k];
    } else {
      const uint32_t w[4] = {q[0].x, q[0].y, q[0].z, q[0].w};
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = w[k / 2] >> (16 * (k & 1)) & 0xffff;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPlaneOwn; ++k)
      if (own + k < n) v[k] = width == 4 ? reinterpret_cast<const uint32_t*>(from)[k] : reinterpret_cast<const uint16_t*>(from)[k];
  }

  s.seen[rank] = 0;
  if (rank == 0) s.lowest = 255, s.highest = 0;
  __syncthreads();
  const int step = n / 512 | 1;
#pragma unroll
  for (int k = 0; k < kPlaneOwn; ++k) {
    const int i = own + k;
    const uint32_t upper = width == 4 ? v[k] >> 16 : v[k];
    const unsigned e = a.element == kF16 ? upper >> 10 & 31 : upper >> 7 & 255;
    s.exponent[i] = static_cast<uint8_t>(e);
    s.top[i] = static_cast<uint8_t>((upper >> 8 & 3) | (upper >> 13 & 4));
    if (i >= n) continue;
    if (i % step == 0) atomicAdd(&s.seen[e], 1u);
    s.image[at.low + i] = static_cast<uint8_t>(a.element == kF16 ? upper : (upper & 0x7f) | (upper >> 8 & 0x80));
    if (width == 4)
      s.image[at.halves + 2 * i] = static_cast<uint8_t>(v[k]), s.image[at.halves + 2 * i + 1] = static_cast<uint8_t>(v[k] >> 8);
  }
  __syncthreads();
  if (rank < 32) choose_table(s);
  __syncthreads();

  uint8_t table[7];
#pragma unroll
  for (int k = 0; k < 7; ++k) table[k] = s.table[k];
  unsigned lowest = 255, highest = 0;
  for (int j = rank / 32; j < kPlaneWords; j += kPlaneThreads / 32) {  // a word of 32 values a warp
    const int i = 32 * j + (rank & 31);
    const unsigned e = i < n ? s.exponent[i] : table[0];
    unsigned code = 7;
#pragma unroll
    for (unsigned k = 0; k < 7; ++k) code = e == table[k] ? k : code;
    if (j < 2 * words) {
      store_planes(s.image, words, 0, j, code);
      if (a.element == kF16) store_planes(s.image, words, 3, j, i < n ? s.top[i] : 0u);
    }
    const unsigned others = __ballot_sync(kAll, code == 7);
    if ((rank & 31) == 0) s.escapes[j] = others;
    if (code == 7) lowest = e < lowest ? e : lowest, highest = e > highest ? e : highest;
  }
  lowest = __reduce_min_sync(kAll, lowest), highest = __reduce_max_sync(kAll, highest);
  if ((rank & 31) == 0) atomicMin(&s.lowest, lowest), atomicMax(&s.highest, highest);
  __syncthreads();
  count_escapes(s);

  const int escapes = static_cast<int>(s.count);
  const unsigned floor = escapes ? s.lowest : 0;
  const bool narrow = !escapes || s.highest - s.lowest < 16;
  const int listed = narrow ? (escapes + 1) / 2 : escapes;
  const bool coded = at.list - kPlaneHead + listed < raw;
  const int size = ((coded ? at.list + listed : kPlaneHead + raw) + 3) / 4 * 4;
  if (!coded) {
#pragma unroll
    for (int k = 0; k < kPlaneOwn; ++k)
      if (own + k < n)
        for (int byte = 0; byte < width; ++byte) s.image[kPlaneHead + (own + k) * width + byte] = static_cast<uint8_t>(v[k] >> (8 * byte));
  } else {
    // A nibble list is put together byte by byte: the even escape of a pair writes for both.
    uint8_t* escaped = s.top;  // done with
    for (int i = rank; i < kPlaneValues; i += kPlaneThreads)
      if (s.escapes[i / 32] >> (i & 31) & 1) escaped[rank_of(s, i)] = s.exponent[i];
    __syncthreads();
    for (int i = rank; i < listed; i += kPlaneThreads) {
      const unsigned above = narrow && 2 * i + 1 < escapes ? escaped[2 * i + 1] - floor : 0;
      s.image[at.list + i] = static_cast<uint8_t>(narrow ? (escaped[2 * i] - floor) | above << 4 : escaped[i]);
    }
  }
  if (rank < kPlaneHead) {
    const uint64_t tail =
        (narrow ? 2u : 1u) | static_cast<uint64_t>(escapes) << 8 | static_cast<uint64_t>(narrow ? floor : 0) << 24;  // bytes 7 to 11
    s.image[rank] = static_cast<uint8_t>(!coded ? 0 : rank < 7 ? s.table[rank] : tail >> (8 * (rank - 7)));
  }
  const int end = coded ? at.list + listed : kPlaneHead + raw;
  if (rank < size - end) s.image[end + rank] = 0;

  const Sync sync = sync_at(a.sync, a.blocks);
  if (rank < 32) {
    const int64_t before =
        a.blocks > 1 ? static_cast<int64_t>(look_back(sync.amounts, block, static_cast<unsigned long long>(size / 4))) : 0;
    if (rank == 0) {
      s.offset = before;
      unsigned* offsets = reinterpret_cast<unsigned*>(a.out + 16);
      offsets[block] = static_cast<unsigned>(before);
      if (block == a.blocks - 1) {
        offsets[a.blocks] = static_cast<unsigned>(before + size / 4);
        *a.nbytes = a.start + 4 * before + size;
      }
    }
  }
  __syncthreads();
  unsigned* to = reinterpret_cast<unsigned*>(a.out + a.start + 4 * s.offset);
  for (int i = rank; i < size / 4; i += kPlaneThreads) to[i] = reinterpret_cast<const unsigned*>(s.image)[i];
  if (a.blocks > 1 && last_to_leave(sync.done, static_cast<unsigned>(a.blocks), &s.leave)) clear_amounts(sync, a.blocks);
}

// The sixteen bytes before the offsets; and all there is when there are no values.
struct PlanesHeaderArgs {
  uint8_t* out;
  int element;
  int64_t count;
  int64_t* nbytes;
};
static __global__ void __launch_bounds__(32) planes_header(const __grid_constant__ PlanesHeaderArgs a) {
  const unsigned i = threadIdx.x;
  const uint64_t head = 'F' | 'P' << 8 | 'L' << 16 | 'N' << 24 | static_cast<uint64_t>(cpu::kPlaneVersion | a.element << 8) << 32;
  if (i < 8) a.out[i] = static_cast<uint8_t>(head >> (8 * i));
  if (i < 8) a.out[8 + i] = static_cast<uint8_t>(a.count >> (8 * i));
  if (a.count == 0 && i < 4) a.out[16 + i] = 0;
  if (a.count == 0 && i == 0) *a.nbytes = 20;
}

struct UnpackPlanesArgs {
  const uint8_t* data;  // aligned to 4 bytes
  int64_t nbytes;
  int element;
  int64_t count, start, first, wanted;  // values [first, first + wanted)
  uint8_t* out;
  bool whole;                   // out + (a block's first value) is aligned to 16 bytes
  unsigned long long* damaged;  // the smallest damaged block, all ones before
};

static __global__ void __launch_bounds__(kPlaneThreads) unpack_planes(const __grid_constant__ UnpackPlanesArgs a) {
  PlaneScratch& s = *reinterpret_cast<PlaneScratch*>(shared_memory());
  const int rank = static_cast<int>(threadIdx.x), width = width_of(a.element);
  const int64_t block = a.first / kPlaneValues + blockIdx.x, begin = block * kPlaneValues;
  const int n = static_cast<int>(a.count - begin < kPlaneValues ? a.count - begin : kPlaneValues), words = (n + 63) / 64;
  const Sections at = sections(a.element, n);
  const unsigned* offsets = reinterpret_cast<const unsigned*>(a.data + 16);
  const int64_t from = 4 * static_cast<int64_t>(offsets[block]), until = 4 * static_cast<int64_t>(offsets[block + 1]), size = until - from;
  // The least of all that a reader may rely on: the block lies inside, and is no longer than one that was stored raw.
  bool sound = from <= until && a.start + until <= a.nbytes && size >= kPlaneHead && size <= (kPlaneHead + n * width + 3) / 4 * 4;
  if (sound)
    for (int i = rank; i < size / 4; i += kPlaneThreads)
      reinterpret_cast<unsigned*>(s.image)[i] = reinterpret_cast<const unsigned*>(a.data + a.start + from)[i];
  __syncthreads();
  const uint8_t* in = s.image;
  const int form = sound ? in[7] : 0, escapes = in[8] | in[9] << 8, listed = form == 2 ? (escapes + 1) / 2 : escapes;
  sound = sound && form <= 2 && size == ((form ? at.list + listed : kPlaneHead + n * width) + 3) / 4 * 4;
  const bool coded = sound && form;
  if (coded) {  // the same for all threads
    for (int j = rank; j < kPlaneWords; j += kPlaneThreads) {
      unsigned bits = kAll;
      for (int k = 0; k < 3; ++k) bits &= j < 2 * words ? *reinterpret_cast<const unsigned*>(in + kPlaneHead + 8 * words * k + 4 * j) : 0;
      s.escapes[j] = bits;
    }
    __syncthreads();
    count_escapes(s);
    sound = static_cast<int>(s.count) == escapes;
  }
  if (!sound) {
    if (rank == 0) atomicMin(a.damaged, static_cast<unsigned long long>(block));
    return;
  }
  const int own = rank * kPlaneOwn;
  uint32_t v[kPlaneOwn] = {};
#pragma unroll
  for (int k = 0; k < kPlaneOwn; ++k) {
    const int i = own + k;
    if (i >= n) continue;
    if (!form) {
      for (int byte = 0; byte < width; ++byte) v[k] |= static_cast<uint32_t>(in[kPlaneHead + i * width + byte]) << (8 * byte);
      continue;
    }
    auto bit = [&](int plane) { return in[kPlaneHead + 8 * words * plane + i / 8] >> (i & 7) & 1u; };
    const unsigned code = bit(0) | bit(1) << 1 | bit(2) << 2;
    unsigned e = code < 7 ? in[code] : 0;
    if (code == 7) {
      const unsigned r = rank_of(s, i);
      e = form == 2 ? (in[10] + (in[at.list + r / 2] >> (4 * (r & 1)) & 15u)) & 255 : in[at.list + r];
    }
    const uint32_t low = in[at.low + i];
    if (a.element == kF16) {
      v[k] = low | (bit(3) | bit(4) << 1) << 8 | (e & 31) << 10 | bit(5) << 15;
    } else {
      v[k] = (low & 0x7f) | e << 7 | (low & 0x80) << 8;
      if (a.element == kF32) v[k] = v[k] << 16 | in[at.halves + 2 * i] | static_cast<uint32_t>(in[at.halves + 2 * i + 1]) << 8;
    }
  }
  const int64_t to = begin + own - a.first;
  uint8_t* out = a.out + to * width;
  if (a.whole && to >= 0 && to + kPlaneOwn <= a.wanted && own + kPlaneOwn <= n) {
    if (width == 4) {
      *reinterpret_cast<uint4*>(out) = uint4{v[0], v[1], v[2], v[3]};
      *reinterpret_cast<uint4*>(out + 16) = uint4{v[4], v[5], v[6], v[7]};
    } else {
      *reinterpret_cast<uint4*>(out) = uint4{v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kPlaneOwn; ++k) {
    if (own + k >= n || to + k < 0 || to + k >= a.wanted) continue;
    if (width == 4)
      reinterpret_cast<uint32_t*>(out)[k] = v[k];
    else
      reinterpret_cast<uint16_t*>(out)[k] = static_cast<uint16_t>(v[k]);
  }
}
}  // namespace fastee::cuda
