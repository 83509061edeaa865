// The kernels over all cores: the same results as one call of the table's function, rows shared out when there are many.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"

namespace fastee::parallel {
bool exit_head(cpu::HeadArgs& args);  // args.scratch is set here; false: no memory for the working buffer
void row_stats(const cpu::RowStatsArgs& args);
void mean_entropy(const cpu::MeanEntropyArgs& args);
void feature_delta(const cpu::FeatureDeltaArgs& args);
void quantize_rows(const cpu::QuantizeArgs& args);
void dequantize_rows(const cpu::DequantizeArgs& args);

// What of an exit's rows is packed, and where to: scales of all rows, `room` bytes of data.
struct Packing {
  const void* x;  // the rows, as far apart as those of the head's activation, which may begin behind them (the last token)
  int format;
  int64_t row, group, groups, bytes;  // elements of a row and of a group, scales and bytes of a packed row
  uint8_t *scales, *data;
  int64_t room;
};
// Run the exit and pack the rows that stay, one behind the other -> how many; -1: no memory for the working buffer; -2 - n: no room for n rows.
int64_t exit_pack(const cpu::HeadArgs& args, const Packing& to);

// Blocks of planes one behind the other: offsets [blocks + 1] in units of 4 bytes (little-endian, any address) -> bytes of all. `out` holds
// plane_block_bound bytes for each block.
int64_t pack_planes(const uint8_t* values, int element, int64_t count, uint8_t* offsets, uint8_t* out);
// Values [first, first + wanted) of `count` -> -1, or the first damaged block.
int64_t unpack_planes(const uint8_t* blocks, int64_t bytes, const uint8_t* offsets, int element, int64_t count, int64_t first, int64_t wanted, uint8_t* out);

const void* past_elements(const void* p, int element, int64_t n);
cpu::HeadArgs slice(cpu::HeadArgs args, int64_t first, int64_t last);  // rows [first, last)

// to[i * to_stride] = from[index[i] * from_stride] and to[index[i] * to_stride] = from[i * from_stride], `bytes` each, strides in
// bytes. Of equal indices the last one stays, on any number of threads.
void gather_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes);
void scatter_rows(char* to, int64_t to_stride, int64_t to_rows, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes);
}  // namespace fastee::parallel
