// A node's way of a task from arrival to answer when nothing else is to be done: admitted, unpacked, decided and answered here, Python is called
// only to compute. Whatever is not that simple is handed over to fastee.cluster.node.Node, whose twin for these steps this is.
#pragma once
#include <map>
#include <memory>
#include <string>

#include "bindings/bindings.h"
#include "bindings/net_frames.h"

namespace fastee::bindings {

class Shortcut {
 public:
  // `node`: a Node, for what is handed over (`adopt`) and for the books (`ran`).
  Shortcut(py::object node, py::object net, py::function judge, int index, int nodes);

  // The scheduler for tasks of this plan, flags and codec; what is not known is not run here.
  void learn(const std::string& route, bool exits_off, uint8_t codec, py::object scheduler);
  void forget() { known_.clear(); }

  // True when the task was settled or handed over; false when it is none for this way, and nothing was done.
  bool run(const std::shared_ptr<net::Event>& event, Outbox& outbox);

 private:
  struct Known {
    py::object scheduler;
    sched::Scheduler* core;
  };
  struct Work;
  bool answer(Work& work, Outbox& outbox, bool forced, bool armed);
  void credit(Work& work, Outbox& outbox) const;
  void adopt(Work& work, py::object decision, py::object error);

  py::object node_, net_, run_segment_, exit_step_, judge_;
  int index_, nodes_, segments_;
  std::map<std::string, Known> known_;
};

}  // namespace fastee::bindings
