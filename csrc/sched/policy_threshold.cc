// Go on here when that makes the deadline, else offload to where the next answer is soonest.
#include "sched/policies.h"

namespace fastee::sched {
namespace {

class Threshold final : public Policy {
 public:
  using Policy::Policy;
  Choice place(const Query& q) override { return here_or_soonest(q); }
};

}  // namespace

std::unique_ptr<Policy> make_threshold(const Policy::Parts& parts) { return std::make_unique<Threshold>(parts); }

}  // namespace fastee::sched
