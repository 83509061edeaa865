#include "sched/scheduler.h"

#include <algorithm>

namespace fastee::sched {
namespace {

constexpr int64_t kRebuildEvery = 10'000'000;  // ns between two steps of Model::rebuild_step
constexpr Sample kNothing;
constexpr NodeRecord kUnread{};  // what of the node takes most of a rule's own cost to fill in: five divisions

}  // namespace

Scheduler::Scheduler(const Config& config)
    : model_(config),
      tasks_(config.max_tasks),
      room_(tasks_),
      policy_(make_policy(config.policy, {model_, tasks_, room_, idle_})),
      judge_(policy_->judge()),
      per_exit_(config.segments, 0) {}

int64_t Scheduler::clock(int64_t now) {
  if (now < now_)
    ++model_.counters.clock_backwards;
  else
    now_ = now;
  return now_;
}

int64_t Scheduler::admit(int64_t now, int64_t deadline, int segment, int tenant) {
  now = clock(now);
  if (segment < 0 || segment >= model_.segments || tenant < 0 || tenant >= model_.num_classes()) {
    ++model_.counters.invalid;
    return -1;
  }
  const int64_t usual = model_.tenant_class(tenant).deadline;
  if (deadline == kDefaultDeadline) deadline = usual == kNoDeadline ? kNoDeadline : add_saturated(now, usual);
  if (deadline <= now) {
    ++model_.counters.refused_late;
    return -1;
  }
  if (tasks_.full()) {
    ++model_.counters.refused_full;
    return -1;
  }
  if (!policy_->admits()) {
    ++model_.counters.refused_queue;
    return -1;
  }
  ++model_.counters.admitted;
  const int64_t task = tasks_.take(deadline, segment, tenant);
  policy_->admitted(task & 0xFFFFFFFF);
  return task;
}

bool Scheduler::finish(int64_t task, double confidence) {
  const int64_t slot = tasks_.find(task);
  if (slot < 0) {
    ++model_.counters.stale;
    return false;
  }
  ++model_.counters.finished;
  if (room_.holds(slot)) room_.remove(slot);
  policy_->finished(slot, confidence);
  tasks_.release(slot);
  return true;
}

Decision Scheduler::decide(int64_t task, int exit, double confidence, int64_t now) {
  Sample sample;
  sample.confidence = confidence;
  return decide(task, exit, sample, now);
}

Decision Scheduler::decide(int64_t task, int exit, const Sample& sample, int64_t now) {
  return decide_row(task, exit, sample, clock(now), 0, 0.0);
}

void Scheduler::decide_batch(const int64_t* tasks, int exit, const double* confidences, int64_t rows, int64_t now, int64_t* codes) {
  decide_batch(tasks, exit, confidences, nullptr, rows, now, codes);
}

void Scheduler::decide_batch(const int64_t* tasks, int exit, const double* confidences, const Sample* samples, int64_t rows, int64_t now,
                             int64_t* codes) {
  now = clock(now);
  Sample plain;
  const auto sample = [&](int64_t i) -> const Sample& {
    plain.confidence = confidences[i];
    return samples != nullptr ? samples[i] : plain;
  };
  policy_->batch_begins(confidences, rows);
  int64_t staying = rows;
  const bool asks = exit >= 0 && exit < model_.exits, own = model_.config.rule != nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t slot = tasks_.find(tasks[i]);
    if (slot < 0) continue;
    take_back(tasks_[slot]);  // of all rows before the first is placed, or it would queue behind messages that are not under way
    if (asks) staying -= own ? user_accepts(policy_->query_of(slot, now, sample(i)), exit, sample(i)) : accepts(slot, exit, sample(i));
  }
  const int bucket = model_.bucket_of(staying);
  const double rounds = staying > 0 ? static_cast<double>((staying - 1) / model_.config.batch_sizes.back()) : 0.0;
  for (int64_t i = 0; i < rows; ++i) codes[i] = decide_row(tasks[i], exit, sample(i), now, bucket, rounds).code();
  policy_->batch_ends();
}

// An exit that is switched off and a row without a score never ask the user's rule.
bool Scheduler::user_accepts(const Query& q, int exit, const Sample& sample) const {
  const Config& c = model_.config;
  if (!model_.switched_on(exit) || sample.confidence != sample.confidence) return false;
  const StatsRecord stats = model_.stats_record(exit, sample);
  const TaskRecord task = task_record(model_, tasks_, q.slot, q.slack, q.weight);
  if (!c.rule_reads_node) return c.rule(&stats, &task, &kUnread) != 0;
  const NodeRecord node = model_.node_record(0, exit + 1, model_.me, q.now, 0.0, q.z, q.slack, idle_);
  return c.rule(&stats, &task, &node) != 0;
}

// The order is: validity, exit rule, deadline, placement.
Decision Scheduler::decide_row(int64_t task, int exit, const Sample& sample, int64_t now, int bucket, double rounds) {
  Counters& count = model_.counters;
  const int64_t slot = tasks_.find(task);
  if (slot < 0) {
    ++count.stale;
    return {};
  }
  Task& t = tasks_[slot];
  if (room_.holds(slot)) room_.remove(slot);
  take_back(t);
  if (exit < -1 || exit > model_.exits) {
    ++count.invalid;
    exit = -1;
  }
  if (exit >= 0) {
    t.segment = static_cast<int16_t>(exit + 1);
    t.best = std::max(t.best, static_cast<int16_t>(exit));
  }
  Query query = policy_->query_of(slot, now, sample);
  if (query.segment > model_.exits) return end(slot, query.slack, false, &sample);
  if (exit >= 0) {
    const bool accepted = model_.config.rule != nullptr ? user_accepts(query, exit, sample) : accepts(slot, exit, sample);
    if (judge_ != nullptr) judge_->learn(slot, exit, sample, accepted);
    model_.learn_exit(exit, accepted);
    if (accepted) return end(slot, query.slack, false, &sample);
  }
  query.exit = exit;
  query.bucket = bucket;
  query.rounds = rounds;
  Choice choice = policy_->place(query);
  if (choice.kind == Choice::kWait && choice.until <= now) choice = policy_->usual(query);  // or poll() would give it back at once, for ever
  return act(slot, choice, query.slack, now);
}

Decision Scheduler::act(int64_t slot, const Choice& choice, double slack, int64_t now) {
  Counters& count = model_.counters;
  switch (choice.kind) {
    case Choice::kExit:
      return end(slot, slack, false, nullptr);
    case Choice::kWait: {
      ++count.waited;
      room_.add(slot, choice.until);
      const int64_t left = choice.until == kNever ? kInt64Max : subtract_saturated(choice.until, now);
      return {Action::kWait, model_.me, -1, false, std::clamp<int64_t>(left / 1000, 0, kMaxWaitUs)};
    }
    case Choice::kNothingFits:
      if (tasks_[slot].best >= 0) return end(slot, slack, true, nullptr);
      ++count.rejected;
      tasks_.release(slot);
      return {};
    case Choice::kRun:
      break;
  }
  if (choice.node == model_.me) {
    ++count.continued;
    return {Action::kContinue, choice.node, -1, false};
  }
  ++count.offloaded;
  Task& task = tasks_[slot];
  task.sent_to = static_cast<int16_t>(choice.node);
  task.until = model_.sent(task.segment, choice.node, now);
  return {Action::kOffload, choice.node, model_.codec(task.segment, choice.node), false};
}

Decision Scheduler::end(int64_t slot, double slack, bool forced, const Sample* sample) {
  ++model_.counters.exits;
  model_.counters.forced += forced;
  model_.counters.late += slack < model_.return_ns(model_.me);
  ++per_exit_[tasks_[slot].best];
  policy_->ended(slot, tasks_[slot].best, sample, forced);
  tasks_.release(slot);
  return {Action::kExit, model_.me, -1, forced};
}

bool Scheduler::poll(int64_t now, int64_t* task, Decision* decision) {
  now = clock(now);
  Choice choice;
  int64_t slot = room_.expired(now);
  if (slot >= 0)  // the last moment at which it could be begun in time
    choice = policy_->usual(policy_->query_of(slot, now, kNothing));
  else
    slot = policy_->poll(now, &choice);
  if (slot < 0) return false;
  room_.remove(slot);
  *task = tasks_.handle(slot);
  *decision = act(slot, choice, policy_->query_of(slot, now, kNothing).slack, now);
  if (decision->action == Action::kContinue) idle_ = false;
  return true;
}

int64_t Scheduler::next_tick() const {
  return std::min({policy_->next_tick(), room_.soonest(), model_.stale() ? std::max(next_rebuild_, now_) : kNever});
}

void Scheduler::tick(int64_t now) {
  now = clock(now);
  policy_->tick(now);
  if (model_.stale() && now >= next_rebuild_) {
    model_.rebuild_step();
    next_rebuild_ = add_saturated(now, kRebuildEvery);
  }
}

}  // namespace fastee::sched
