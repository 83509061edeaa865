// fastee._C: the cluster's I/O thread and its frame codec; use fastee.cluster. Frames are fastee.cluster.frame.Frame objects on both ways.
#ifdef FASTEE_NET
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "net/crc32c.h"
#include "net/echo.h"
#include "net/io_thread.h"

namespace py = pybind11;
using namespace fastee::net;

namespace {

// The Python side of a frame, looked up once: classes, enum members, torch's dtypes and the attributes' names.
struct Python {
  py::object frame, entry, error, foreign, no_bytes;
  std::vector<py::object> kinds, flags, dtypes;  // by number
  py::dict dtype_ids;
  PyObject *kind, *task, *sender, *origin, *fingerprint, *segment, *exit, *codec, *flag, *hops, *time_left, *wire_bytes, *route, *tensors,
      *payload, *dtype, *shape, *packing, *nbytes, *dict;

  Python() {
    const auto module = py::module_::import("fastee.cluster.frame"), errors = py::module_::import("fastee.errors");
    frame = module.attr("Frame"), entry = module.attr("TensorEntry"), no_bytes = py::bytes("");
    error = errors.attr("FrameError"), foreign = errors.attr("FingerprintMismatch");
    for (int i = 0; i <= static_cast<int>(Kind::kCredit); ++i) kinds.push_back(i ? module.attr("Kind")(i) : py::none());
    for (int i = 0; i <= (kExitsOff | kForced); ++i) flags.push_back(module.attr("Flag")(i));
    dtype_ids = module.attr("DTYPE_IDS");
    dtypes.resize(dtype_ids.size() + 1);
    for (const auto& [dtype, number] : dtype_ids) dtypes.at(number.cast<size_t>()) = py::reinterpret_borrow<py::object>(dtype);
    const std::pair<PyObject**, const char*> names[] = {
        {&kind, "kind"}, {&task, "task"}, {&sender, "sender"}, {&origin, "origin"}, {&fingerprint, "fingerprint"}, {&segment, "segment"},
        {&exit, "exit"}, {&codec, "codec"}, {&flag, "flags"}, {&hops, "hops"}, {&time_left, "time_left"}, {&wire_bytes, "wire_bytes"},
        {&route, "route"}, {&tensors, "tensors"}, {&payload, "payload"}, {&dtype, "dtype"}, {&shape, "shape"}, {&packing, "packing"},
        {&nbytes, "nbytes"}, {&dict, "__dict__"}};
    for (const auto& [where, name] : names) *where = PyUnicode_InternFromString(name);
  }
};

const Python& python() {
  static const Python* made = new Python();  // never destroyed: the interpreter may be gone by then
  return *made;
}

[[noreturn]] void refuse(const py::object& type, const std::string& why) {
  PyErr_SetString(type.ptr(), why.c_str());
  throw py::error_already_set();
}

py::object get(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

template <typename T>
T integer(py::handle object, PyObject* name) {
  const py::object value = get(object, name);
  bool good;
  T out{};
  if constexpr (std::is_signed_v<T>) {
    int over = 0;
    const long long n = PyLong_AsLongLongAndOverflow(value.ptr(), &over);
    good = !over && n >= std::numeric_limits<T>::min() && n <= std::numeric_limits<T>::max();
    out = static_cast<T>(n);
  } else {
    const unsigned long long n = PyLong_AsUnsignedLongLong(value.ptr());
    good = n <= std::numeric_limits<T>::max();
    out = static_cast<T>(n);
  }
  if (PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
    PyErr_Clear();
    good = false;
  }
  if (!good) {
    const auto what = py::reinterpret_borrow<py::str>(name).cast<std::string>();
    refuse(python().error, "frame: a header field is out of range: " + what + " = " + py::str(value).cast<std::string>());
  }
  return out;
}

// A frozen dataclass with these fields: its own __init__ would set them one by one through object.__setattr__, at ten times the price.
py::object record(const py::object& type, py::dict fields) {
  auto* t = reinterpret_cast<PyTypeObject*>(type.ptr());
  auto made = py::reinterpret_steal<py::object>(t->tp_alloc(t, 0));
  if (!made || PyObject_GenericSetAttr(made.ptr(), python().dict, fields.ptr()) != 0) throw py::error_already_set();
  return made;
}

void put(py::dict& fields, PyObject* name, py::object value) {
  if (PyDict_SetItem(fields.ptr(), name, value.ptr()) != 0) throw py::error_already_set();
}

py::object to_python(const Frame& f, py::object payload) {
  const Python& p = python();
  py::tuple tensors(f.tensor_count);
  for (size_t i = 0; i < f.tensor_count; ++i) {
    const Tensor& t = f.tensors[i];
    py::tuple shape(t.dims);
    for (size_t d = 0; d < t.dims; ++d) shape[d] = py::int_(t.shape[d]);
    py::dict fields;
    put(fields, p.dtype, p.dtypes[t.dtype]), put(fields, p.shape, shape);
    put(fields, p.packing, py::int_(t.packing)), put(fields, p.nbytes, py::int_(t.bytes));
    tensors[i] = record(p.entry, fields);
  }
  py::dict d;
  put(d, p.kind, p.kinds[static_cast<size_t>(f.kind)]), put(d, p.task, py::int_(f.task)), put(d, p.sender, py::int_(f.sender));
  put(d, p.origin, py::int_(f.origin));
  put(d, p.fingerprint, py::bytes(reinterpret_cast<const char*>(f.fingerprint.data()), f.fingerprint.size()));
  put(d, p.segment, py::int_(f.segment)), put(d, p.exit, py::int_(f.exit)), put(d, p.codec, py::int_(f.codec)), put(d, p.flag, p.flags[f.flags]);
  put(d, p.hops, py::int_(f.hops)), put(d, p.time_left, py::int_(f.time_left)), put(d, p.wire_bytes, py::int_(f.wire_bytes));
  put(d, p.route, f.route_bytes ? py::bytes(reinterpret_cast<const char*>(f.route.data()), f.route_bytes) : p.no_bytes);
  put(d, p.tensors, tensors), put(d, p.payload, std::move(payload));
  return record(p.frame, d);
}

struct View {
  Py_buffer buffer{};
  explicit View(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~View() { PyBuffer_Release(&buffer); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
};

Frame from_python(py::handle frame, uint64_t payload_bytes) {
  const Python& p = python();
  Frame f;
  f.kind = static_cast<Kind>(integer<uint8_t>(frame, p.kind));
  f.flags = integer<uint8_t>(frame, p.flag);
  f.task = integer<uint64_t>(frame, p.task), f.sender = integer<uint64_t>(frame, p.sender), f.origin = integer<uint64_t>(frame, p.origin);
  f.segment = integer<uint16_t>(frame, p.segment), f.exit = integer<int16_t>(frame, p.exit), f.codec = integer<uint8_t>(frame, p.codec);
  f.hops = integer<uint16_t>(frame, p.hops), f.time_left = integer<int64_t>(frame, p.time_left);
  f.wire_bytes = integer<uint64_t>(frame, p.wire_bytes);
  const auto model = get(frame, p.fingerprint).cast<py::bytes>();
  const std::string_view bytes = model;
  std::memcpy(f.fingerprint.data(), bytes.data(), std::min(bytes.size(), f.fingerprint.size()));
  const auto route_object = get(frame, p.route).cast<py::bytes>();
  const std::string_view route = route_object;
  const auto tensors = get(frame, p.tensors).cast<py::tuple>();
  f.payload_bytes = payload_bytes;
  if (tensors.size() > kMaxTensors || route.size() > kMaxRoute)
    refuse(p.error, "frame: " + std::to_string(tensors.size()) + " tensors and a route of " + std::to_string(route.size()) + " exceed the caps " +
                        std::to_string(kMaxTensors) + " and " + std::to_string(kMaxRoute));
  f.route_bytes = static_cast<uint8_t>(route.size()), f.tensor_count = static_cast<uint8_t>(tensors.size());
  std::memcpy(f.route.data(), route.data(), route.size());
  f.table_bytes = f.route_bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor& t = f.tensors[i];
    const py::object dtype = get(tensors[i], p.dtype);
    PyObject* id = PyDict_GetItem(p.dtype_ids.ptr(), dtype.ptr());
    if (id == nullptr) {
      const auto known = py::str(py::module_::import("builtins").attr("sorted")(py::module_::import("builtins").attr("map")(py::type::of(py::str()), p.dtype_ids)));
      refuse(p.error, "frame: dtype " + py::str(dtype).cast<std::string>() + " cannot travel, expected one of " + known.cast<std::string>());
    }
    const auto shape = get(tensors[i], p.shape).cast<py::tuple>();
    if (shape.size() > kMaxDims)
      refuse(p.error, "frame: a tensor of " + std::to_string(shape.size()) + " dimensions cannot travel, the cap is " + std::to_string(kMaxDims));
    t.dtype = static_cast<uint8_t>(PyLong_AsLong(id)), t.dims = static_cast<uint8_t>(shape.size());
    t.packing = integer<uint8_t>(tensors[i], p.packing), t.bytes = integer<uint64_t>(tensors[i], p.nbytes);
    for (size_t d = 0; d < shape.size(); ++d) {
      const auto size = shape[d].cast<uint64_t>();
      if (size > UINT32_MAX) refuse(p.error, "frame: tensor of shape " + py::str(shape).cast<std::string>() + " does not fit the table");
      t.shape[d] = static_cast<uint32_t>(size);
    }
    f.table_bytes += static_cast<uint32_t>(kEntryBytes + 4 * shape.size());
  }
  if (const std::string why = unfit(f); !why.empty()) refuse(p.error, why);
  return f;
}

py::bytes encode_frame(py::handle frame) {
  const View payload(get(frame, python().payload));
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
  if (v != Verdict::kOk) refuse(v == Verdict::kForeign ? python().foreign : python().error, why);
  return to_python(frame, py::bytes(reinterpret_cast<const char*>(payload.data), payload.size));
}

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

constexpr Py_ssize_t kCopied = 1024;     // cheaper to copy than to keep
constexpr Py_ssize_t kUnlocked = 65536;  // a checksum of more than this is worth giving up the interpreter's lock

// A received payload: the buffer protocol over pooled memory, and the task's place in its sender's credit.
struct Received {
  std::unique_ptr<Event> event;
};

class Io {
 public:
  Io(const std::vector<std::string>& libraries, const py::dict& d) : yard_(std::make_shared<Graveyard>()) {
    Config c;
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
      const auto [rate, delay] = link.cast<std::pair<double, double>>();
      c.links[machine.cast<int>()] = {rate, delay};
    }
    for (const auto& [key, name] : d["allowed"].cast<py::dict>()) {
      const auto bytes = key.cast<std::string>();
      if (bytes.size() != 32) throw py::value_error("cluster: a raw public key has 32 bytes, got " + std::to_string(bytes.size()));
      std::array<uint8_t, 32> raw;
      std::memcpy(raw.data(), bytes.data(), 32);
      c.allowed[raw] = name.cast<std::string>();
    }
    python();
    io_ = std::make_unique<IoThread>(load_zmq(libraries), std::move(c));
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
    yard_->clear();
  }
  void connect(std::string peer, int machine, std::string host, int control, int bulk, std::string key) {
    io().connect(std::move(peer), machine, std::move(host), control, bulk, std::move(key));
  }
  void disconnect(std::string peer) { io().disconnect(std::move(peer)); }
  void set_beat(std::string json) { io().set_beat(std::move(json)); }
  void wake() { io_->wake(); }

  void send(std::string peer, int machine, py::handle frame, int64_t deadline, bool keyed) {
    auto out = pack(std::move(peer), machine, frame, deadline);
    out->ticket = out->frame.kind == Kind::kTask, out->keyed = keyed;  // only a lost task must be known
    io().send(std::move(out));
  }
  void arm(std::string peer, int machine, py::handle frame, int64_t deadline) { io().arm(pack(std::move(peer), machine, frame, deadline)); }

  py::list receive(int64_t timeout_ns, int watched, int64_t spin_ns) {
    yard_->clear();
    py::list out;
    take(&out);
    if (out.empty()) {
      {
        const py::gil_scoped_release unlocked;
        io_->wait(timeout_ns, watched, spin_ns);
      }
      take(&out);
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
    yard_->clear();
    auto grave = std::make_unique<Graveyard::Grave>();
    if (PyObject_GetBuffer(get(frame, python().payload).ptr(), &grave->buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
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
      grave->yard = yard_;
      const auto bury = [](void* g) {
        auto* grave = static_cast<Graveyard::Grave*>(g);
        const auto yard = std::move(grave->yard);
        yard->bury(grave);
      };
      out->payload = PayloadRef(new Payload(data, static_cast<size_t>(size), bury, grave.release()));
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

  void take(py::list* out) {
    for (int i = 0; i < 256; ++i) {
      auto event = io_->next();
      if (!event) return;
      const auto code = py::int_(static_cast<int>(event->type));
      switch (event->type) {
        case Event::Type::kFrame: {
          const Frame f = event->frame;
          py::object peer = name(event->peer), payload = python().no_bytes;
          if (event->payload.size()) {
            const py::object held = py::cast(Received{std::move(event)});
            payload = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(held.ptr()));
            if (!payload) throw py::error_already_set();
          }
          out->append(py::make_tuple(code, peer, to_python(f, std::move(payload))));
          break;
        }
        case Event::Type::kSent:
          out->append(py::make_tuple(code, event->machine, event->bytes, event->ns));
          break;
        case Event::Type::kLost:
        case Event::Type::kAnswered:
          out->append(py::make_tuple(code, py::make_tuple(event->key.task, event->key.origin, event->key.hops)));
          break;
        default:
          out->append(py::make_tuple(code, name(event->peer), event->text));
      }
    }
  }

  std::shared_ptr<Graveyard> yard_;
  std::unique_ptr<IoThread> io_;
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
  py::class_<Received>(m, "Received", py::buffer_protocol()).def_buffer([](const Received& r) {
    return py::buffer_info(r.event->payload.data(), 1, "B", static_cast<py::ssize_t>(r.event->payload.size()));
  });
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
      .def("arm", &Io::arm)
      .def("receive", &Io::receive)
      .def("counters", &Io::counters);
}
#else
#include "bindings/bindings.h"
void fastee::bindings::bind_net(pybind11::module_&) {}  // fastee.cluster says that the Python transport serves
#endif
