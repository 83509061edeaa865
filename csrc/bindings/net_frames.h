// The cluster's frames as Python sees them, and what the I/O thread's object and the shortcut share. Hold the interpreter's lock.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tensors.h"
#include "net/io_thread.h"

namespace fastee::bindings {

// The Python side of a frame, looked up once: classes, enum members, torch's dtypes and the attributes' names.
struct Names {
  py::object frame, entry, error, foreign, no_bytes;
  std::vector<py::object> kinds, flags, dtypes;  // by number
  py::dict dtype_ids;
  PyObject *kind, *task, *sender, *origin, *fingerprint, *segment, *exit, *codec, *flag, *hops, *time_left, *wire_bytes, *route, *tensors,
      *payload, *dtype, *shape, *packing, *nbytes, *dict;
  Names();
};
const Names& names();

py::object get(py::handle object, PyObject* name);
[[noreturn]] void refuse(const py::object& type, const std::string& why);

py::tuple tensors_of(const net::Frame& f);
py::object to_python(const net::Frame& f, py::object payload);
net::Frame from_python(py::handle frame, uint64_t payload_bytes);

// A received frame that offers the attributes of fastee.cluster.frame.Frame and makes each when it is read: a whole Frame takes 15 objects.
// It holds the payload and its sender's place in the credit for as long as it or a tensor in the payload lives.
struct Message {
  std::shared_ptr<net::Event> event;
  const net::Frame& frame() const { return event->frame; }
};

// Python objects that libzmq has let go of, from its own thread and without the interpreter's lock: released at the next call from Python.
class Graveyard {
 public:
  struct Grave {
    Py_buffer buffer{};
    std::shared_ptr<Graveyard> yard;
    Grave* next = nullptr;
  };
  void bury(Grave* g) {
    g->next = top_.load(std::memory_order_relaxed);
    while (!top_.compare_exchange_weak(g->next, g, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  // A payload over memory that the grave's object holds.
  static net::PayloadRef keep(std::shared_ptr<Graveyard> yard, std::unique_ptr<Grave> grave, const void* data, size_t size) {
    grave->yard = std::move(yard);
    const auto bury = [](void* g) {
      auto* grave = static_cast<Grave*>(g);
      const auto yard = std::move(grave->yard);
      yard->bury(grave);
    };
    return net::PayloadRef(new net::Payload(data, size, bury, grave.release()));
  }
  void clear() {
    for (Grave* g = top_.exchange(nullptr, std::memory_order_acquire); g != nullptr;) {
      Grave* next = g->next;
      PyBuffer_Release(&g->buffer);
      delete g;
      g = next;
    }
  }

 private:
  std::atomic<Grave*> top_{nullptr};
};

// The way out: frames to the I/O thread, and the books about what it was given.
struct Outbox {
  net::IoThread* io = nullptr;
  std::shared_ptr<Graveyard> yard = std::make_shared<Graveyard>();
  int machine = 0;
  std::set<int> down;                // machines to which the link has rate 0
  std::map<int, int64_t> bytes_to;   // machine -> bytes put on its link
  std::string beat;                  // what heartbeats say

  // False when the link is down.
  bool send(std::unique_ptr<net::Outgoing> out) {
    if (out->machine != machine) {
      if (down.count(out->machine)) return false;
      bytes_to[out->machine] += static_cast<int64_t>(out->frame.bytes());
    }
    io->send(std::move(out));
    return true;
  }
};

// What travels as it lies in memory. `pack` fills the frame's table and the payload from contiguous CPU tensors: a single one of 1 KB or more
// goes out from its own memory, else they are copied together; false (`out` is as it was) where one is something else or too large.
bool pack(const py::tuple& tensors, const std::shared_ptr<Graveyard>& yard, net::Outgoing* out);
// The tensors of a frame in its payload's memory, which `owner` holds; false where one is packed or does not fit its table: the codecs of
// fastee.cluster.codec unpack it, or say what is wrong.
bool unpack(const net::Frame& f, uint8_t* payload, const std::shared_ptr<void>& owner, py::tuple* out);
// (logits [C], label, confidence, exit, wire bytes, forced) of an answer that travelled as it was, in memory of its own, because users keep answers
// and may keep thousands; None for any other frame.
py::object unpack_answer(const net::Event& event);

}  // namespace fastee::bindings
