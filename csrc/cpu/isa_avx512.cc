#if defined(__x86_64__)
#define FASTEE_ISA avx512
#define FASTEE_SIMD_AVX512
#include "cpu/isa-inl.h"

const fastee::cpu::Kernels fastee::cpu::avx512_kernels = FASTEE_KERNELS;
#endif
