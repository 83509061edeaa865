// fastee._C: the cluster's I/O thread and its frame codec; use fastee.cluster.
#ifdef FASTEE_NET
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/net_frames.h"
#include "bindings/net_shortcut.h"
#include "net/crc32c.h"
#include "net/echo.h"
#include "net/io_thread.h"

namespace py = pybind11;
using namespace fastee::bindings;
using namespace fastee::net;

namespace {

struct View {
  Py_buffer buffer{};
  explicit View(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~View() { PyBuffer_Release(&buffer); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
};

py::bytes encode_frame(py::handle frame) {
  const View payload(get(frame, names().payload));
  const Frame f = from_python(frame, static_cast<uint64_t>(payload.buffer.len));
  uint8_t head[kMaxHeader];
  const size_t size = encode(f, crc32c(0, payload.buffer.buf, static_cast<size_t>(payload.buffer.len)), head);
  return {reinterpret_cast<const char*>(head), size};
}

py::object decode_frame(const py::list& parts, const py::object& fingerprint, uint64_t max_payload) {
  std::vector<std::unique_ptr<View>> views;
  std::vector<Part> seen;
  for (py::handle part : parts) {
    views.push_back(std::make_unique<View>(part));
    seen.push_back({static_cast<const uint8_t*>(views.back()->buffer.buf), static_cast<size_t>(views.back()->buffer.len)});
  }
  std::array<uint8_t, 16> model{};
  if (!fingerprint.is_none()) {
    const std::string_view bytes = fingerprint.cast<py::bytes>();
    std::memcpy(model.data(), bytes.data(), std::min(bytes.size(), model.size()));
  }
  Frame frame;
  Part payload{};
  std::string why;
  const Verdict v = decode(seen.data(), seen.size(), fingerprint.is_none() ? nullptr : &model, max_payload, &frame, &payload, &why);
  if (v != Verdict::kOk) refuse(v == Verdict::kForeign ? names().foreign : names().error, why);
  return to_python(frame, py::bytes(reinterpret_cast<const char*>(payload.data), payload.size));
}

constexpr Py_ssize_t kCopied = 1024;     // cheaper to copy than to keep
constexpr Py_ssize_t kUnlocked = 65536;  // a checksum of more than this is worth giving up the interpreter's lock

py::object payload_of(const Message& m) {
  if (!m.event->payload.size()) return names().no_bytes;
  const py::object held = py::cast(m);
  PyObject* view = PyMemoryView_FromObject(held.ptr());
  if (view == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(view);
}

py::object frame_of(const Message& m) { return to_python(m.frame(), payload_of(m)); }

class Io {
 public:
  Io(const std::vector<std::string>& libraries, const py::dict& d) {
    fastee::net::Config c;
    c.name = d["name"].cast<std::string>();
    const auto model = d["fingerprint"].cast<std::string>();
    if (model.size() != 16) throw py::value_error("cluster: a fingerprint has 16 bytes, got " + std::to_string(model.size()));
    std::memcpy(c.fingerprint.data(), model.data(), 16);
    c.incarnation = d["incarnation"].cast<uint64_t>();
    c.machine = d["machine"].cast<int>();
    c.node = d["node"].cast<bool>();
    c.hello = d["hello"].cast<std::string>();
    c.peer_tasks = d["peer_tasks"].cast<int>();
    c.max_payload = d["max_payload"].cast<uint64_t>();
    c.peer_bytes = d["peer_bytes"].cast<uint64_t>();
    c.public_key = d["public_key"].cast<std::string>();
    c.secret_key = d["secret_key"].cast<std::string>();
    for (const auto& [machine, link] : d["links"].cast<py::dict>()) {
      const auto [rate, delay, medium] = link.cast<std::tuple<double, double, int>>();
      c.links[machine.cast<int>()] = {rate, delay, medium};
    }
    for (const auto& [key, name] : d["allowed"].cast<py::dict>()) {
      const auto bytes = key.cast<std::string>();
      if (bytes.size() != 32) throw py::value_error("cluster: a raw public key has 32 bytes, got " + std::to_string(bytes.size()));
      std::array<uint8_t, 32> raw;
      std::memcpy(raw.data(), bytes.data(), 32);
      c.allowed[raw] = name.cast<std::string>();
    }
    names();
    for (py::handle machine : d["down"]) outbox_.down.insert(machine.cast<int>());
    outbox_.machine = c.machine;
    io_ = std::make_unique<IoThread>(load_zmq(libraries), std::move(c));
    outbox_.io = io_.get();
  }

  ~Io() { stop(); }

  std::pair<int, int> bind(const std::string& host, int control, int bulk) {
    const auto ports = io().bind(host, {control, bulk});
    return {ports[0], ports[1]};
  }
  void start() { io().start(); }
  // Holds the interpreter's lock: the thread never takes it, and nobody may send meanwhile.
  void stop() {
    stopped_ = true;
    io_->stop();
    outbox_.yard->clear();
  }
  void connect(std::string peer, int machine, std::string host, int control, int bulk, std::string key) {
    io().connect(std::move(peer), machine, std::move(host), control, bulk, std::move(key));
  }
  void disconnect(std::string peer) { io().disconnect(std::move(peer)); }
  void set_beat(std::string json) {
    outbox_.beat = json;
    io().set_beat(std::move(json));
  }
  void wake() { io_->wake(); }
  py::dict bytes_to() const { return py::cast(outbox_.bytes_to); }

  bool send(std::string peer, int machine, py::handle frame, int64_t deadline, bool keyed) {
    io();
    auto out = pack(std::move(peer), machine, frame, deadline);
    out->ticket = out->frame.kind == Kind::kTask, out->keyed = keyed;  // only a lost task must be known
    return outbox_.send(std::move(out));
  }
  void arm(std::string peer, int machine, py::handle frame, int64_t deadline) { io().arm(pack(std::move(peer), machine, frame, deadline)); }

  // A new task of this process whose tensors travel as they lie in memory: whether it is on its way, or None where they do not.
  py::object submit(std::string peer, int machine, uint64_t task, uint16_t hops, uint8_t codec, uint8_t flags, const std::string& route,
                    const py::tuple& tensors, int64_t deadline) {
    outbox_.yard->clear();
    auto out = std::make_unique<Outgoing>();
    Frame& f = out->frame;
    f.kind = Kind::kTask, f.task = task, f.origin = io().config().incarnation, f.hops = hops, f.codec = codec, f.flags = flags;
    f.route_bytes = static_cast<uint8_t>(std::min<size_t>(route.size(), kMaxRoute));
    std::memcpy(f.route.data(), route.data(), f.route_bytes);
    if (!fastee::bindings::pack(tensors, outbox_.yard, out.get())) return py::none();
    out->peer = std::move(peer), out->machine = machine, out->deadline = deadline, out->ticket = 1;
    return py::bool_(outbox_.send(std::move(out)));
  }

  // What happened since; waits for the first event. A task that comes alone is run to its answer here when there is a `shortcut`.
  py::list receive(int64_t timeout_ns, int watched, int64_t spin_ns, Shortcut* shortcut) {
    outbox_.yard->clear();
    py::list out;
    take(&out, shortcut);
    if (out.empty()) {
      {
        const py::gil_scoped_release unlocked;
        io_->wait(timeout_ns, watched, spin_ns);
      }
      take(&out, shortcut);
    }
    return out;
  }

  py::dict counters() const {
    const Counters& c = io_->counters();
    py::dict d;
    const std::pair<const char*, const std::atomic<int64_t>*> all[] = {
        {"frames_in", &c.frames_in}, {"frames_out", &c.frames_out}, {"chunks_out", &c.chunks_out}, {"bytes_out", &c.bytes_out}, {"bad", &c.bad},
        {"foreign", &c.foreign}, {"late", &c.late}, {"over_credit", &c.over_credit}, {"answered", &c.answered}, {"lost", &c.lost},
        {"beats", &c.beats}, {"keys_refused", &c.keys_refused}};
    for (const auto& [name, value] : all) d[name] = value->load();
    return d;
  }

 private:
  IoThread& io() {
    if (stopped_) throw std::runtime_error("cluster: the I/O thread is closed");
    return *io_;
  }

  std::unique_ptr<Outgoing> pack(std::string peer, int machine, py::handle frame, int64_t deadline) {
    outbox_.yard->clear();
    auto grave = std::make_unique<Graveyard::Grave>();
    if (PyObject_GetBuffer(get(frame, names().payload).ptr(), &grave->buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    const Py_ssize_t size = grave->buffer.len;
    const void* data = grave->buffer.buf;
    auto out = std::make_unique<Outgoing>();
    try {
      out->frame = from_python(frame, static_cast<uint64_t>(size));
    } catch (...) {
      PyBuffer_Release(&grave->buffer);
      throw;
    }
    if (size < kCopied) {
      out->payload = copied(data, static_cast<size_t>(size));
      PyBuffer_Release(&grave->buffer);
    } else {
      out->payload = Graveyard::keep(outbox_.yard, std::move(grave), data, static_cast<size_t>(size));
    }
    if (size > kUnlocked) {
      const py::gil_scoped_release unlocked;
      out->payload_crc = crc32c(0, out->payload.data(), static_cast<size_t>(size));
    } else {
      out->payload_crc = crc32c(0, out->payload.data(), static_cast<size_t>(size));
    }
    out->peer = std::move(peer), out->machine = machine, out->deadline = deadline;
    return out;
  }

  // An id that no fastee process has is a stranger's: it is named "".
  static py::object name(const std::string& peer) {
    PyObject* text = PyUnicode_DecodeUTF8(peer.data(), static_cast<Py_ssize_t>(peer.size()), "strict");
    if (text != nullptr) return py::reinterpret_steal<py::object>(text);
    PyErr_Clear();
    return py::str("");
  }

  static py::tuple key(const Event& event) { return py::make_tuple(event.key.task, event.key.origin, event.key.hops); }

  void take(py::list* out, Shortcut* shortcut) {
    for (int i = 0; i < 256; ++i) {
      std::shared_ptr<Event> event = io_->next();
      if (!event) return;
      const auto code = py::int_(static_cast<int>(event->type));
      switch (event->type) {
        case Event::Type::kFrame:
          if (shortcut && out->empty() && event->frame.kind == Kind::kTask && io_->idle() && shortcut->run(event, outbox_)) break;
          out->append(py::make_tuple(code, name(event->peer), Message{event}));
          break;
        case Event::Type::kSent:
          out->append(py::make_tuple(code, event->machine, event->bytes, event->ns, event->at, key(*event)));
          break;
        case Event::Type::kLost:
        case Event::Type::kAnswered:
          out->append(py::make_tuple(code, key(*event)));
          break;
        default:
          out->append(py::make_tuple(code, name(event->peer), event->text));
      }
    }
  }

  std::unique_ptr<IoThread> io_;
  Outbox outbox_;
  bool stopped_ = false;
};

}  // namespace

void fastee::bindings::bind_net(py::module_& m) {
  m.def("encode_frame", &encode_frame, py::arg("frame"));
  m.def("decode_frame", &decode_frame, py::arg("parts"), py::arg("fingerprint"), py::arg("max_payload"));
  m.def("curve_keypair", [](const std::vector<std::string>& libraries) {
    char keys[2][41] = {};
    if (load_zmq(libraries).curve_keypair(keys[0], keys[1]) != 0) throw std::runtime_error("cluster: libzmq makes no keys");
    return std::make_pair(std::string(keys[0]), std::string(keys[1]));
  });
  m.def("zmq_path", [](const std::vector<std::string>& libraries) { return load_zmq(libraries).path; });
  const auto field = [](auto member) {
    return [member](const Message& m) { return m.frame().*member; };
  };
  py::class_<Message>(m, "Message", py::buffer_protocol())
      .def_buffer([](const Message& r) {
        return py::buffer_info(r.event->payload.data(), 1, "B", static_cast<py::ssize_t>(r.event->payload.size()));
      })
      .def_property_readonly("kind", [](const Message& r) { return names().kinds[static_cast<size_t>(r.frame().kind)]; })
      .def_property_readonly("flags", [](const Message& r) { return names().flags[r.frame().flags]; })
      .def_property_readonly("exits_off", [](const Message& r) { return (r.frame().flags & kExitsOff) != 0; })
      .def_property_readonly("forced", [](const Message& r) { return (r.frame().flags & kForced) != 0; })
      .def_property_readonly("task", field(&Frame::task))
      .def_property_readonly("sender", field(&Frame::sender))
      .def_property_readonly("origin", field(&Frame::origin))
      .def_property_readonly("segment", field(&Frame::segment))
      .def_property_readonly("exit", field(&Frame::exit))
      .def_property_readonly("codec", field(&Frame::codec))
      .def_property_readonly("hops", field(&Frame::hops))
      .def_property_readonly("time_left", field(&Frame::time_left))
      .def_property_readonly("wire_bytes", field(&Frame::wire_bytes))
      .def_property_readonly("nbytes", [](const Message& r) { return r.frame().bytes(); })
      .def_property_readonly("fingerprint", [](const Message& r) { return py::bytes(reinterpret_cast<const char*>(r.frame().fingerprint.data()), 16); })
      .def_property_readonly("route", [](const Message& r) { return py::bytes(reinterpret_cast<const char*>(r.frame().route.data()), r.frame().route_bytes); })
      .def_property_readonly("tensors", [](const Message& r) { return tensors_of(r.frame()); })
      .def_property_readonly("payload", &payload_of)
      .def("frame", &frame_of)
      .def("with_", [](const Message& r, const py::kwargs& changes) { return frame_of(r).attr("with_")(**changes); })
      .def("answer", [](const Message& r) { return unpack_answer(*r.event); });
  py::class_<Shortcut>(m, "Shortcut")
      .def(py::init<py::object, py::object, py::function, int, int>(), py::arg("node"), py::arg("net"), py::arg("judge"), py::arg("index"), py::arg("nodes"))
      .def("learn", &Shortcut::learn)
      .def("forget", &Shortcut::forget);
  py::class_<RawEcho>(m, "RawEcho")
      .def(py::init([](const std::vector<std::string>& libraries, size_t bytes) { return std::make_unique<RawEcho>(load_zmq(libraries), bytes); }))
      .def("trip", &RawEcho::trip, py::call_guard<py::gil_scoped_release>());
  py::class_<Io>(m, "IoThread")
      .def(py::init<const std::vector<std::string>&, const py::dict&>(), py::arg("libraries"), py::arg("config"))
      .def("bind", &Io::bind)
      .def("start", &Io::start)
      .def("stop", &Io::stop)
      .def("connect", &Io::connect)
      .def("disconnect", &Io::disconnect)
      .def("set_beat", &Io::set_beat)
      .def("wake", &Io::wake)
      .def("send", &Io::send)
      .def("submit", &Io::submit)
      .def_property_readonly("bytes_to", &Io::bytes_to)
      .def("arm", &Io::arm)
      .def("receive", &Io::receive, py::arg("timeout_ns"), py::arg("watched"), py::arg("spin_ns"), py::arg("shortcut") = nullptr)
      .def("counters", &Io::counters);
}
#else
#include "bindings/bindings.h"
void fastee::bindings::bind_net(pybind11::module_&) {}  // fastee.cluster says that the Python transport serves
#endif
