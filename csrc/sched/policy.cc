#include "sched/policy.h"

namespace fastee::sched {
namespace {

constexpr Policy kPolicies[] = {{"deadline", place_deadline}, {"threshold", place_threshold}};

}  // namespace

const Policy* find_policy(std::string_view name) {
  for (const Policy& policy : kPolicies)
    if (policy.name == name) return &policy;
  return nullptr;
}

std::string policy_names() {
  std::string names;
  for (const Policy& policy : kPolicies) names.append(names.empty() ? "" : ", ").append(policy.name);
  return names;
}

}  // namespace fastee::sched
