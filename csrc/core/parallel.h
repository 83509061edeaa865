// The kernels over all cores: the same results as one call of the table's function, rows shared out when there are many.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"

namespace fastee::parallel {
bool exit_head(const cpu::HeadArgs& args);  // args.scratch is ignored; false: no memory for the working buffer
void row_stats(const cpu::RowStatsArgs& args);
void quantize_rows(const cpu::QuantizeArgs& args);
void dequantize_rows(const cpu::DequantizeArgs& args);

// to[i * to_stride] = from[index[i] * from_stride] and to[index[i] * to_stride] = from[i * from_stride], `bytes` each, strides in
// bytes. Of equal indices the last one stays, on any number of threads.
void gather_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes);
void scatter_rows(char* to, int64_t to_stride, int64_t to_rows, const char* from, int64_t from_stride, const int64_t* index, int64_t n, int64_t bytes);
}  // namespace fastee::parallel
