// The planners without Python: random problems under every objective and limit hold their own promises, re-planning allocates nothing,
// bad numbers are refused.
#include <cmath>
#include <random>
#include <stdexcept>

#include "allocations.h"
#include "check.h"
#include "plan/joint.h"
#include "plan/pipeline.h"
#include "plan/search.h"

using namespace fastee::plan;

namespace {

Problem random_problem(std::mt19937_64& rng, bool limits) {
  const auto real = [&](double low, double high) { return std::uniform_real_distribution<double>(low, high)(rng); };
  const auto count = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  Problem p;
  p.segments = count(1, 9);
  p.nodes = count(1, 6);
  p.codecs = count(1, 3);
  p.source = count(0, p.nodes - 1);
  p.objective = static_cast<Objective>(count(0, 2));
  p.choose_exits = count(0, 1);
  const size_t s = p.segments, n = p.nodes, nc = p.codecs, k = s - 1;
  const auto fill = [&](std::vector<double>& v, size_t size, double low, double high, double missing, double instead) {
    v.resize(size);
    for (double& x : v) x = real(0, 1) < missing ? instead : real(low, high);
  };
  fill(p.run, s * n, 0, 0.01, limits ? 0.15 : 0.0, kInf);
  fill(p.head, k * n, 0, 0.002, 0.3, 0);
  fill(p.wire_bytes, s * nc, 0, 1e5, 0.05, 0);
  fill(p.codec_seconds, s * nc, 0, 1e-3, 0.5, 0);
  fill(p.bandwidth, n * n, 1e6, 1e8, 0.2, 0);
  fill(p.delay, n * n, 0, 0.01, 0.2, 0);
  fill(p.leave, k, 0, 1, 0.3, count(0, 1));
  fill(p.loss, k, 0, 0.1, 0.3, 0);
  fill(p.memory, s, 0, 10, 0.1, 0);
  fill(p.room, n, 5, 60, limits ? 0.3 : 1.0, kInf);
  fill(p.price, n, 0, 3, 0.3, 0);
  p.second_price = real(0, 1);
  p.byte_price = real(0, 1e-6);
  if (limits && count(0, 1)) p.deadline = real(0.005, 0.08);
  if (limits && count(0, 1)) p.max_drop = real(0, 0.05);
  return p;
}

void check_fuzz() {
  std::mt19937_64 rng(1);
  int found = 0;
  for (int round = 0; round < 3000; ++round) {
    Problem p = random_problem(rng, round % 2);
    p.max_width = round % 5 == 0 ? 1 : 256;
    Pipeline table(p);
    const Placement plan = table.solve();
    CHECK(plan.bound <= plan.value || (std::isinf(plan.bound) && std::isinf(plan.value)));
    if (!plan.found) continue;
    ++found;
    CHECK(table.fits(plan));
    const Account a = table.account(plan);
    CHECK(std::fabs(a.value - plan.value) <= 1e-9 * plan.value + 1e-15);
    if (p.objective == Objective::kLatency) CHECK(std::fabs(a.seconds - plan.value) <= 1e-9 * plan.value + 1e-15);
    if (p.objective == Objective::kCost) CHECK(std::fabs(a.cost - plan.value) <= 1e-9 * plan.value + 1e-12);
    for (int n = 0; n < p.nodes; ++n) CHECK(a.memory[n] <= p.room[n]);
    if (plan.exact) {  // no other plan is better: here the random ones
      for (int attempt = 0; attempt < 20; ++attempt) {
        Placement other = plan;
        std::vector<int> node_of(p.segments);
        int node = static_cast<int>(rng() % p.nodes);
        std::vector<char> seen(p.nodes, 0);
        bool legal = true;
        for (int s = 0; s < p.segments; ++s) {
          if (s > 0 && rng() % 3 == 0) node = static_cast<int>(rng() % p.nodes);
          if (p.objective == Objective::kThroughput && (s == 0 || other.place[s - 1] != node) && seen[node]) legal = false;
          seen[node] = 1;
          other.place[s] = node;
          other.codec[s] = static_cast<int>(rng() % p.codecs);
          if (s + 1 < p.segments && p.choose_exits) other.on[s] = p.leave[s] > 0 && rng() % 2;
        }
        if (legal && table.fits(other)) CHECK(plan.value <= table.account(other).value * (1 + 1e-9) + 1e-15);
      }
    }
  }
  CHECK(found > 1000);
}

void check_replanning() {
  std::mt19937_64 rng(2);
  for (int round = 0; round < 200; ++round) {
    Problem p = random_problem(rng, false);
    if (p.objective == Objective::kThroughput) p.objective = Objective::kLatency;
    Replanner r(p, 0.1);
    const auto move = [&] {
      const int a = static_cast<int>(rng() % p.nodes), b = static_cast<int>(rng() % p.nodes);
      r.tables().set_link(a, b, rng() % 5 == 0 ? 0.0 : 1e6 + static_cast<double>(rng() % 100000000), 1e-3);
      r.tables().set_speed(a, 0.5 + static_cast<double>(rng() % 100) / 50);
      if (p.segments > 1) r.tables().set_leave(static_cast<int>(rng() % (p.segments - 1)), static_cast<double>(rng() % 101) / 100);
      return r.replan();
    };
    for (int i = 0; i < 3; ++i) move();  // both plans get their size
    const int64_t before = allocations;
    for (int i = 0; i < 20; ++i) move();
    CHECK(allocations == before);
    const Placement& held = r.current();
    if (held.found) CHECK(held.value <= r.best_value() / 0.9 * (1 + 1e-9));
  }
}

template <typename Change>
void refuses(Change change) {
  std::mt19937_64 rng(3);
  Problem p = random_problem(rng, false);
  change(p);
  bool refused = false;
  try {
    Pipeline table(p);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void check_bad_input() {
  const double nan = std::nan("");
  refuses([&](Problem& p) { p.run[0] = nan; });
  refuses([&](Problem& p) { p.run[0] = -1; });
  refuses([&](Problem& p) { p.run.pop_back(); });
  refuses([&](Problem& p) { p.wire_bytes[0] = kInf; });
  refuses([&](Problem& p) { p.bandwidth[0] = -1; });
  refuses([&](Problem& p) { p.source = p.nodes; });
  refuses([&](Problem& p) { p.segments = 0; });
  refuses([&](Problem& p) { p.deadline = nan; });
  refuses([&](Problem& p) { p.max_width = 0; });
  const double score[] = {0.5, nan, kInf, -kInf}, cost[] = {1, 2, 3};
  const int8_t loss[] = {0, 1, -1, 0};
  ThresholdSearch search(score, loss, cost, 2, 2);
  for (int64_t budget : {0, 1, 5}) {
    const SearchResult r = search.search(search.quantile_grid(5), budget, true, 1000);
    CHECK(r.exact && r.value.loss <= budget);
  }
}

void check_search_fuzz() {
  std::mt19937_64 rng(4);
  for (int round = 0; round < 300; ++round) {
    const int rows = 1 + static_cast<int>(rng() % 200), exits = 1 + static_cast<int>(rng() % 5);
    std::vector<double> score(rows * exits), cost(exits + 1);
    std::vector<int8_t> loss(score.size());
    for (double& u : score) u = rng() % 20 == 0 ? std::nan("") : static_cast<double>(rng() % 50) / 50;
    for (int8_t& l : loss) l = static_cast<int8_t>(static_cast<int>(rng() % 3) - 1);
    for (double& c : cost) c = static_cast<double>(rng() % 100);
    ThresholdSearch search(score.data(), loss.data(), cost.data(), rows, exits);
    const auto grid = search.quantile_grid(4);
    const int64_t budget = static_cast<int64_t>(rng() % (rows + 1));
    const SearchResult r = search.search(grid, budget, true, 1 << 20);
    CHECK(r.value.loss <= budget);
    CHECK(r.value.cost <= r.grid_cost);
    for (int attempt = 0; attempt < 50; ++attempt) {
      std::vector<double> t(exits, kInf);
      for (int k = 0; k < exits; ++k)
        if (!grid[k].empty() && rng() % 4 != 0) t[k] = grid[k][rng() % grid[k].size()];
      const PolicyValue other = search.evaluate(t.data());
      if (other.loss <= budget) CHECK(r.grid_cost <= other.cost * (1 + 1e-9) + 1e-12);
    }
  }
}

}  // namespace

int main() {
  check_fuzz();
  check_replanning();
  check_bad_input();
  check_search_fuzz();
  return report("test_plan");
}
