// compact: one branch-free write per row: a survivor goes to the next place from the front, any other to the next from the back.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastee::cpu::FASTEE_ISA {
static int64_t compact(const uint8_t* mask, int64_t n, int64_t stride, uint8_t flip, int64_t* index) {
  int64_t k = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t keep = (mask[i * stride] != 0) ^ flip;
    index[keep ? k : n - 1 - (i - k)] = i;
    k += keep;
  }
  return k;
}
}  // namespace fastee::cpu::FASTEE_ISA
