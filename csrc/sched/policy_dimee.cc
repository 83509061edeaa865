// DIMEE (routing reconstructed): easy samples start on the mobile, moderate ones on the edge, hard ones on the cloud; one
// confidence threshold at the two cuts.
#include "sched/policies.h"

namespace fastee::sched {
namespace {

enum Pool { kEasy = 0, kModerate = 1, kHard = 2 };

class Dimee final : public Judge {
 public:
  explicit Dimee(const Parts& parts) : Judge(parts), p_(parts.model.config.params), my_tier_(tier_of_node(parts.model.me)) {}

  // Only at the cut where the sample's tier ends, and only on a tier that this cut belongs to.
  bool accepts(int64_t slot, int exit, const Sample& sample) const override {
    const int pool = pool_of(slot, sample);
    const bool here = (exit == p_.cuts[0] && pool == kEasy && my_tier_ <= 0) || (exit == p_.cuts[1] && pool != kHard && my_tier_ <= 1);
    return here && model_.switched_on(exit) && static_cast<float>(sample.confidence) >= static_cast<float>(p_.alpha);
  }

  void learn(int64_t slot, int, const Sample& sample, bool) override { tasks_[slot].pool = pool_of(slot, sample); }

  Choice place(const Query& q) override {
    const int pool = tasks_[q.slot].pool = pool_of(q.slot, *q.sample);
    int tier = 2;
    if (pool == kEasy && q.segment <= p_.cuts[0])
      tier = 0;
    else if (pool != kHard && q.segment <= p_.cuts[1])
      tier = 1;
    // Never back to a smaller tier; a tier that cannot be reached in time is skipped; at last on here.
    for (tier = std::max(tier, my_tier_); tier < 3; ++tier)
      if (fits(q, static_cast<int>(p_.tiers[tier]))) return {Choice::kRun, static_cast<int>(p_.tiers[tier])};
    if (fits(q, model_.me)) return {Choice::kRun, model_.me};
    return {};
  }

 private:
  int tier_of_node(int node) const {
    for (int t = 0; t < 3; ++t)
      if (p_.tiers[t] == node) return t;
    return -1;  // outside the three: before all of them
  }
  int pool_of(int64_t slot, const Sample& sample) const {
    const int pool = sample.pool >= 0 ? sample.pool : tasks_[slot].pool;
    return pool < 0 ? kEasy : pool > kHard ? kHard : pool;
  }

  const Params& p_;
  const int my_tier_;
};

}  // namespace

std::unique_ptr<Policy> make_dimee(const Policy::Parts& parts) { return std::make_unique<Dimee>(parts); }

}  // namespace fastee::sched
