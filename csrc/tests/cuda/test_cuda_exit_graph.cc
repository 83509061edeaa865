// The exit graph on the host: which stages run, in which bucket, for every way that rows can leave; and that no failed call leaks.
#include "cuda_fixture.h"

namespace {
struct Network {
  // Stage i runs in the buckets given and writes counts[i], which a test sets as `leaves` says.
  Network(std::vector<std::vector<int64_t>> buckets) : rows(std::move(buckets)), counts(rows.size()), left(rows.size()) {
    graphs.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i)
      for (size_t b = 0; b < rows[i].size(); ++b) {
        captured.push_back(std::make_unique<emulation::Graph>());
        captured.back()->nodes.push_back(std::make_unique<emulation::Node>());
        captured.back()->nodes.back()->action = [this, i, b] {
          ran.push_back({static_cast<int>(i), static_cast<int>(rows[i][b])});
          counts[i] = left[i];
        };
        graphs[i].push_back(captured.back().get());
      }
    for (size_t i = 0; i < rows.size(); ++i)
      stages.push_back(
          {rows[i].data(), graphs[i].data(), static_cast<int32_t>(rows[i].size()), i + 1 < rows.size() ? &counts[i] : nullptr});
  }
  std::vector<std::vector<int64_t>> rows;
  std::vector<int64_t> counts, left;
  std::vector<std::vector<void*>> graphs;
  std::vector<std::unique_ptr<emulation::Graph>> captured;
  std::vector<fastee_cuda_stage> stages;
  std::vector<std::pair<int, int>> ran;
};

using Runs = std::vector<std::pair<int, int>>;
bool says(const char* part) { return std::string(fastee_cuda_last_error()).find(part) != std::string::npos; }

void stages_run_as_rows_are_left() {
  Network n({{32}, {4, 16, 32}, {32}, {8, 32}});
  fastee_cuda_exit_graph* g = nullptr;
  CHECK(fastee_cuda_exit_graph_create(n.stages.data(), 4, &g) == FASTEE_OK);
  auto run = [&](std::vector<int64_t> left) {
    n.left = std::move(left), n.ran.clear();
    for (int64_t& c : n.counts) c = 31;  // what an earlier launch left must not matter
    CHECK(fastee_cuda_exit_graph_launch(g, nullptr) == FASTEE_OK);
    return n.ran;
  };
  CHECK((run({0, 9, 9, 9}) == Runs{{0, 32}}));
  CHECK((run({1, 0, 9, 9}) == Runs{{0, 32}, {1, 4}}));
  CHECK((run({4, 3, 0, 9}) == Runs{{0, 32}, {1, 4}, {2, 32}}));
  CHECK((run({5, 5, 5, 9}) == Runs{{0, 32}, {1, 16}, {2, 32}, {3, 8}}));
  CHECK((run({16, 12, 9, 9}) == Runs{{0, 32}, {1, 16}, {2, 32}, {3, 32}}));
  CHECK((run({17, 8, 8, 9}) == Runs{{0, 32}, {1, 32}, {2, 32}, {3, 8}}));
  CHECK((run({32, 32, 32, 9}) == Runs{{0, 32}, {1, 32}, {2, 32}, {3, 32}}));
  fastee_cuda_exit_graph_destroy(g);
  fastee_cuda_exit_graph_destroy(nullptr);
}

void one_stage_is_a_graph_too() {
  Network n(std::vector<std::vector<int64_t>>{{5}});
  fastee_cuda_exit_graph* g = nullptr;
  CHECK(fastee_cuda_exit_graph_create(n.stages.data(), 1, &g) == FASTEE_OK && fastee_cuda_exit_graph_launch(g, nullptr) == FASTEE_OK);
  CHECK((n.ran == Runs{{0, 5}}));
  fastee_cuda_exit_graph_destroy(g);
}

void every_failing_call_is_reported_and_leaks_nothing() {
  Network n({{8}, {2, 8}, {8}});
  const int before = emulation::Graph::alive();
  int at = 1;
  for (;; ++at) {
    fastee_cuda_exit_graph* g = nullptr;
    emulation::failing_call() = at;
    const fastee_status s = fastee_cuda_exit_graph_create(n.stages.data(), 3, &g);
    if (s == FASTEE_OK) {
      emulation::failing_call() = 0;
      fastee_cuda_exit_graph_destroy(g);
      break;
    }
    CHECK(s == FASTEE_DEVICE_ERROR && says("exit_graph: CUDA error 2") && g == nullptr && emulation::Graph::alive() == before);
  }
  CHECK(at == 15 && emulation::Graph::alive() == before);  // a graph, 4 children, 3 handles, 2 kernels, 3 conditionals, one instance
}

void bad_stages_are_refused() {
  Network n({{8}, {2, 8}, {8}});
  fastee_cuda_exit_graph* g = nullptr;
  CHECK(fastee_cuda_exit_graph_create(nullptr, 3, &g) == FASTEE_INVALID_ARGUMENT && says("at least one, got 0"));
  auto refused = [&](auto change, const char* text) {
    std::vector<fastee_cuda_stage> stages = n.stages;
    change(stages);
    CHECK(fastee_cuda_exit_graph_create(stages.data(), 3, &g) == FASTEE_INVALID_ARGUMENT && says(text));
  };
  const int64_t falling[] = {8, 2}, small[] = {4};
  refused([](auto& s) { s[0].count = nullptr; }, "stages[0].count must not be NULL");
  refused([](auto& s) { s[0].buckets = 2; }, "stages[0] must have one bucket with rows and graphs, got 2");
  refused([](auto& s) { s[1].buckets = 17; }, "stages[1] must have 1 to 16 buckets");
  refused([&](auto& s) { s[1].rows = falling; }, "stages[1].rows must be positive and grow, got 2 at 1");
  refused([&](auto& s) { s[2].rows = small; }, "stages[2].rows must reach the 8 rows of the stage before, got 4");
}
}  // namespace

int main() {
  stages_run_as_rows_are_left();
  one_stage_is_a_graph_too();
  every_failing_call_is_reported_and_leaks_nothing();
  bad_stages_are_refused();
  return report("test_cuda_exit_graph");
}
