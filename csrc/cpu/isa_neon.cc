#if defined(__aarch64__)
#define FASTEE_ISA neon
#define FASTEE_SIMD_NEON
#include "cpu/isa-inl.h"

const fastee::cpu::Kernels fastee::cpu::neon_kernels = FASTEE_KERNELS;
#endif
