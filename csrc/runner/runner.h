// Runs a folder of fastee.export(net, dir, format="aoti") without Python: AOTInductor segments on libtorch, the fused exit step of
// libfastee between them, survivors only, and under a deadline the scheduler. Files are checked before anything of them is loaded; a
// package is machine code all the same: load only what you trust. One thread at a time per runner.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "fastee/fastee.h"

namespace fastee {

// The answers of B rows in the order of the input.
struct Answer {
  at::Tensor logits;                // fp32 [B, C], of the exit that the row took
  std::vector<int64_t> label;       // -1 for a row with NaN among its logits
  std::vector<float> confidence;    // the score of the network's measure, larger = more confident
  std::vector<int64_t> exit;        // 0-based; K is the network's own end
  std::vector<uint8_t> forced;      // left because of the deadline
};

// What an exit says of B rows; the memory is kept from call to call.
struct Step {
  std::vector<int64_t> label, index;  // index: rows that stay, in order, then the others reversed
  std::vector<float> confidence, logits;
  std::vector<uint8_t> exits;
  int64_t count = 0;  // rows that stay
};

class Runner {
 public:
  // Throws std::runtime_error with the reason. `fingerprint`: refuse another network's export (EarlyExit.fingerprint); "" takes any.
  explicit Runner(const std::string& folder, const std::string& fingerprint = "");
  ~Runner();

  int num_exits() const;
  const std::vector<double>& thresholds() const;
  void set_thresholds(const std::vector<double>& values);  // one per exit, +inf = off; throws std::invalid_argument

  // Throws std::invalid_argument where an input has another type or shape than the export. An empty batch gives an empty answer.
  Answer run(const std::vector<at::Tensor>& inputs);

  // The same with seconds from the call: a row that would be late leaves at the exit that it has reached. profile() must have run.
  Answer run(const std::vector<at::Tensor>& inputs, double deadline);

  // Measures the seconds of every segment for the rows of `inputs`, the median of `repeats`, and makes the scheduler from them.
  void profile(const std::vector<at::Tensor>& inputs, int repeats = 7);

  // One exit's decision on a carry, into `step`; the fused call and nothing else.
  void exit_step(int exit, const std::vector<at::Tensor>& carry, Step* step);
  std::vector<at::Tensor> run_segment(int segment, const std::vector<at::Tensor>& carry);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace fastee
