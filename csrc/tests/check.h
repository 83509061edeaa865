// The whole test framework: CHECK(condition) prints where it failed and counts; main returns report().
#pragma once
#include <cstdio>

inline int failures = 0;
#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      ++failures;                                                                          \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                                      \
  } while (0)
inline int report(const char* name) {
  std::printf("%s: %s (%d failed)\n", name, failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
