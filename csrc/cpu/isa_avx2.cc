#if defined(__x86_64__)
#define FASTEE_ISA avx2
#define FASTEE_SIMD_AVX2
#include "cpu/isa-inl.h"

const fastee::cpu::Kernels fastee::cpu::avx2_kernels = FASTEE_KERNELS;
#endif
