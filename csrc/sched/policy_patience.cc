// PABEE (Zhou et al. 2020): exit once the same label has been repeated `patience` times in a row.
#include "sched/policies.h"

namespace fastee::sched {
namespace {

class Patience final : public Judge {
 public:
  using Judge::Judge;

  bool accepts(int64_t slot, int exit, const Sample& sample) const override {
    return model_.switched_on(exit) && run(slot, sample) >= model_.config.params.patience;
  }

  void learn(int64_t slot, int, const Sample& sample, bool) override {
    tasks_[slot].run = run(slot, sample);
    tasks_[slot].label = sample.label;
  }

  Choice place(const Query& q) override { return here_or_soonest(q); }

 private:
  // 0 at the first exit and wherever the label changes; no label (-1) repeats nothing.
  int32_t run(int64_t slot, const Sample& sample) const {
    return sample.label >= 0 && sample.label == tasks_[slot].label ? tasks_[slot].run + 1 : 0;
  }
};

}  // namespace

std::unique_ptr<Policy> make_patience(const Policy::Parts& parts) { return std::make_unique<Patience>(parts); }

}  // namespace fastee::sched
