// The seam for policies: one class each in policy_<name>.cc, made by name in policy.cc.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sched/model.h"
#include "sched/room.h"
#include "sched/tasks.h"

namespace fastee::sched {

struct Query {
  int64_t slot;
  int segment;           // the next one to run, 0..K
  int exit;              // the exit just evaluated, -1 on arrival or out of the waiting room
  const Sample* sample;  // what that exit said; it did not accept
  double slack;          // ns left, +inf without a deadline
  int64_t now;
  int bucket;     // batch bucket of the rows that travel together
  double rounds;  // full batches that run before the last one
  double weight;  // of the task's class; keeps z away from rounds: one load of both waits for the store of the second, 6 ns of a decision
  double z;       // normal quantile of the hit rate of the task's class
};

struct Choice {
  enum Kind { kNothingFits, kExit, kRun, kWait } kind = kNothingFits;
  int node = -1;            // of kRun: this node or the one to offload to
  int64_t until = kNever;   // of kWait
};

class Judge;

// All methods are called by the Scheduler alone. None may allocate, lock, throw or read a clock once constructed.
class Policy {
 public:
  struct Parts {  // of the scheduler that owns the policy
    Model& model;
    Tasks& tasks;
    Room& room;
    const bool& idle;
  };
  explicit Policy(const Parts& parts) : model_(parts.model), tasks_(parts.tasks), room_(parts.room), idle_(parts.idle) {}
  virtual ~Policy() = default;

  virtual bool admits() const { return true; }
  virtual void admitted(int64_t /*slot*/) {}
  virtual Judge* judge() { return nullptr; }
  // Called where the exit rule did not accept and a segment is left to run. kNothingFits becomes a forced EXIT of the best head
  // reached, or REJECT.
  virtual Choice place(const Query& query) = 0;
  // A task ends with the answer of `exit`; `sample` is null when that came from elsewhere.
  virtual void ended(int64_t /*slot*/, int /*exit*/, const Sample* /*sample*/, bool /*forced*/) {}
  virtual void finished(int64_t /*slot*/, double /*confidence*/) {}
  virtual void batch_begins(const double* /*confidences*/, int64_t /*rows*/) {}
  virtual void batch_ends() {}

  // The slot of the next waiting task that may go on, and where to; -1 when none may, which ends the pass.
  virtual int64_t poll(int64_t now, Choice* choice);
  virtual int64_t next_tick() const { return kNever; }
  virtual void tick(int64_t /*now*/) {}
  virtual double admit_interval() const { return 0.0; }
  virtual void observed(int /*node*/, int64_t /*batch*/, int64_t /*duration*/) {}
  virtual void observed_link(int /*src*/, int /*dst*/, int64_t /*nbytes*/, int64_t /*duration*/) {}
  virtual void observed_queue(int /*node*/, int64_t /*now*/) {}

  // What it has learned, for snapshots.
  using State = std::vector<std::pair<const char*, std::vector<double>>>;
  virtual State state() const { return {}; }

  Choice usual(const Query& q) const { return here_or_soonest(q); }
  Query query_of(int64_t slot, int64_t now, const Sample& sample) const {
    const Task& t = tasks_[slot];
    const double slack = t.deadline == kNoDeadline ? kInf : static_cast<double>(subtract_saturated(t.deadline, now));
    const TenantClass& c = model_.tenant_class(t.tenant);
    return {slot, t.segment, -1, &sample, slack, now, 0, 0.0, c.weight, c.quantile};
  }

 protected:
  // ns until the next answer is at home with the hit rate, if the task goes to p now; +inf where impossible.
  double time_at(const Query& q, int p) const { return model_.time_at(q.bucket, q.segment, p, q.now, q.rounds, q.z); }
  bool fits(const Query& q, int p) const {
    const double t = time_at(q, p);
    return t <= q.slack && t < kInf;
  }
  // Here when that makes the deadline, else where the next answer is soonest.
  Choice here_or_soonest(const Query& q) const;
  // WAIT for as long as some place still makes the deadline; kNothingFits when none does even now.
  Choice wait_while_possible(const Query& q) const;
  // WAIT until no more than `time` ns are left.
  Choice wait_for(const Query& q, double time) const;

  Model& model_;
  Tasks& tasks_;
  Room& room_;
  const bool& idle_;
};

// A policy with an exit rule of its own; the others go by the threshold.
class Judge : public Policy {
 public:
  using Policy::Policy;
  Judge* judge() final { return this; }

  // The rule of exit 0..K-1, without side effects: a batch is asked twice. What it learns goes into learn().
  virtual bool accepts(int64_t slot, int exit, const Sample& sample) const = 0;
  virtual void learn(int64_t /*slot*/, int /*exit*/, const Sample& /*sample*/, bool /*accepted*/) {}
};

bool known_policy(std::string_view name);
std::string policy_names();
std::unique_ptr<Policy> make_policy(std::string_view name, const Policy::Parts& parts);

}  // namespace fastee::sched
