// AVX-512's tiles over sixteen scalar lanes: its code path runs, and is tested, on every machine. Chosen by name only.
#define FASTEE_ISA emu16
#define FASTEE_SIMD_EMU16
#include "cpu/isa-inl.h"

const fastee::cpu::Kernels fastee::cpu::emu16_kernels = FASTEE_KERNELS;
