// Everything an instruction set provides, once per isa_*.cc.
#pragma once
#include "cpu/compact-inl.h"
#include "cpu/exit_head-inl.h"
#include "cpu/feature_delta-inl.h"
#include "cpu/mean_entropy-inl.h"
#include "cpu/pack_planes-inl.h"
#include "cpu/quantize_rows-inl.h"

namespace fastee::cpu {
#define FASTEE_STRING_(x) #x
#define FASTEE_STRING(x) FASTEE_STRING_(x)
#define FASTEE_KERNELS                                                                                                    \
  {                                                                                                                       \
    FASTEE_STRING(FASTEE_ISA), FASTEE_ISA::pool, FASTEE_ISA::exit_head, FASTEE_ISA::finish_head, FASTEE_ISA::row_stats, FASTEE_ISA::mean_entropy, FASTEE_ISA::feature_delta, FASTEE_ISA::compact, \
        FASTEE_ISA::quantize_rows, FASTEE_ISA::dequantize_rows, FASTEE_ISA::pack_planes, FASTEE_ISA::unpack_planes                                                           \
  }
}  // namespace fastee::cpu
