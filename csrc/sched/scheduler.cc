#include "sched/scheduler.h"

#include <algorithm>

namespace fastee::sched {

Scheduler::Scheduler(const Config& config)
    : model_(config), policy_(find_policy(config.policy)), tasks_(config.max_tasks), per_exit_(config.segments, 0) {}

int64_t Scheduler::clock(int64_t now) {
  if (now < now_)
    ++model_.counters.clock_backwards;
  else
    now_ = now;
  return now_;
}

int64_t Scheduler::admit(int64_t now, int64_t deadline, int segment) {
  now = clock(now);
  if (deadline == kDefaultDeadline)
    deadline = model_.config.deadline == kNoDeadline ? kNoDeadline : add_saturated(now, model_.config.deadline);
  if (segment < 0 || segment >= model_.segments) {
    ++model_.counters.invalid;
    return -1;
  }
  if (deadline <= now) {
    ++model_.counters.refused_late;
    return -1;
  }
  if (tasks_.full()) {
    ++model_.counters.refused_full;
    return -1;
  }
  ++model_.counters.admitted;
  return tasks_.take(deadline, segment);
}

bool Scheduler::finish(int64_t task) {
  const int64_t slot = tasks_.find(task);
  if (slot < 0) {
    ++model_.counters.stale;
    return false;
  }
  ++model_.counters.finished;
  tasks_.release(slot);
  return true;
}

Decision Scheduler::decide(int64_t task, int exit, double confidence, int64_t now) {
  return decide_row(task, exit, confidence, clock(now), 0, 0.0);
}

Decision Scheduler::decide(int64_t task, int exit, const Sample& sample, int64_t now) { return decide(task, exit, sample.confidence, now); }

bool Scheduler::poll(int64_t now, int64_t* task, Decision* decision) {
  clock(now);
  *task = -1;
  *decision = {};
  return false;
}

void Scheduler::tick(int64_t now) { clock(now); }

void Scheduler::decide_batch(const int64_t* tasks, int exit, const double* confidences, int64_t rows, int64_t now, int64_t* codes) {
  now = clock(now);
  int64_t staying = 0;
  for (int64_t i = 0; i < rows; ++i) staying += !model_.accepts(exit, confidences[i]);
  const int bucket = model_.bucket_of(staying);
  const double rounds = staying > 0 ? static_cast<double>((staying - 1) / model_.config.batch_sizes.back()) : 0.0;
  for (int64_t i = 0; i < rows; ++i) codes[i] = decide_row(tasks[i], exit, confidences[i], now, bucket, rounds).code();
}

// The order is: validity, exit rule, deadline, placement.
Decision Scheduler::decide_row(int64_t task, int exit, double confidence, int64_t now, int bucket, double rounds) {
  Counters& count = model_.counters;
  const int64_t slot = tasks_.find(task);
  if (slot < 0) {
    ++count.stale;
    return {};
  }
  if (exit < -1 || exit > model_.exits) {
    ++count.invalid;
    exit = -1;
  }
  if (exit >= 0) {
    tasks_.segment[slot] = exit + 1;
    tasks_.best[slot] = std::max(tasks_.best[slot], exit);
  }
  const int segment = tasks_.segment[slot];
  const int64_t deadline = tasks_.deadline[slot];
  const double slack = deadline == kNoDeadline ? kInf : static_cast<double>(subtract_saturated(deadline, now));
  if (segment > model_.exits) return end(slot, slack, false);
  if (exit >= 0) {
    const bool accepted = model_.accepts(exit, confidence);
    model_.learn_exit(exit, accepted);
    if (accepted) return end(slot, slack, false);
  }
  const Choice choice = policy_->place(model_, {segment, exit, confidence, slack, now, bucket, rounds});
  switch (choice.kind) {
    case Choice::kExit:
      return end(slot, slack, false);
    case Choice::kRun:
      break;
    case Choice::kNothingFits:
      if (tasks_.best[slot] >= 0) return end(slot, slack, true);
      ++count.rejected;
      tasks_.release(slot);
      return {};
  }
  if (choice.node == model_.me) {
    ++count.continued;
    return {Action::kContinue, choice.node, -1, false};
  }
  ++count.offloaded;
  model_.sent(segment, choice.node, now);
  return {Action::kOffload, choice.node, model_.codec(segment, choice.node), false};
}

Decision Scheduler::end(int64_t slot, double slack, bool forced) {
  ++model_.counters.exits;
  model_.counters.forced += forced;
  model_.counters.late += slack < model_.return_ns();
  ++per_exit_[tasks_.best[slot]];
  tasks_.release(slot);
  return {Action::kExit, model_.me, -1, forced};
}

}  // namespace fastee::sched
