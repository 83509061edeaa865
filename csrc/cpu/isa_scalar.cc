#define FASTEE_ISA scalar
#include "cpu/isa-inl.h"

const fastee::cpu::Kernels fastee::cpu::scalar_kernels = FASTEE_KERNELS;
