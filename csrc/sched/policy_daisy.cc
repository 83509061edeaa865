// DAISY (Lin et al. 2024): exit at the first branch with low enough mean entropy, asked only inside a range of exits that was
// learned in training; the last of the range always exits. The score is minus the mean entropy.
#include <cmath>

#include "sched/policies.h"

namespace fastee::sched {
namespace {

class Daisy final : public Judge {
 public:
  explicit Daisy(const Parts& parts)
      : Judge(parts), p_(parts.model.config.params), counts_(p_.counts.begin(), p_.counts.end()), in_range_(parts.model.exits + 1, p_.train) {
    if (!p_.train) find_range();
  }

  bool accepts(int64_t, int exit, const Sample& sample) const override {
    if (!model_.switched_on(exit) || !in_range_[exit]) return false;
    if (exit == last_) return true;
    const double entropy = -(shared_ ? shared_value_ : sample.confidence);
    return entropy >= 0 && entropy <= p_.u_threshold;
  }

  Choice place(const Query& q) override { return here_or_soonest(q); }

  void ended(int64_t, int exit, const Sample*, bool forced) override {
    if (!p_.train || forced) return;
    if (!shared_)
      ++counts_[exit];
    else if (!counted_)
      counted_ = true, ++counts_[exit];
  }

  // batch_mode "all": the whole batch has one entropy, the mean over its rows, and counts once.
  void batch_begins(const double* confidences, int64_t rows) override {
    if (!p_.whole_batch || rows == 0) return;
    double sum = 0.0;
    for (int64_t i = 0; i < rows; ++i) sum += confidences[i];
    shared_ = true;
    counted_ = false;
    shared_value_ = sum / static_cast<double>(rows);
  }
  void batch_ends() override { shared_ = false; }

  State state() const override {
    return {{"daisy_counts", {counts_.begin(), counts_.end()}}, {"daisy_range", {in_range_.begin(), in_range_.end()}}};
  }

 private:
  void find_range() {
    int64_t total = 0, weighted = 0;
    int low = -1, high = -1;
    for (size_t e = 0; e < counts_.size(); ++e) {
      total += counts_[e];
      weighted += counts_[e] * static_cast<int64_t>(e);
      if (counts_[e] > 0) {
        if (low < 0) low = static_cast<int>(e);
        high = static_cast<int>(e);
      }
    }
    if (total == 0) return;  // no training statistics: full depth
    const double mean = static_cast<double>(weighted) / static_cast<double>(total);
    for (size_t e = 0; e < counts_.size(); ++e) {
      const double at = static_cast<double>(e);
      if (p_.range == 0) in_range_[e] = at == std::floor(mean) || at == std::ceil(mean);
      if (p_.range == 1) in_range_[e] = static_cast<int>(e) >= low && static_cast<int>(e) <= high;
      if (p_.range == 2) in_range_[e] = static_cast<double>(counts_[e]) / static_cast<double>(total) > p_.inf_threshold;
      if (in_range_[e]) last_ = static_cast<int>(e);
    }
  }

  const Params& p_;
  std::vector<int64_t> counts_;    // [K + 1] training exits
  std::vector<uint8_t> in_range_;  // [K + 1]
  int last_ = -1;
  bool shared_ = false, counted_ = false;
  double shared_value_ = 0.0;
};

}  // namespace

std::unique_ptr<Policy> make_daisy(const Policy::Parts& parts) { return std::make_unique<Daisy>(parts); }

}  // namespace fastee::sched
