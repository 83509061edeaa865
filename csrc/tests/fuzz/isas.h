// What the kernels' fuzzers share: the instruction sets to compare, and how a finding is reported.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "fastee/fastee.h"

[[noreturn]] inline void broken() { std::abort(); }

inline void select(const std::string& isa) {
  if (fastee_select_isa(isa.c_str()) != FASTEE_OK) broken();
}

// The best instruction set and the next, one run in eight any other: those without registers take ten times as long under ASan.
inline std::vector<std::string> two_isas(size_t turn) {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> names;
    const std::string list = fastee_isas();
    for (size_t from = 0; from <= list.size();) {
      const size_t to = std::min(list.find(',', from), list.size());
      names.push_back(list.substr(from, to - from));
      from = to + 1;
    }
    return names;
  }();
  return {all[0], all[turn % 8 ? std::min<size_t>(1, all.size() - 1) : turn / 8 % all.size()]};
}
