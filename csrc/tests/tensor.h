// A DLTensor over memory of the test's own, contiguous.
#pragma once
#include <utility>
#include <vector>

#include "fastee/fastee.h"

struct Tensor {
  Tensor(void* data, std::vector<int64_t> sizes, uint8_t code = kDLFloat, uint8_t bits = 32) : shape(std::move(sizes)) {
    t = {data, {kDLCPU, 0}, static_cast<int32_t>(shape.size()), {code, bits, 1}, shape.data(), nullptr, 0};
  }
  Tensor(void* data, std::vector<int64_t> sizes, DLDataType type) : Tensor(data, std::move(sizes), type.code, type.bits) {}
  const DLTensor* operator&() { return &t; }
  std::vector<int64_t> shape;
  DLTensor t;
};
