// Answers rows with a network that fastee.export(net, "DIR", format="aoti") wrote, without Python:
//   run_exported DIR FEATURES [DEADLINE_SECONDS] < rows    (rows: raw fp32, FEATURES numbers each; the network takes one input [B, FEATURES])
// prints one line per row: exit label confidence forced.
#include <ATen/ops/from_blob.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <iterator>
#include <limits>
#include <string>

#include "fastee/runner.h"

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s DIR FEATURES [DEADLINE_SECONDS] < rows\n", argv[0]);
    return 2;
  }
  fastee::Runner runner(argv[1]);
  std::string bytes((std::istreambuf_iterator<char>(std::cin)), {});
  const int64_t features = std::atoll(argv[2]), rows = static_cast<int64_t>(bytes.size()) / (4 * features);
  const at::Tensor x = at::from_blob(bytes.data(), {rows, features}, at::kFloat);
  double deadline = std::numeric_limits<double>::infinity();
  if (argc > 3) {
    deadline = std::atof(argv[3]);
    runner.profile({x});
  }
  const fastee::Answer answer = runner.run({x}, deadline);
  for (int64_t r = 0; r < rows; ++r)
    std::printf("%d %d %.6f %d\n", static_cast<int>(answer.exit[r]), static_cast<int>(answer.label[r]), answer.confidence[r], answer.forced[r]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
