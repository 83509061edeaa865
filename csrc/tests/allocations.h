// Counts what a thread allocates: for tests of calls that must allocate nothing. It replaces the program's operators, so one unit includes it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

inline thread_local int64_t allocations = 0;

// Out of line: inlined, GCC 12 holds free() against an operator new that it has not looked into.
#define FASTEE_OPERATOR __attribute__((noinline))
FASTEE_OPERATOR void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
FASTEE_OPERATOR void* operator new(size_t size) {
  if (void* p = operator new(size, std::nothrow)) return p;
  throw std::bad_alloc();
}
FASTEE_OPERATOR void operator delete(void* p) noexcept { std::free(p); }
FASTEE_OPERATOR void operator delete(void* p, size_t) noexcept { std::free(p); }
#undef FASTEE_OPERATOR
