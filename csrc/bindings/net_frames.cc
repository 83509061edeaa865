#ifdef FASTEE_NET
#include "bindings/net_frames.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string_view>

#include "net/carry.h"
#include "net/crc32c.h"

namespace fastee::bindings {

using namespace fastee::net;

Names::Names() {
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

const Names& names() {
  static const Names* made = new Names();  // never destroyed: the interpreter may be gone by then
  return *made;
}

void refuse(const py::object& type, const std::string& why) {
  PyErr_SetString(type.ptr(), why.c_str());
  throw py::error_already_set();
}

py::object get(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

namespace {

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
    refuse(names().error, "frame: a header field is out of range: " + what + " = " + py::str(value).cast<std::string>());
  }
  return out;
}

// A frozen dataclass with these fields: its own __init__ would set them one by one through object.__setattr__, at ten times the price.
py::object record(const py::object& type, py::dict fields) {
  auto* t = reinterpret_cast<PyTypeObject*>(type.ptr());
  auto made = py::reinterpret_steal<py::object>(t->tp_alloc(t, 0));
  if (!made || PyObject_GenericSetAttr(made.ptr(), names().dict, fields.ptr()) != 0) throw py::error_already_set();
  return made;
}

void put(py::dict& fields, PyObject* name, py::object value) {
  if (PyDict_SetItem(fields.ptr(), name, value.ptr()) != 0) throw py::error_already_set();
}

}  // namespace

py::tuple tensors_of(const Frame& f) {
  const Names& p = names();
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
  return tensors;
}

py::object to_python(const Frame& f, py::object payload) {
  const Names& p = names();
  py::dict d;
  put(d, p.kind, p.kinds[static_cast<size_t>(f.kind)]), put(d, p.task, py::int_(f.task)), put(d, p.sender, py::int_(f.sender));
  put(d, p.origin, py::int_(f.origin));
  put(d, p.fingerprint, py::bytes(reinterpret_cast<const char*>(f.fingerprint.data()), f.fingerprint.size()));
  put(d, p.segment, py::int_(f.segment)), put(d, p.exit, py::int_(f.exit)), put(d, p.codec, py::int_(f.codec)), put(d, p.flag, p.flags[f.flags]);
  put(d, p.hops, py::int_(f.hops)), put(d, p.time_left, py::int_(f.time_left)), put(d, p.wire_bytes, py::int_(f.wire_bytes));
  put(d, p.route, f.route_bytes ? py::bytes(reinterpret_cast<const char*>(f.route.data()), f.route_bytes) : p.no_bytes);
  put(d, p.tensors, tensors_of(f)), put(d, p.payload, std::move(payload));
  return record(p.frame, d);
}

Frame from_python(py::handle frame, uint64_t payload_bytes) {
  const Names& p = names();
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

namespace {

constexpr size_t kCopied = 1024;  // cheaper to copy than to keep
constexpr DLDataType kTypes[] = {{0, 0, 0},       {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 64, 1}, {kDLInt, 64, 1},
                                 {kDLInt, 32, 1}, {kDLInt, 16, 1},   {kDLInt, 8, 1},    {kDLUInt, 8, 1},    {kDLBool, 8, 1}};  // by wire id

uint8_t dtype_id(const DLDataType& t) {
  for (uint8_t id = 1; id < std::size(kTypes); ++id)
    if (t.code == kTypes[id].code && t.bits == kTypes[id].bits && t.lanes == 1) return id;
  return 0;
}

std::array<int64_t, kMaxDims> widened(const Tensor& t) {
  std::array<int64_t, kMaxDims> shape{};
  std::copy(t.shape.begin(), t.shape.begin() + t.dims, shape.begin());
  return shape;
}

const uint8_t* bytes_of(const DLTensor& t) { return static_cast<const uint8_t*>(t.data) + t.byte_offset; }

}  // namespace

bool pack(const py::tuple& tensors, const std::shared_ptr<Graveyard>& yard, Outgoing* out) {
  const Exchange* exchange = Exchange::get();
  const size_t count = tensors.size();
  DLTensor views[kMaxTensors];
  Tensor table[kMaxTensors];
  uint64_t total = 0;
  uint32_t table_bytes = out->frame.route_bytes;
  if (exchange == nullptr || count > kMaxTensors) return false;
  for (size_t i = 0; i < count; ++i) {
    DLTensor& v = views[i];
    Tensor& t = table[i];
    if (!exchange->view(tensors[i], &v) || v.device.device_type != kDLCPU || v.ndim > kMaxDims || !contiguous(v)) return false;
    if ((t.dtype = dtype_id(v.dtype)) == 0) return false;
    t.dims = static_cast<uint8_t>(v.ndim), t.bytes = v.dtype.bits / 8;
    for (int d = 0; d < v.ndim; ++d) {
      if (v.shape[d] > UINT32_MAX) return false;
      t.shape[d] = static_cast<uint32_t>(v.shape[d]);
      if (t.bytes *= t.shape[d]; t.bytes > kMaxPayload) return false;  // a product that wraps exceeds the cap on its way
    }
    total += t.bytes, table_bytes += static_cast<uint32_t>(kEntryBytes + 4u * t.dims);
  }
  if (total > kMaxPayload) return false;
  if (count == 1 && total >= kCopied) {
    auto grave = std::make_unique<Graveyard::Grave>();
    grave->buffer.obj = py::object(tensors[0]).release().ptr();
    out->payload = Graveyard::keep(yard, std::move(grave), bytes_of(views[0]), total);
  } else if (total) {
    auto* joined = new uint8_t[total];
    size_t at = 0;
    for (size_t i = 0; i < count; at += table[i].bytes, ++i)
      if (table[i].bytes) std::memcpy(joined + at, bytes_of(views[i]), table[i].bytes);
    out->payload = PayloadRef(new Payload(joined, total, [](void* p) { delete[] static_cast<uint8_t*>(p); }, joined));
  }
  out->payload_crc = crc32c(0, out->payload.data(), total);
  Frame& f = out->frame;
  f.tensor_count = static_cast<uint8_t>(count), f.table_bytes = table_bytes, f.payload_bytes = total;
  std::copy(table, table + count, f.tensors.begin());
  return true;
}

bool unpack(const Frame& f, uint8_t* payload, const std::shared_ptr<void>& owner, py::tuple* out) {
  const Exchange* exchange = Exchange::get();
  std::array<size_t, kMaxTensors> offsets;
  if (exchange == nullptr || !place_raw(f, payload, &offsets)) return false;
  py::tuple made(f.tensor_count);
  for (size_t i = 0; i < f.tensor_count; ++i) {
    const Tensor& t = f.tensors[i];
    const std::array<int64_t, kMaxDims> shape = widened(t);
    made[i] = exchange->tensor(owner, payload + offsets[i], kTypes[t.dtype], t.dims, shape.data());
  }
  *out = std::move(made);
  return true;
}

py::object unpack_answer(const Event& event) {
  const Exchange* exchange = Exchange::get();
  RawAnswer answer;
  if (exchange == nullptr || !read_answer(event.frame, event.payload.data(), &answer)) return py::none();
  const std::shared_ptr<uint8_t[]> own(new uint8_t[answer.bytes]);
  std::memcpy(own.get(), answer.logits, answer.bytes);
  const int64_t shape[] = {answer.classes};
  const Frame& f = event.frame;
  return py::make_tuple(exchange->tensor(own, own.get(), kTypes[answer.dtype], 1, shape), answer.label, static_cast<double>(answer.confidence), f.exit,
                        f.wire_bytes, (f.flags & kForced) != 0);
}

}  // namespace fastee::bindings
#endif
