// The user's own policy: a C function over records. What it may not choose is replaced by what `threshold` does.
#include "sched/policies.h"
#include "sched/records.h"

namespace fastee::sched {
namespace {

class Custom final : public Policy {
 public:
  explicit Custom(const Parts& parts) : Policy(parts), nodes_(parts.model.nodes) {}

  Choice place(const Query& q) override {
    const Choice usual = here_or_soonest(q);
    if (usual.kind != Choice::kRun) return usual;  // no place makes the deadline
    for (int p = 0; p < model_.nodes; ++p) nodes_[p] = model_.node_record(q.bucket, q.segment, p, q.now, q.rounds, q.z, q.slack, idle_);
    const StatsRecord stats = model_.stats_record(q.exit, *q.sample);
    const TaskRecord task = task_record(model_, tasks_, q.slot, q.slack, q.weight);
    const int64_t action = model_.config.custom(&stats, &task, nodes_.data());
    if (action == kExitAction && tasks_[q.slot].best >= 0) return {Choice::kExit, model_.me};
    if (action == kRejectAction && tasks_[q.slot].best < 0) return {};
    if (action == kWaitAction) return wait_while_possible(q);
    const int64_t p = action - kRunAction;
    if (p < 0 || p >= model_.nodes || !nodes_[p].fits) {
      ++model_.counters.invalid;
      return usual;
    }
    return {Choice::kRun, static_cast<int>(p)};
  }

 private:
  std::vector<NodeRecord> nodes_;
};

}  // namespace

std::unique_ptr<Policy> make_custom(const Policy::Parts& parts) { return std::make_unique<Custom>(parts); }

}  // namespace fastee::sched
