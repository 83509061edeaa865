// The spatial planner without Python: hand-made numbers, plans refused, and a fuzz of nets, links and searches (for the sanitizers).
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "plan/spatial.h"
#include "plan/spatial_search.h"

using namespace fastee::plan;

namespace {

SpatialNet chain(int layers, int height) {
  SpatialNet net{{}, height, 32};
  for (int i = 0; i < layers; ++i) net.layers.push_back({3, 1, 1, 1, height, height, 64, 100, {i - 1}});
  return net;
}

// One millisecond per row and layer on every provider.
SpatialModel model_of(SpatialNet net, int providers) {
  std::vector<double> times;
  for (int d = 0; d < providers; ++d)
    for (const SpatialLayer& l : net.layers)
      for (int r = 0; r <= l.out_h; ++r) times.push_back(r * 1e-3);
  return SpatialModel(std::move(net), times, std::vector<double>(providers, 0.0));
}

void recursion_by_hand() {
  SpatialModel m = model_of(chain(2, 8), 2);
  m.set_links({{512e3, 512e3}, {1, 1}, kNever, 1e-3, false});
  CHECK(std::fabs(m.latency({0, 1, 2}, {0, 4, 8, 0, 4, 8}) - 16.5e-3) < 1e-12);
  CHECK(std::fabs(m.latency({0, 2}, {0, 4, 8}) - 17e-3) < 1e-12);
  m.set_links({{512e3, 0}, {1, 1}, kNever, 0, false});
  CHECK(m.latency({0, 2}, {0, 4, 8}) == kNever);
  CHECK(m.latency({0, 2}, {0, 8, 8}) < kNever);
}

void refuses_what_is_no_plan() {
  SpatialModel m = model_of(chain(2, 8), 2);
  const std::pair<std::vector<int>, std::vector<int>> bad[] = {
      {{0, 2}, {0, 9, 8}}, {{0, 2}, {0, 4, 7}}, {{0, 2}, {0, 4}}, {{0, 1}, {0, 4, 8}}, {{0, 2, 1}, {0, 4, 8, 0, 4, 8}}, {{}, {}}, {{0, 5}, {0, 4, 8}}};
  for (const auto& [bounds, cuts] : bad) {
    bool refused = false;
    try {
      m.latency(bounds, cuts);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

void cuts_stand_where_one_tensor_crosses() {
  SpatialNet net = chain(4, 8);
  net.layers[3].inputs = {2, 0};  // a skip around layers 1 and 2
  SpatialModel m = model_of(std::move(net), 2);
  CHECK((m.cut_points() == std::vector<int>{0, 1, 4}));
}

void fuzz() {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int trial = 0; trial < 150; ++trial) {
    SpatialNet net{{}, 4 + below(20), 16};
    int h = net.input_h;
    for (int i = 0, count = 1 + below(6); i < count; ++i) {
      const int k = 1 + below(3), s = 1 + below(2), p = below(3), q = 1 + below(2), out = (h + 2 * p - q * (k - 1) - 1) / s + 1;
      if (h + 2 * p < q * (k - 1) + 1 || out < 1) break;
      net.layers.push_back({k, s, p, q, h, out, 1.0 + below(200), 1.0 + below(1000), {i - 1}});
      h = out;
    }
    if (net.layers.empty()) continue;
    const int n = 1 + below(4);
    SpatialModel m = model_of(net, n);
    SpatialLinks links;
    for (int d = 0; d < n; ++d) {
      links.rates.push_back(d > 0 && below(5) == 0 ? 0.0 : 1e4 * (1 + below(1000)));
      links.up.push_back(d == 0 || below(6) != 0);
    }
    links.contention = below(2) == 0;
    m.set_links(links);
    const int layers = m.layers();
    std::vector<int> all(n + 1, h);
    all[0] = 0;
    SpatialSearch search(m, {{{0, layers}, all, kNever}}, trial, true, 20'000);
    search.run(60'000);
    const SpatialPlan& best = search.best();
    CHECK(best.latency == m.latency(best.bounds, best.cuts));
    CHECK(best.latency <= m.latency({0, layers}, all));
    const auto exact = spatial_exact(m, kNever, 3'000'000);
    if (exact) {
      CHECK(exact->latency <= best.latency);
      CHECK(exact->latency == m.latency(exact->bounds, exact->cuts));
    }
    std::vector<double> vectors;
    for (int r = 0; r < 5; ++r)
      for (int d = 1; d < n; ++d) vectors.push_back(static_cast<double>(d) / n);
    if (n > 1) CHECK(m.lcpss(vectors.data(), 5, 0.75).back() == layers);
  }
}

}  // namespace

int main() {
  recursion_by_hand();
  refuses_what_is_no_plan();
  cuts_stand_where_one_tensor_crosses();
  fuzz();
  return report("test_spatial");
}
