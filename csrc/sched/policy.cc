#include "sched/policy.h"

#include "sched/policies.h"

namespace fastee::sched {
namespace {

using Make = std::unique_ptr<Policy> (*)(const Policy::Parts&);
constexpr std::pair<std::string_view, Make> kPolicies[] = {
    {"deadline", make_deadline}, {"threshold", make_threshold}, {"patience", make_patience}, {"distree", make_distree},
    {"mdi_exit", make_mdi_exit}, {"dimee", make_dimee},         {"splitee", make_splitee},   {"jei_gate", make_jei_gate},
    {"daisy", make_daisy},       {"custom", make_custom},
};

Make find(std::string_view name) {
  for (const auto& [known, make] : kPolicies)
    if (known == name) return make;
  return nullptr;
}

}  // namespace

bool known_policy(std::string_view name) { return find(name) != nullptr; }

std::string policy_names() {
  std::string names;
  for (const auto& [name, make] : kPolicies) names.append(names.empty() ? "" : ", ").append(name);
  return names;
}

std::unique_ptr<Policy> make_policy(std::string_view name, const Policy::Parts& parts) { return find(name)(parts); }

Choice Policy::here_or_soonest(const Query& q) const {
  if (fits(q, model_.me)) return {Choice::kRun, model_.me};
  Choice choice;
  double best = kInf;
  for (int p = 0; p < model_.nodes; ++p) {
    if (p == model_.me) continue;
    const double t = time_at(q, p);
    if (t <= q.slack && t < best) {
      best = t;
      choice = {Choice::kRun, p};
    }
  }
  return choice;
}

Choice Policy::wait_while_possible(const Query& q) const {
  double best = kInf;
  for (int p = 0; p < model_.nodes; ++p) best = std::min(best, time_at(q, p));
  return wait_for(q, best);
}

Choice Policy::wait_for(const Query& q, double time) const {
  if (!(time <= q.slack && time < kInf)) return {};
  return {Choice::kWait, model_.me, q.slack == kInf ? kNever : add_saturated(q.now, static_cast<int64_t>(std::min(q.slack - time, 9e18)))};
}

// Everybody who waits is asked again, once in a walk.
int64_t Policy::poll(int64_t now, Choice* choice) {
  static constexpr Sample kNothing;
  for (int64_t slot = room_.step(); slot >= 0; slot = room_.step()) {
    *choice = place(query_of(slot, now, kNothing));
    if (choice->kind != Choice::kWait) return slot;
  }
  return -1;
}

}  // namespace fastee::sched
