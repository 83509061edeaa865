// Everything an instruction set provides, once per isa_*.cc.
#pragma once
#include "cpu/compact-inl.h"
#include "cpu/exit_head-inl.h"
#include "cpu/quantize_rows-inl.h"

namespace fastee::cpu {
#define FASTEE_STRING_(x) #x
#define FASTEE_STRING(x) FASTEE_STRING_(x)
#define FASTEE_KERNELS                                                                                                    \
  {                                                                                                                       \
    FASTEE_STRING(FASTEE_ISA), FASTEE_ISA::pool, FASTEE_ISA::exit_head, FASTEE_ISA::row_stats, FASTEE_ISA::compact, \
        FASTEE_ISA::quantize_rows, FASTEE_ISA::dequantize_rows                                                           \
  }
}  // namespace fastee::cpu
