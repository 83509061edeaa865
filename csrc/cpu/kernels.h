// What an instruction set provides: one table of functions on raw pointers. No STL here: isa_*.cc compile this with their own
// -m flags, and an inline function of theirs must never become everybody's copy.
#pragma once
#include <cstdint>

namespace fastee::cpu {

// How an element lies in memory. Arithmetic is fp32; int8 is for weights, summed in whole numbers.
enum Element { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };

// An activation seen as rows x inner x features with element strides; the pools reduce `inner`.
struct Activation {
  const void* data;
  int element;
  int64_t rows, features, inner;
  int64_t row_stride, feature_stride, inner_stride;
  const uint8_t* mask;  // [rows, inner] or null
  int64_t mask_stride;
};

// The mergeable state of a row's logits, or of one tile of them: fp32 sums relative to the top.
struct RowState {  // trivial, so that an array of them costs nothing until used
  float top, top2, s, t, s2, t2;
  int64_t arg;
  bool bad;  // NaN or +inf seen
};

struct HeadArgs {
  Activation x;
  bool direct;  // fp32, no pool and contiguous features: the rows are the features
  int norm;     // fastee_norm_kind
  float norm_eps;
  const float *norm_weight, *norm_bias;  // [D] or null
  const void* weight;                    // [C, D], rows weight_stride apart
  int weight_element;
  const float* weight_scale;  // [C] with int8, else null
  int64_t classes, weight_stride;
  const float* bias;  // [C] or null
  float inverse_temperature;
  int measure;  // fastee_measure; energy is temperature * lse
  float temperature, threshold;
  int64_t* label;
  float *max_prob, *margin, *entropy, *lse, *entropy_p2, *confidence, *logits;
  uint8_t* exits;
  float* scratch;  // head_scratch(...) floats
  // A head shared out by classes: exit_head leaves the states of tiles [first_tile, last_tile) here, [tiles, rows], and writes nothing but
  // logits; finish_head merges and writes. Null: all tiles, merged and written at once.
  RowState* states;
  int64_t first_tile, last_tile;
  uint32_t* largest;  // null, or [rows]: bits of each row's largest magnitude, found by a mean pool of contiguous rows (feature_stride > 1)
};

struct RowStatsArgs {
  const void* logits;
  int element;
  int64_t rows, classes, row_stride;
  float inverse_temperature;
  int64_t* label;
  float *max_prob, *margin, *entropy, *lse, *entropy_p2;
};

struct MeanEntropyArgs {
  const void* logits;  // [rows, frames, classes], classes contiguous
  int element;
  int64_t rows, frames, classes, row_stride, frame_stride;
  const uint8_t* mask;  // [rows, frames] or null
  int64_t mask_stride;
  float inverse_temperature;
  float* out;
};

struct FeatureDeltaArgs {
  const void *a, *b;
  int element;
  int64_t rows, row, a_stride, b_stride;
  float* out;
};

// fastee_format
enum Format { kInt8 = 0, kInt4 = 1, kE4M3 = 2, kBf16Rows = 3 };

struct QuantizeArgs {
  int format;
  int element;
  const void* x;
  int64_t rows, row, row_stride, group;  // group divides row
  uint8_t* data;
  int64_t data_stride;  // bytes
  float* scale;         // [rows, row / group]; null for bf16
  const uint32_t* largest;  // null, or [rows]: bits of each row's largest magnitude, known beforehand; one group a row
};

struct DequantizeArgs {
  int format;
  const uint8_t* data;
  int64_t rows, row, data_stride, group;
  const float* scale;
  float* out;
  int64_t out_stride;
};

struct Kernels {
  const char* name;
  void (*pool)(const Activation& x, float* out, int64_t out_stride);
  void (*exit_head)(const HeadArgs& args);
  void (*finish_head)(const HeadArgs& args);
  void (*row_stats)(const RowStatsArgs& args);
  void (*mean_entropy)(const MeanEntropyArgs& args);
  void (*feature_delta)(const FeatureDeltaArgs& args);
  int64_t (*compact)(const uint8_t* mask, int64_t n, int64_t stride, uint8_t flip, int64_t* index);  // -> count
  void (*quantize_rows)(const QuantizeArgs& args);
  void (*dequantize_rows)(const DequantizeArgs& args);
  // One block of n <= kPlaneBlock values of kF32, kBF16 or kF16: -> bytes written (a multiple of 4, at most plane_block_bound), and
  // back -> false when `bytes` bytes are no such block.
  int64_t (*pack_planes)(const void* values, int element, int64_t n, uint8_t* out);
  bool (*unpack_planes)(const uint8_t* in, int64_t bytes, int element, int64_t n, void* values);
};

// Rows are walked in chunks whose features stay in the L2 cache, classes in tiles of fixed size: the tile decides the order in
// which states are merged, so it must not depend on the batch or on the machine.
constexpr int64_t kClassTile = 1024;
constexpr int64_t kRowChunk = 256;
constexpr int64_t kMostPanel = 32;

constexpr uint8_t kPlaneVersion = 2;
constexpr int64_t kPlaneBlock = 2048;
constexpr int64_t kPlaneHead = 12;
constexpr int64_t plane_block_bound(int64_t n, int64_t width) { return (kPlaneHead + n * width + 3) / 4 * 4; }

constexpr int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t kLeastChunk = 8;
constexpr int64_t row_chunk(int64_t features, int64_t classes) {
  // Weights are packed once per chunk, and rows read in order, which the L2 cache need not hold: 256 x 4096 -> 1000 in one chunk takes 20.6
  // ms, in two 22.1 (Zen 4).
  const bool packs = classes >= kMostPanel;
  int64_t fit = (packs ? 4 << 20 : 512 << 10) / (4 * round16(features)), most = packs ? kRowChunk : 64;
  return fit < kLeastChunk ? kLeastChunk : fit > most ? most : fit;
}
// Rows of a call's chunks; few rows are spared the division.
constexpr int64_t chunk_of(int64_t rows, int64_t features, int64_t classes) {
  if (rows <= kLeastChunk) return rows;
  const int64_t most = row_chunk(features, classes);
  return rows < most ? rows : most;
}

// The packed form of linear-inl.h: rows of 16 lanes x steps, panels of at most 32 classes, kPanelGroup rows of unreduced lanes. A line
// more than needed per row: powers of two would put all rows into one set of the L1 cache.
constexpr int64_t kPanelGroup = 24;
constexpr int64_t steps_of(int64_t features) { return (features + 15) / 16; }
constexpr int64_t packed_row(int64_t features) { return 16 * round16(steps_of(features)) + 16; }

// Floats of working memory of exit_head: pooled features, packed ones, one tile of logits, one panel and its lanes.
constexpr int64_t head_scratch(int64_t rows, int64_t features, int64_t classes) {
  int64_t chunk = chunk_of(rows, features, classes);
  int64_t tile = round16(classes < kClassTile ? classes : kClassTile);
  return chunk * (round16(features) + packed_row(features) + tile) + 16 * (kMostPanel * (steps_of(features) + kPanelGroup) + 16) + 16;
}

extern const Kernels scalar_kernels;
extern const Kernels emu16_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

const Kernels& kernels();  // the table in use (core/dispatch.cc)
}  // namespace fastee::cpu
