// JEI-DNN (Regol et al. 2024) in its one-accumulator form: exit m when g >= (1 - S) / 2, else S += g.
#include "sched/policies.h"

namespace fastee::sched {
namespace {

class JeiGate final : public Judge {
 public:
  using Judge::Judge;

  bool accepts(int64_t slot, int exit, const Sample& sample) const override {
    const double g = gate(exit, sample);
    return g >= (1.0 - tasks_[slot].sum) / 2.0;
  }

  void learn(int64_t slot, int exit, const Sample& sample, bool) override {
    const double g = gate(exit, sample);
    if (g >= 0) tasks_[slot].sum = tasks_[slot].sum + g;
  }

  Choice place(const Query& q) override { return here_or_soonest(q); }

 private:
  // NaN (neither an exit nor a share of S) where the exit is off or the value is no probability.
  double gate(int exit, const Sample& sample) const {
    const double g = sample.gate == sample.gate ? sample.gate : sample.confidence;
    return model_.switched_on(exit) && g >= 0 && g <= 1 ? g : kNone;
  }
};

}  // namespace

std::unique_ptr<Policy> make_jei_gate(const Policy::Parts& parts) { return std::make_unique<JeiGate>(parts); }

}  // namespace fastee::sched
