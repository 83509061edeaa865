#ifdef FASTEE_NET
#include "bindings/net_shortcut.h"

#include <sched.h>

#include <algorithm>

#include "net/crc32c.h"
#include "sched/scheduler.h"

namespace fastee::bindings {

using namespace fastee::net;
using sched::Action;
using sched::Decision;

namespace {

std::string key_of(std::string_view route, bool exits_off, uint8_t codec) {
  std::string key(route);
  key += static_cast<char>(exits_off);
  key += static_cast<char>(codec);
  return key;
}

// The one number of a tensor [1] of fp32; NaN never exits.
double number(py::handle tensor) {
  DLTensor t;
  if (!Exchange::get()->view(tensor, &t) || t.dtype.code != kDLFloat || t.dtype.bits != 32 || t.device.device_type != kDLCPU)
    return tensor.attr("__getitem__")(0).attr("__float__")().cast<double>();
  return *reinterpret_cast<const float*>(static_cast<const char*>(t.data) + t.byte_offset);
}

}  // namespace

struct Shortcut::Work {
  std::shared_ptr<Event> event;
  Known* known;
  int64_t handle, deadline;
  int sender, segment;
  py::tuple carry;
  py::object head = py::none();
  int exit = -1;
  double confidence = sched::kNone;
  bool credited = false;
  py::list spent{};  // ns of every segment that ran here
};

Shortcut::Shortcut(py::object node, py::object net, py::function judge, int index, int nodes)
    : node_(std::move(node)), net_(std::move(net)), run_segment_(net_.attr("run_segment")), exit_step_(net_.attr("exit_step")), judge_(std::move(judge)),
      index_(index), nodes_(nodes), segments_(net_.attr("num_segments").cast<int>()) {}

void Shortcut::learn(const std::string& route, bool exits_off, uint8_t codec, py::object scheduler) {
  if (!scheduler.attr("native").cast<bool>()) return;
  sched::Scheduler& core = scheduler_of(scheduler.attr("_core"));
  known_[key_of(route, exits_off, codec)] = {std::move(scheduler), &core};
}

bool Shortcut::run(const std::shared_ptr<Event>& event, Outbox& outbox) {
  const Frame& f = event->frame;
  const bool exits_off = f.flags & kExitsOff;
  const auto found = known_.find(key_of({reinterpret_cast<const char*>(f.route.data()), f.route_bytes}, exits_off, f.codec));
  if (found == known_.end() || f.segment >= segments_ || f.tensor_count == 0) return false;
  py::tuple carry;
  if (!unpack(f, event->payload.data(), event, &carry)) return false;
  sched::Scheduler& core = *found->second.core;
  const int64_t now = steady_ns();
  const bool bound = f.time_left != kNoDeadline && !exits_off;
  const int64_t deadline = bound ? now + f.time_left : kNoDeadline;
  const int64_t handle = core.admit(now, deadline, f.segment);
  if (handle < 0) return false;
  const int sender = node_of(event->peer);
  Work work{event, &found->second, handle, deadline, sender < nodes_ ? sender : -1, f.segment, std::move(carry)};
  try {
    for (;;) {
      core.observe_queue(index_, 0);
      const Decision d = core.decide(handle, work.exit, work.confidence, steady_ns());
      work.exit = -1;  // an exit is told once
      const bool judged = work.segment == segments_ || !work.head.is_none();
      if (d.action == Action::kExit && judged && !(d.forced && deadline == kNoDeadline) && answer(work, outbox, d.forced, false)) {
        credit(work, outbox);
        node_.attr("ran")(f.segment, work.spent);
        node_.attr("answered")(work.segment - 1, d.forced, steady_ns() > deadline);
        return true;
      }
      if (d.action != Action::kContinue) {
        adopt(work, py::int_(d.code()), py::none());
        return true;
      }
      const int64_t began = steady_ns();
      work.carry = py::tuple(run_segment_(work.segment, work.carry));
      work.head = work.segment < segments_ - 1 && !exits_off ? exit_step_(work.segment, work.carry, py::arg("logits") = true) : py::none();
      const int64_t spent = std::max<int64_t>(1, steady_ns() - began);
      work.spent.append(spent);
      for (auto& [key, known] : known_) known.core->observe(work.segment, index_, 1, spent);
      work.exit = work.segment++;
      work.confidence = work.head.is_none() ? sched::kNone : number(work.head.attr("confidence"));
      credit(work, outbox);
      if (!work.head.is_none() && deadline != kNoDeadline) answer(work, outbox, true, true);
      if (outbox.io->idle()) continue;
      adopt(work, py::none(), py::none());  // something came meanwhile: the node thinks about the order
      return true;
    }
  } catch (py::error_already_set& error) {  // the user's module may raise anything, and the client must hear of it
    if (!error.matches(PyExc_Exception)) throw;
    const py::object raised = error.value();
    if (error.trace()) PyException_SetTraceback(raised.ptr(), error.trace().ptr());
    adopt(work, py::none(), raised);
    return true;
  }
}

// Sends the answer of the exit that was reached, or keeps it ready. False where its tensors do not travel as they are.
bool Shortcut::answer(Work& work, Outbox& outbox, bool forced, bool armed) {
  py::tuple values(3);
  if (work.segment == segments_) {
    values[0] = work.carry[0];
    const py::tuple judged = judge_(values[0], net_.attr("measure"));
    values[1] = judged[0], values[2] = judged[1];
  } else {
    values[0] = work.head.attr("logits"), values[1] = work.head.attr("label"), values[2] = work.head.attr("confidence");
  }
  auto out = std::make_unique<Outgoing>();
  out->frame = work.event->frame;
  Frame& f = out->frame;
  f.kind = Kind::kAnswer, f.segment = static_cast<uint16_t>(work.segment), f.exit = static_cast<int16_t>(work.segment - 1);
  f.codec = 0, f.flags |= forced ? kForced : 0, f.route_bytes = 0;
  if (!pack(values, outbox.yard, out.get())) return false;
  out->peer = client_peer(f.origin), out->machine = 0, out->deadline = work.deadline, out->keyed = !armed;
  if (armed) {
    outbox.io->arm(std::move(out));
  } else {
    outbox.send(std::move(out));
    sched_yield();  // where libzmq's thread was woken on this very core it waits for this one to sleep: 36 to 130 us (perf sched, 2026-11)
  }
  return true;
}

// Renews the sender's credit, once, when this node has computed something.
void Shortcut::credit(Work& work, Outbox& outbox) const {
  if (std::exchange(work.credited, true) || work.sender < 0) return;
  const std::string beat = outbox.beat.empty() ? R"({"queue":0,"service":0,"handled":0})" : outbox.beat;
  const Frame& about = work.event->frame;
  auto out = std::make_unique<Outgoing>();
  Frame& f = out->frame;
  f.kind = Kind::kCredit, f.task = about.task, f.origin = about.origin, f.hops = about.hops;
  f.payload_bytes = beat.size();
  out->payload = copied(beat.data(), beat.size());
  out->payload_crc = crc32c(0, beat.data(), beat.size());
  out->peer = "n" + std::to_string(work.sender), out->machine = work.sender;
  outbox.send(std::move(out));
}

void Shortcut::adopt(Work& work, py::object decision, py::object error) {
  node_.attr("ran")(work.event->frame.segment, work.spent);
  node_.attr("adopt")(Message{work.event}, work.sender, work.known->scheduler, work.handle, work.deadline, work.segment, work.exit, work.confidence,
                      work.carry, work.head, work.credited, decision, error);
}

}  // namespace fastee::bindings
#endif
