// SplitEE (Bajpai et al.): a UCB1 bandit chooses per sample the exit at which to look; below alpha there, the cloud finishes.
#include <cmath>

#include "sched/policies.h"

namespace fastee::sched {
namespace {

class SplitEE final : public Judge {
 public:
  explicit SplitEE(const Parts& parts)
      : Judge(parts),
        p_(parts.model.config.params),
        arms_(parts.model.exits + 1),
        plays_(arms_, 0),
        rewarded_(arms_, 0),
        sum_(arms_, 0.0),
        seen_(p_.side_information ? static_cast<size_t>(parts.tasks.capacity()) * arms_ : 0) {}

  // The source plays an arm per sample; the cloud, and whoever gets a sample half done, runs to the end.
  void admitted(int64_t slot) override {
    if (tasks_[slot].segment != 0 || model_.me == p_.cloud) return;
    int arm = 0;
    for (int i = 0; i < arms_; ++i) {
      if (plays_[i] == 0) {
        arm = i;
        break;
      }
      if (bound(i) > bound(arm)) arm = i;
    }
    ++plays_[arm];
    ++total_;
    tasks_[slot].arm = arm;
    if (p_.side_information)
      for (int i = 0; i < arms_; ++i) seen_[slot * arms_ + i] = kNone;
  }

  bool accepts(int64_t slot, int exit, const Sample& sample) const override {
    return exit == tasks_[slot].arm && model_.switched_on(exit) && sure(sample.confidence);
  }

  void learn(int64_t slot, int exit, const Sample& sample, bool) override {
    if (p_.side_information && tasks_[slot].arm >= 0) seen_[slot * arms_ + exit] = sample.confidence;
  }

  Choice place(const Query& q) override {
    const int arm = tasks_[q.slot].arm, cloud = static_cast<int>(p_.cloud);
    if (arm >= 0 && q.segment > arm && fits(q, cloud)) return {Choice::kRun, cloud};
    return here_or_soonest(q);
  }

  void ended(int64_t slot, int exit, const Sample* sample, bool forced) override {
    if (!forced && sample != nullptr) reward(slot, exit, sample->confidence);
  }
  void finished(int64_t slot, double confidence) override { reward(slot, model_.exits, confidence); }

  State state() const override {
    return {{"splitee_plays", {plays_.begin(), plays_.end()}}, {"splitee_rewarded", {rewarded_.begin(), rewarded_.end()}}, {"splitee_reward", sum_}};
  }

 private:
  bool sure(double confidence) const { return static_cast<float>(confidence) >= static_cast<float>(p_.alpha); }
  double bound(int i) const {
    const double mean = rewarded_[i] > 0 ? sum_[i] / static_cast<double>(rewarded_[i]) : 0.0;
    return mean + p_.explore * std::sqrt(std::log(static_cast<double>(total_ + 1)) / static_cast<double>(plays_[i]));
  }

  // The sample left at `exit` with this confidence; layers are counted from 1, one per exit.
  void reward(int64_t slot, int exit, double confidence) {
    const int arm = tasks_[slot].arm;
    if (arm < 0 || !std::isfinite(confidence)) return;
    give(arm, exit, confidence, confidence);
    if (!p_.side_information) return;
    for (int i = 0; i < arm; ++i) {
      const double own = seen_[slot * arms_ + i];
      if (std::isfinite(own) && (sure(own) || exit == arms_ - 1)) give(i, sure(own) ? i : exit, own, confidence);
    }
  }
  // `left`: the exit whose answer counted for this arm, itself or the end of the network.
  void give(int arm, int left, double own, double last) {
    const double layers = p_.layer_cost * static_cast<double>(arm + 1);
    const double r = left == arm ? own - layers : last - p_.offload_cost - layers;
    ++rewarded_[arm];
    sum_[arm] = sum_[arm] + r;
  }

  const Params& p_;
  const int arms_;
  int64_t total_ = 0;
  std::vector<int64_t> plays_, rewarded_;  // [K + 1]
  std::vector<double> sum_;                // [K + 1] of the rewards
  std::vector<double> seen_;               // [max_tasks, K + 1] scores of the exits passed, for side information
};

}  // namespace

std::unique_ptr<Policy> make_splitee(const Policy::Parts& parts) { return std::make_unique<SplitEE>(parts); }

}  // namespace fastee::sched
