// Which instruction set runs: the best that the CPU has, lowered by FASTEE_CPU_ISA or fastee_select_isa(), never exceeded.
#include <atomic>
#include <cstdlib>
#include <string>

#include "core/status.h"
#include "cpu/kernels.h"

namespace fastee {
namespace {
using cpu::Kernels;

struct Entry {
  const Kernels* kernels;
  bool runs;
};

// Best first. AVX-512 needs F, BW, DQ and VL; AVX2 needs FMA, F16C and BMI2 beside it (Haswell and later have them all).
const Entry* entries(int* n) {
  static const Entry table[] = {
#if defined(__x86_64__)
      {&cpu::avx512_kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
      {&cpu::avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
#elif defined(__aarch64__)
      {&cpu::neon_kernels, true},  // part of every AArch64 CPU
#endif
      {&cpu::scalar_kernels, true},
      {&cpu::emu16_kernels, true},  // behind scalar: reached by its name only
  };
  *n = static_cast<int>(sizeof table / sizeof *table);
  return table;
}

std::string list() {
  int n;
  const Entry* t = entries(&n);
  std::string names;
  for (int i = 0; i < n; ++i)
    if (t[i].runs) names += (names.empty() ? "" : ",") + std::string(t[i].kernels->name);
  return names;
}

const Kernels* find(const std::string& name) {
  int n;
  const Entry* t = entries(&n);
  for (int i = 0; i < n; ++i)
    if (t[i].runs && (name.empty() || name == t[i].kernels->name)) return t[i].kernels;
  return nullptr;
}

const Kernels* at_load() {
  const char* wanted = std::getenv("FASTEE_CPU_ISA");
  const Kernels* found = find(wanted ? wanted : "");
  return found ? found : find("");  // an impossible wish is reported by fastee_select_isa, which Python calls with it
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{at_load()};
  return table;
}
}  // namespace

const cpu::Kernels& cpu::kernels() { return *current().load(std::memory_order_acquire); }
}  // namespace fastee

extern "C" const char* fastee_isa(void) { return fastee::cpu::kernels().name; }

extern "C" const char* fastee_isas(void) {
  static const std::string names = fastee::list();
  return names.c_str();
}

extern "C" fastee_status fastee_select_isa(const char* name) {
  const auto* found = fastee::find(name ? name : "");
  if (!found)
    return fastee::fail(FASTEE_UNSUPPORTED, std::string("FASTEE_CPU_ISA: this build on this CPU runs ") + fastee_isas() + ", got '" + name + "'");
  fastee::current().store(found, std::memory_order_release);
  return FASTEE_OK;
}
