// A loop of fastee::Runner's exit checks at batch 1 and the same loop over the C ABI, with the same outputs, for bench_bindings.py.
#include <ATen/ops/from_blob.h>

#include <cstdio>
#include <exception>

#include "fastee/runner.h"

extern "C" fastee::Runner* checks_open(const char* folder) try {
  return new fastee::Runner(folder);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return nullptr;
}

extern "C" void checks_close(fastee::Runner* runner) { delete runner; }

extern "C" int64_t checks_runner(fastee::Runner* runner, float* x, int64_t features, int64_t times) {
  const std::vector<at::Tensor> carry{at::from_blob(x, {1, features}, at::kFloat)};
  fastee::Step step;
  for (int64_t i = 0; i < times; ++i) runner->exit_step(0, carry, &step);
  return step.label[0];
}

extern "C" int64_t checks_c_abi(float* x, float* weight, float* bias, int64_t features, int64_t classes, int64_t times) {
  int64_t x_shape[] = {1, features}, weight_shape[] = {classes, features}, label, index, count;
  float confidence;
  uint8_t exits;
  std::vector<float> logits(classes);
  const DLDataType fp32{kDLFloat, 32, 1};
  const DLTensor vx{x, {kDLCPU, 0}, 2, fp32, x_shape, nullptr, 0}, vw{weight, {kDLCPU, 0}, 2, fp32, weight_shape, nullptr, 0},
      vb{bias, {kDLCPU, 0}, 1, fp32, weight_shape, nullptr, 0};
  const fastee_head head{FASTEE_POOL_NONE, FASTEE_NORM_NONE, FASTEE_MAX_PROB, 0.0f, 1.0f, 0.9f, &vw, &vb, nullptr, nullptr, nullptr, nullptr};
  const fastee_head_out out{{&label, nullptr, nullptr, nullptr, nullptr, nullptr}, &confidence, &exits, logits.data(), &index, &count};
  for (int64_t i = 0; i < times; ++i)
    if (fastee_exit_head(&vx, &head, &out, nullptr) != FASTEE_OK) return -2;
  return label;
}
