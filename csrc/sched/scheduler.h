// One node's decisions: exit, continue here, offload, or reject. Pure numbers: the clock is handed in, nothing is locked, and
// no method allocates after construction. One thread at a time.
#pragma once
#include <cstdint>
#include <vector>

#include "sched/model.h"
#include "sched/policy.h"
#include "sched/tasks.h"
#include "sched/types.h"

namespace fastee::sched {

class Scheduler {
 public:
  explicit Scheduler(const Config& config);  // throws std::invalid_argument

  static constexpr int64_t kDefaultDeadline = kInt64Min;  // now + the deadline of the class

  // Handle, or -1 when the deadline is past, the table or the policy's queue is full or the segment or class does not exist.
  int64_t admit(int64_t now, int64_t deadline = kDefaultDeadline, int segment = 0, int tenant = 0);
  Decision decide(int64_t task, int exit, double confidence, int64_t now);
  Decision decide(int64_t task, int exit, const Sample& sample, int64_t now);
  void decide_batch(const int64_t* tasks, int exit, const double* confidences, int64_t rows, int64_t now, int64_t* codes);
  // `samples` may be null; their confidences are those of `confidences`.
  void decide_batch(const int64_t* tasks, int exit, const double* confidences, const Sample* samples, int64_t rows, int64_t now, int64_t* codes);
  // `confidence`: of the answer that came from elsewhere, where known.
  bool finish(int64_t task, double confidence = kNone);

  // A decision for a task that was told to WAIT, if one is due. The host calls it after every event, again and again until false.
  bool poll(int64_t now, int64_t* task, Decision* decision);
  // Periodic adaptation: the host calls tick() once the clock has reached next_tick(); kNever when there is nothing to do.
  int64_t next_tick() const;
  void tick(int64_t now);
  // Seconds the source must leave between two arrivals; 0 = as they come.
  double admit_interval() const { return policy_->admit_interval(); }
  // Whether this node's compute stands still.
  void set_idle(bool idle) { idle_ = idle; }

  // Arguments out of range are counted as ignored.
  void observe(int segment, int node, int64_t batch, int64_t duration) {
    if (model_.observe(segment, node, batch, duration)) policy_->observed(node, batch, duration);
  }
  // `now`: when a message from here was there, where the host knows; it sets the clock of what has been sent (Model::Medium).
  void observe_link(int src, int dst, int64_t nbytes, int64_t duration, int64_t now = kInt64Min) {
    if (now != kInt64Min) {
      now = clock(now);
      if (src == model_.me && dst >= 0 && dst < model_.nodes && dst != src) model_.arrived(dst, now);
    }
    if (model_.observe_link(src, dst, nbytes, duration)) policy_->observed_link(src, dst, nbytes, duration);
  }
  // Items that wait to be run at a node, and items that wait there to be sent.
  void observe_queue(int node, int64_t length, int64_t out_length = 0) {
    if (model_.observe_queue(node, length, out_length)) policy_->observed_queue(node, now_);
  }
  void set_node_up(int node, bool up) { model_.set_node_up(node, up); }
  void set_link_up(int src, int dst, bool up) { model_.set_link_up(src, dst, up); }

  // Whether to run two groups of rows that wait here for a segment as one batch: the time saved exceeds the merge.
  bool rebatch(int segment, int64_t rows, int64_t others, int64_t merge_ns) const { return model_.rebatch_pays(segment, rows, others, merge_ns); }

  const Model& model() const { return model_; }
  Policy::State policy_state() const { return policy_->state(); }
  int64_t now() const { return now_; }
  const Counters& counters() const { return model_.counters; }
  const std::vector<int64_t>& per_exit() const { return per_exit_; }  // [S]
  int64_t live() const { return tasks_.live(); }
  int64_t waiting() const { return room_.size(); }
  int64_t capacity() const { return tasks_.capacity(); }

 private:
  int64_t clock(int64_t now);
  // Inlined by force: what two calls keep on the stack costs a row of a batch 3.5 of 25 ns.
  [[gnu::always_inline]] inline Decision decide_row(int64_t task, int exit, const Sample& sample, int64_t now, int bucket, double rounds);
  bool accepts(int64_t slot, int exit, const Sample& sample) const {
    return judge_ != nullptr ? judge_->accepts(slot, exit, sample) : model_.accepts(exit, sample.confidence);
  }
  bool user_accepts(const Query& query, int exit, const Sample& sample) const;  // in place of the policy's rule
  // An OFFLOAD that is asked about again: the host could not send it.
  void take_back(Task& task) {
    if (task.sent_to < 0) return;
    model_.unsent(task.sent_to, task.until);
    task.sent_to = -1;
  }
  [[gnu::always_inline]] inline Decision act(int64_t slot, const Choice& choice, double slack, int64_t now);
  Decision end(int64_t slot, double slack, bool forced, const Sample* sample);

  Model model_;
  Tasks tasks_;
  Room room_;
  bool idle_ = false;
  std::unique_ptr<Policy> policy_;
  Judge* const judge_;  // null: by the threshold, without a virtual call twice a row
  std::vector<int64_t> per_exit_;
  int64_t now_ = kInt64Min;
  int64_t next_rebuild_ = kInt64Min;
};

}  // namespace fastee::sched
