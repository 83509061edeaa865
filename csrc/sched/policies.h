// The makers of the policies that policy.cc lists; each lives in policy_<name>.cc.
#pragma once
#include <memory>

#include "sched/policy.h"

namespace fastee::sched {

std::unique_ptr<Policy> make_deadline(const Policy::Parts& parts);
std::unique_ptr<Policy> make_threshold(const Policy::Parts& parts);
std::unique_ptr<Policy> make_patience(const Policy::Parts& parts);
std::unique_ptr<Policy> make_distree(const Policy::Parts& parts);
std::unique_ptr<Policy> make_mdi_exit(const Policy::Parts& parts);
std::unique_ptr<Policy> make_dimee(const Policy::Parts& parts);
std::unique_ptr<Policy> make_splitee(const Policy::Parts& parts);
std::unique_ptr<Policy> make_jei_gate(const Policy::Parts& parts);
std::unique_ptr<Policy> make_daisy(const Policy::Parts& parts);
std::unique_ptr<Policy> make_custom(const Policy::Parts& parts);

}  // namespace fastee::sched
