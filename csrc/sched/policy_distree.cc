// DistrEE's on-line rule (reconstructed): stop once the joined feature stands still, or when the slowest student would be late.
#include <cmath>

#include "sched/policies.h"

namespace fastee::sched {
namespace {

constexpr double kQuantile95 = 1.6448536269514722;

class DistrEE final : public Judge {
 public:
  using Judge::Judge;

  // Delta < delta, and never at the first exit, where there is nothing to compare with.
  bool accepts(int64_t, int exit, const Sample& sample) const override {
    const double distance = std::isnan(sample.delta) ? -sample.confidence : sample.delta;
    return exit > 0 && model_.switched_on(exit) && distance >= 0 && distance < model_.config.params.delta[exit];
  }

  Choice place(const Query& q) override {
    const int s = q.segment, me = model_.me;
    if (!model_.config.params.students || !model_.hosts(s, me)) return here_or_soonest(q);
    // Every live node runs its own student of the segment and sends its feature here: the slowest one counts.
    double slowest = 0.0;
    for (int p = 0; p < model_.nodes; ++p) {
      if (!model_.hosts(s, p) || !(model_.return_ns(p) < kInf)) continue;
      const auto run = model_.segment_time(s, p, q.bucket);
      slowest = std::max(slowest, run.mean + model_.return_ns(p) + kQuantile95 * std::sqrt(run.var));
    }
    if (!(slowest + model_.delay_at(s, me, q.now, q.rounds) <= q.slack)) return {};
    return {Choice::kRun, me};
  }
};

}  // namespace

std::unique_ptr<Policy> make_distree(const Policy::Parts& parts) { return std::make_unique<DistrEE>(parts); }

}  // namespace fastee::sched
