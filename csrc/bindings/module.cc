// fastee._C: the scheduler core for Python. Construction, batches and snapshots go through pybind11; the calls made once per
// task are METH_FASTCALL functions over a capsule, which cost a quarter of a pybind11 call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/bindings.h"
#include "sched/scheduler.h"

namespace py = pybind11;
using fastee::sched::Config;
using fastee::sched::Decision;
using fastee::sched::Scheduler;

namespace {

// What a capsule points to: the core and, for `decide`, one Python Decision per possible answer.
struct Bound {
  std::unique_ptr<Scheduler> core;
  std::vector<PyObject*> answers;  // EXIT, forced EXIT, CONTINUE, REJECT, then OFFLOAD by node and codec; owned
  py::object from_code;            // makes the others: WAIT
  py::object keep;                 // the users' compiled functions

  Bound(const Config& config, py::object kept) : core(std::make_unique<Scheduler>(config)), keep(std::move(kept)) {}
  ~Bound() { clear(); }
  void clear() {
    for (PyObject* answer : answers) Py_DECREF(answer);
    answers.clear();
  }
};

constexpr char kScheduler[] = "fastee.Scheduler";

Bound* bound_of(PyObject* self) { return static_cast<Bound*>(PyCapsule_GetPointer(self, kScheduler)); }

// Puts positional and keyword arguments into out[]; absent optional ones stay null. False with an exception set.
bool take_args(const char* call, const char* const* names, int count, int required, PyObject* const* args, Py_ssize_t given,
               PyObject* keywords, PyObject** out) {
  if (given > count) {
    PyErr_Format(PyExc_TypeError, "%s: takes at most %d arguments, got %zd", call, count, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < given; ++i) out[i] = args[i];
  const Py_ssize_t named = keywords != nullptr ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* name = PyTuple_GET_ITEM(keywords, k);
    int i = 0;
    while (i < count && PyUnicode_CompareWithASCIIString(name, names[i]) != 0) ++i;
    if (i == count || out[i] != nullptr) {
      PyErr_Format(PyExc_TypeError, "%s: %s argument %R", call, i == count ? "unknown" : "repeated", name);
      return false;
    }
    out[i] = args[given + k];
  }
  for (int i = 0; i < required; ++i)
    if (out[i] == nullptr) {
      PyErr_Format(PyExc_TypeError, "%s: argument %s is missing", call, names[i]);
      return false;
    }
  return true;
}

bool take_int64(const char* call, const char* name, PyObject* value, int64_t* out) {
  *out = PyLong_AsLongLong(value);
  if (*out != -1 || PyErr_Occurred() == nullptr) return true;
  if (PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s must be an int, got %s", call, name, Py_TYPE(value)->tp_name);
  } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
    PyErr_Clear();
    PyObject* text = PyObject_Str(value);
    if (text == nullptr) return false;
    PyErr_Format(PyExc_ValueError, "%s: %s must fit in 64 bits, got %.40U", call, name, text);
    Py_DECREF(text);
  }
  return false;
}

bool take_int(const char* call, const char* name, PyObject* value, int64_t low, int64_t high, int64_t* out) {
  if (!take_int64(call, name, value, out)) return false;
  if (*out >= low && *out <= high) return true;
  PyErr_Format(PyExc_ValueError, "%s: %s must be in %lld..%lld, got %lld", call, name, static_cast<long long>(low),
               static_cast<long long>(high), static_cast<long long>(*out));
  return false;
}

bool take_float(const char* call, const char* name, PyObject* value, double* out) {
  *out = PyFloat_AsDouble(value);
  if (*out != -1.0 || PyErr_Occurred() == nullptr) return true;
  if (PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s must be a number, got %s", call, name, Py_TYPE(value)->tp_name);
  }
  return false;
}

PyObject* answer_of(const Bound& bound, const Decision& d) {
  using fastee::sched::Action;
  size_t i = 3;
  if (d.action == Action::kExit) i = d.forced ? 1 : 0;
  if (d.action == Action::kContinue) i = 2;
  if (d.action == Action::kWait) {
    PyObject* arguments[] = {PyLong_FromLongLong(d.code()), PyLong_FromLongLong(bound.core->now())};
    PyObject* made = arguments[0] && arguments[1] ? PyObject_Vectorcall(bound.from_code.ptr(), arguments, 2, nullptr) : nullptr;
    Py_XDECREF(arguments[0]);
    Py_XDECREF(arguments[1]);
    return made;
  }
  if (d.action == Action::kOffload) i = 4 + static_cast<size_t>(d.node) * bound.core->model().config.codecs + d.codec;
  PyObject* answer = bound.answers[i];
  Py_INCREF(answer);
  return answer;
}

constexpr int64_t kMax = fastee::sched::kInt64Max;
constexpr int64_t kMaxLabel = (int64_t{1} << 31) - 1;

PyObject* call_decide(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"task", "exit", "confidence", "now", "gate", "delta", "label", "pool", "max_prob", "margin", "entropy", "lse"};
  PyObject* a[12] = {};
  Bound* bound = bound_of(self);
  int64_t task, exit, now, label = -1, pool = -1;
  fastee::sched::Sample sample;
  if (bound == nullptr || !take_args("decide", kNames, 12, 4, args, given, keywords, a) || !take_int64("decide", "task", a[0], &task) ||
      !take_int("decide", "exit", a[1], -1, bound->core->model().exits, &exit) ||
      !take_float("decide", "confidence", a[2], &sample.confidence) || !take_int64("decide", "now", a[3], &now))
    return nullptr;
  if (given == 4 && keywords == nullptr) return answer_of(*bound, bound->core->decide(task, static_cast<int>(exit), sample.confidence, now));
  double* const numbers[] = {&sample.gate, &sample.delta, nullptr, nullptr, &sample.max_prob, &sample.margin, &sample.entropy, &sample.lse};
  for (int i = 4; i < 12; ++i)
    if (a[i] != nullptr && numbers[i - 4] != nullptr && !take_float("decide", kNames[i], a[i], numbers[i - 4])) return nullptr;
  if (a[6] != nullptr && !take_int("decide", "label", a[6], -1, kMaxLabel, &label)) return nullptr;
  if (a[7] != nullptr && !take_int("decide", "pool", a[7], -1, kMaxLabel, &pool)) return nullptr;
  sample.label = static_cast<int32_t>(label);
  sample.pool = static_cast<int32_t>(pool);
  return answer_of(*bound, bound->core->decide(task, static_cast<int>(exit), sample, now));
}

PyObject* call_admit(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"now", "deadline", "segment", "tenant"};
  PyObject* a[4] = {};
  Bound* bound = bound_of(self);
  int64_t now, deadline = Scheduler::kDefaultDeadline, segment = 0, tenant = 0;
  if (bound == nullptr || !take_args("admit", kNames, 4, 1, args, given, keywords, a) || !take_int64("admit", "now", a[0], &now)) return nullptr;
  if (a[1] != nullptr && a[1] != Py_None) {
    if (!take_int64("admit", "deadline", a[1], &deadline)) return nullptr;
    if (deadline == Scheduler::kDefaultDeadline) ++deadline;  // the least int64 is taken; both are past
  }
  if (a[2] != nullptr && !take_int("admit", "segment", a[2], 0, bound->core->model().exits, &segment)) return nullptr;
  if (a[3] != nullptr && !take_int("admit", "tenant", a[3], 0, bound->core->model().num_classes() - 1, &tenant)) return nullptr;
  return PyLong_FromLongLong(bound->core->admit(now, deadline, static_cast<int>(segment), static_cast<int>(tenant)));
}

PyObject* call_observe(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"segment", "node", "batch", "duration_ns"};
  PyObject* a[4] = {};
  Bound* bound = bound_of(self);
  int64_t v[4];
  if (bound == nullptr || !take_args("observe", kNames, 4, 4, args, given, keywords, a)) return nullptr;
  const auto& model = bound->core->model();
  const int64_t low[] = {0, 0, 1, 1}, high[] = {model.exits, model.nodes - 1, int64_t{1} << 30, kMax};
  for (int i = 0; i < 4; ++i)
    if (!take_int("observe", kNames[i], a[i], low[i], high[i], &v[i])) return nullptr;
  bound->core->observe(static_cast<int>(v[0]), static_cast<int>(v[1]), v[2], v[3]);
  Py_RETURN_NONE;
}

PyObject* call_observe_link(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"src", "dst", "nbytes", "duration_ns", "now"};
  PyObject* a[5] = {};
  Bound* bound = bound_of(self);
  int64_t v[4], now = fastee::sched::kInt64Min;
  if (bound == nullptr || !take_args("observe_link", kNames, 5, 4, args, given, keywords, a)) return nullptr;
  const int64_t top = bound->core->model().nodes - 1;
  const int64_t low[] = {0, 0, 1, 1}, high[] = {top, top, int64_t{1} << 50, kMax};
  for (int i = 0; i < 4; ++i)
    if (!take_int("observe_link", kNames[i], a[i], low[i], high[i], &v[i])) return nullptr;
  if (a[4] != nullptr && a[4] != Py_None) {
    if (!take_int64("observe_link", "now", a[4], &now)) return nullptr;
    now = std::max(now, fastee::sched::kInt64Min + 1);  // the least int64 stands for "not told"
  }
  bound->core->observe_link(static_cast<int>(v[0]), static_cast<int>(v[1]), v[2], v[3], now);
  Py_RETURN_NONE;
}

PyObject* call_observe_queue(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"node", "length", "out_length"};
  PyObject* a[3] = {};
  Bound* bound = bound_of(self);
  int64_t node, length, out_length = 0;
  if (bound == nullptr || !take_args("observe_queue", kNames, 3, 2, args, given, keywords, a) ||
      !take_int("observe_queue", "node", a[0], 0, bound->core->model().nodes - 1, &node) ||
      !take_int("observe_queue", "length", a[1], 0, int64_t{1} << 40, &length) ||
      (a[2] != nullptr && !take_int("observe_queue", "out_length", a[2], 0, int64_t{1} << 40, &out_length)))
    return nullptr;
  bound->core->observe_queue(static_cast<int>(node), length, out_length);
  Py_RETURN_NONE;
}

PyObject* call_finish(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"task", "confidence"};
  PyObject* a[2] = {};
  Bound* bound = bound_of(self);
  int64_t task;
  double confidence = fastee::sched::kNone;
  if (bound == nullptr || !take_args("finish", kNames, 2, 1, args, given, keywords, a) || !take_int64("finish", "task", a[0], &task) ||
      (a[1] != nullptr && !take_float("finish", "confidence", a[1], &confidence)))
    return nullptr;
  return PyBool_FromLong(bound->core->finish(task, confidence));
}

// fp32 and strided arrays are converted; the Python face lets only int64 and float arrays through.
using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

// For arrays of the plain kind; None for any other: the Python face looks at those.
PyObject* call_decide_rows(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"tasks", "exit", "confidences", "now"};
  PyObject* a[4] = {};
  Bound* bound = bound_of(self);
  int64_t exit, now;
  if (bound == nullptr || !take_args("decide_batch", kNames, 4, 4, args, given, keywords, a)) return nullptr;
  if (!py::isinstance<Int64s>(a[0]) || !(py::isinstance<Doubles>(a[2]) || py::isinstance<py::array_t<float>>(a[2]))) Py_RETURN_NONE;
  try {
    const auto tasks = py::reinterpret_borrow<Int64s>(a[0]);
    const auto confidences = py::isinstance<Doubles>(a[2]) ? py::reinterpret_borrow<Doubles>(a[2]) : Doubles(py::reinterpret_borrow<py::object>(a[2]));
    if (tasks.ndim() != 1 || confidences.ndim() != 1 || tasks.size() != confidences.size()) Py_RETURN_NONE;
    if (!take_int("decide_batch", "exit", a[1], -1, bound->core->model().exits, &exit) || !take_int64("decide_batch", "now", a[3], &now)) return nullptr;
    Int64s codes(tasks.size());
    bound->core->decide_batch(tasks.data(), static_cast<int>(exit), confidences.data(), tasks.size(), now, codes.mutable_data());
    return codes.release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyObject* call_poll(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"now"};
  PyObject* a[1] = {};
  Bound* bound = bound_of(self);
  int64_t now, task;
  Decision decision;
  if (bound == nullptr || !take_args("poll", kNames, 1, 1, args, given, keywords, a) || !take_int64("poll", "now", a[0], &now)) return nullptr;
  if (!bound->core->poll(now, &task, &decision)) Py_RETURN_NONE;
  PyObject* answer = answer_of(*bound, decision);
  return answer == nullptr ? nullptr : Py_BuildValue("(LN)", static_cast<long long>(task), answer);
}

PyObject* call_tick(PyObject* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords) {
  static constexpr const char* kNames[] = {"now"};
  PyObject* a[1] = {};
  Bound* bound = bound_of(self);
  int64_t now;
  if (bound == nullptr || !take_args("tick", kNames, 1, 1, args, given, keywords, a) || !take_int64("tick", "now", a[0], &now)) return nullptr;
  bound->core->tick(now);
  Py_RETURN_NONE;
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(kFunction)), METH_FASTCALL | METH_KEYWORDS, doc};
}

PyMethodDef kSchedulerMethods[] = {
    method<call_admit>("admit", "admit(now, deadline=None, segment=0, tenant=0) -> handle, or -1"),
    method<call_decide>("decide", "decide(task, exit, confidence, now, gate, delta, label, pool, max_prob, margin, entropy, lse) -> Decision"),
    method<call_decide_rows>("_decide_rows", "_decide_rows(tasks, exit, confidences, now) -> codes or None"),
    method<call_poll>("poll", "poll(now) -> (task, Decision) or None"),
    method<call_tick>("tick", "tick(now)"),
    method<call_observe>("observe", "observe(segment, node, batch, duration_ns)"),
    method<call_observe_link>("observe_link", "observe_link(src, dst, nbytes, duration_ns, now=None)"),
    method<call_observe_queue>("observe_queue", "observe_queue(node, length, out_length=0)"),
    method<call_finish>("finish", "finish(task, confidence=nan) -> bool"),
};

// The named hot methods as C functions bound to `self`; `answers` are the Decision objects that `decide` hands out.
py::dict bind(const py::object& self, const py::list& answers, py::object from_code) {
  Bound& bound = self.cast<Bound&>();
  const auto& model = bound.core->model();
  const size_t want = 4 + static_cast<size_t>(model.nodes) * model.config.codecs;
  if (answers.size() != want) throw py::value_error("bind: answers must hold " + std::to_string(want) + " decisions, got " + std::to_string(answers.size()));
  bound.clear();
  bound.from_code = std::move(from_code);
  for (py::handle answer : answers) bound.answers.push_back(answer.inc_ref().ptr());
  return fastee::bindings::bound_functions(self, &bound, kScheduler, kSchedulerMethods);
}

std::vector<double> array(const py::dict& config, const char* name, std::vector<py::ssize_t> shape) {
  const auto values = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(config[name]);
  if (!values) {
    PyErr_Clear();
    throw py::type_error(std::string("Scheduler: ") + name + " must be an array of numbers");
  }
  bool fits = values.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string want, got;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && values.shape(i) == shape[i];
    want += (i ? ", " : "") + std::to_string(shape[i]);
  }
  for (py::ssize_t i = 0; i < values.ndim(); ++i) got += (i ? ", " : "") + std::to_string(values.shape(i));
  if (!fits) throw py::value_error(std::string("Scheduler: ") + name + " must have shape [" + want + "], got [" + got + "]");
  return {values.data(), values.data() + values.size()};
}

// Only the numbers of the chosen policy are there; the others keep their defaults.
fastee::sched::Params params_of(const py::dict& d) {
  fastee::sched::Params p;
  const auto take = [&](const char* name, auto& field) {
    if (d.contains(name)) field = d[name].cast<std::remove_reference_t<decltype(field)>>();
  };
#define FASTEE_TAKE(field) take(#field, p.field)
  FASTEE_TAKE(patience), FASTEE_TAKE(delta), FASTEE_TAKE(students), FASTEE_TAKE(adapt), FASTEE_TAKE(raw_offload), FASTEE_TAKE(t_o);
  FASTEE_TAKE(t_q1), FASTEE_TAKE(t_q2), FASTEE_TAKE(q_max), FASTEE_TAKE(takeover), FASTEE_TAKE(a), FASTEE_TAKE(b), FASTEE_TAKE(z);
  FASTEE_TAKE(period), FASTEE_TAKE(t_min), FASTEE_TAKE(t_max), FASTEE_TAKE(mu), FASTEE_TAKE(mu_min), FASTEE_TAKE(mu_max);
  FASTEE_TAKE(weight), FASTEE_TAKE(report_age), FASTEE_TAKE(alpha), FASTEE_TAKE(tiers), FASTEE_TAKE(cuts), FASTEE_TAKE(layer_cost);
  FASTEE_TAKE(offload_cost), FASTEE_TAKE(explore), FASTEE_TAKE(cloud), FASTEE_TAKE(side_information), FASTEE_TAKE(train);
  FASTEE_TAKE(whole_batch), FASTEE_TAKE(range), FASTEE_TAKE(u_threshold), FASTEE_TAKE(inf_threshold), FASTEE_TAKE(counts);
#undef FASTEE_TAKE
  return p;
}

Config config_of(const py::dict& d) {
  Config c;
  const auto mean = py::array::ensure(d["mean"]);
  const auto wire = py::array::ensure(d["wire_bytes"]);
  if (!mean || mean.ndim() != 3) throw py::value_error("Scheduler: mean must have shape [S, N, NB]");
  if (!wire || wire.ndim() != 2) throw py::value_error("Scheduler: wire_bytes must have shape [S, NC]");
  const py::ssize_t s = mean.shape(0), n = mean.shape(1), nb = mean.shape(2), nc = wire.shape(1);
  if (s < 1 || s > 1024 || n < 1 || n > 1024 || nc < 1 || nc > 64)
    throw py::value_error("Scheduler: at most 1024 segments, 1024 nodes and 64 codecs, at least one of each, got " + std::to_string(s) +
                          ", " + std::to_string(n) + ", " + std::to_string(nc));
  c.segments = static_cast<int>(s);
  c.nodes = static_cast<int>(n);
  c.codecs = static_cast<int>(nc);
  c.batch_sizes = d["batch_sizes"].cast<std::vector<int64_t>>();
  c.mean = array(d, "mean", {s, n, static_cast<py::ssize_t>(c.batch_sizes.size())});
  c.spread = array(d, "spread", {s, n, nb});
  c.wire_bytes = array(d, "wire_bytes", {s, nc});
  c.codec_seconds = array(d, "codec_seconds", {s, nc});
  c.bandwidth = array(d, "bandwidth", {n, n});
  c.delay = array(d, "delay", {n, n});
  if (!d["gain"].is_none()) {
    const auto gain = py::array::ensure(d["gain"]);
    if (!gain || gain.ndim() != 2) throw py::value_error("Scheduler: gain must have shape [K, bins]");
    c.bins = static_cast<int>(gain.shape(1));
    c.gain = array(d, "gain", {s - 1, gain.shape(1)});
  }
  const auto range = d["gain_range"].cast<std::pair<double, double>>();
  c.gain_low = range.first;
  c.gain_high = range.second;
  for (double host : array(d, "hosts", {s, n})) c.hosts.push_back(host != 0);
  c.thresholds = array(d, "thresholds", {s - 1});
  c.medium = d["medium"].cast<std::vector<int64_t>>();
  c.deadline = d["deadline"].cast<int64_t>();
  c.quantile = d["quantile"].cast<double>();
  c.cost_weight = d["cost_weight"].cast<double>();
  c.max_drop = d["max_drop"].cast<double>();
  c.answer_bytes = d["answer_bytes"].cast<int64_t>();
  c.policy = d["policy"].cast<std::string>();
  c.node = d["node"].cast<int>();
  c.home = d["home"].cast<int>();
  c.max_tasks = d["max_tasks"].cast<int64_t>();
  c.seed = d["seed"].cast<uint64_t>();
  c.weight = d["weight"].cast<double>();
  for (py::handle item : d["classes"]) {
    const auto [deadline, quantile, weight] = item.cast<std::tuple<int64_t, double, double>>();
    c.classes.push_back({deadline, quantile, weight});
  }
  c.surcharge = d["surcharge"].cast<std::vector<double>>();
  c.send_ns = d["send_ns"].cast<std::vector<double>>();
  c.eager_limit = d["eager_limit"].cast<int64_t>();
  c.params = params_of(d["params"]);
  // Addresses of functions that numba compiled; `keep` holds them.
  c.rule = reinterpret_cast<fastee::sched::RuleFunction>(d["rule"].cast<uintptr_t>());
  c.rule_reads_node = d["rule_reads_node"].cast<bool>();
  c.custom = reinterpret_cast<fastee::sched::PolicyFunction>(d["custom"].cast<uintptr_t>());
  return c;
}

Int64s decide_batch(Bound& self, const Int64s& tasks, int exit, const Doubles& confidences, int64_t now, const py::object& extra) {
  if (tasks.ndim() != 1 || confidences.ndim() != 1 || tasks.size() != confidences.size())
    throw py::value_error("decide_batch: tasks and confidences must both be [B]");
  const py::ssize_t rows = tasks.size();
  Int64s codes(rows);
  if (extra.is_none()) {
    self.core->decide_batch(tasks.data(), exit, confidences.data(), rows, now, codes.mutable_data());
    return codes;
  }
  const auto given = extra.cast<py::dict>();
  std::vector<fastee::sched::Sample> samples(rows);
  for (py::ssize_t i = 0; i < rows; ++i) samples[i].confidence = confidences.data()[i];
  const auto take = [&](const char* name, auto fastee::sched::Sample::* field) {
    if (!given.contains(name)) return;
    const auto values = given[name].cast<Doubles>();
    if (values.size() != rows) throw py::value_error(std::string("decide_batch: samples['") + name + "'] must be [B]");
    for (py::ssize_t i = 0; i < rows; ++i)
      samples[i].*field = static_cast<std::remove_reference_t<decltype(samples[i].*field)>>(values.data()[i]);
  };
  using fastee::sched::Sample;
  take("gate", &Sample::gate);
  take("delta", &Sample::delta);
  take("label", &Sample::label);
  take("pool", &Sample::pool);
  take("max_prob", &Sample::max_prob);
  take("margin", &Sample::margin);
  take("entropy", &Sample::entropy);
  take("lse", &Sample::lse);
  self.core->decide_batch(tasks.data(), exit, confidences.data(), samples.data(), rows, now, codes.mutable_data());
  return codes;
}

// ns per decision of `rounds` runs of `loop` single decisions each, asked in C++: what the benchmark shows beside the Python call.
py::array_t<double> time_decide(Bound& self, const Int64s& tasks, int exit, const Doubles& confidences, int64_t now, int64_t loop, int64_t rounds) {
  if (tasks.size() == 0 || tasks.size() != confidences.size() || loop < 1 || rounds < 1) throw py::value_error("time_decide: tasks and confidences must both be [B], B >= 1; loop and rounds >= 1");
  py::array_t<double> ns(rounds);
  for (int64_t r = 0, i = 0; r < rounds; ++r) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t k = 0; k < loop; ++k, i = (i + 1) % tasks.size()) self.core->decide(tasks.data()[i], exit, confidences.data()[i], ++now);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    ns.mutable_data()[r] = took.count() / static_cast<double>(loop);
  }
  return ns;
}

template <typename To, typename From, typename Pick>
py::list table(const std::vector<From>& values, int columns, Pick pick) {
  py::list rows;
  for (size_t i = 0; i < values.size(); i += columns) {
    py::list row;
    for (int j = 0; j < columns; ++j) row.append(static_cast<To>(pick(values[i + j])));
    rows.append(row);
  }
  return rows;
}

// [S, N] of one row each: mean + z * deviation.
py::list rows_of(const fastee::sched::Model& m, const double* (fastee::sched::Model::*mean)(int, int) const, double z) {
  py::list rows;
  for (int s = 0; s < m.segments; ++s) {
    std::vector<double> row((m.*mean)(0, s), (m.*mean)(0, s) + m.nodes);
    for (int n = 0; n < m.nodes && z != 0; ++n) row[n] = row[n] + z * m.need_sd(0, s)[n];
    rows.append(py::cast(row));
  }
  return rows;
}

py::dict snapshot(const Bound& self) {
  const auto& core = *self.core;
  const auto& m = core.model();
  const auto& c = core.counters();
  const auto ratio = [](const fastee::sched::Estimator& e) { return e.ratio; };
  const auto same = [](auto value) { return value; };
  py::dict d;
  const std::pair<const char*, int64_t> counts[] = {
      {"admitted", c.admitted}, {"refused_full", c.refused_full}, {"refused_late", c.refused_late}, {"exits", c.exits},
      {"forced", c.forced}, {"late", c.late}, {"continued", c.continued}, {"offloaded", c.offloaded}, {"rejected", c.rejected},
      {"finished", c.finished}, {"stale", c.stale}, {"invalid", c.invalid}, {"clock_backwards", c.clock_backwards},
      {"observed", c.observed}, {"outliers", c.outliers}, {"ignored", c.ignored}, {"waited", c.waited},
      {"refused_queue", c.refused_queue}, {"changes", c.changes}, {"live", core.live()}, {"waiting", core.waiting()}, {"capacity", core.capacity()}};
  for (const auto& [name, value] : counts) d[name] = value;
  d["per_exit"] = core.per_exit();
  d["exit_probability"] = m.exit_probability();
  d["segment_ratio"] = table<double>(m.time_estimators(), m.nodes, ratio);
  d["link_ratio"] = table<double>(m.rate_estimators(), m.nodes, ratio);
  d["queue"] = m.queue();
  d["node_up"] = table<bool>(m.node_up(), m.nodes, same)[0];
  d["link_up"] = table<bool>(m.link_up(), m.nodes, same);
  d["next_answer_ns"] = rows_of(m, &fastee::sched::Model::need_mean, m.config.quantile);
  d["completion_ns"] = rows_of(m, &fastee::sched::Model::togo, 0.0);
  for (const auto& [name, values] : core.policy_state()) d[name] = values;
  return d;
}

}  // namespace

py::dict fastee::bindings::bound_functions(const py::object& self, void* core, const char* kind, std::span<PyMethodDef> table) {
  const auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(core, kind, [](PyObject* c) { Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(c))); }));
  if (!capsule) throw py::error_already_set();
  PyCapsule_SetContext(capsule.ptr(), py::object(self).release().ptr());
  py::dict functions;
  for (PyMethodDef& def : table) {
    const auto function = py::reinterpret_steal<py::object>(PyCFunction_New(&def, capsule.ptr()));
    if (!function) throw py::error_already_set();
    functions[def.ml_name] = function;
  }
  return functions;
}

Scheduler& fastee::bindings::scheduler_of(py::handle object) { return *object.cast<Bound&>().core; }

PYBIND11_MODULE(_C, m) {
  m.doc() = "The scheduler core; use fastee.scheduling.Scheduler.";
  py::class_<Bound>(m, "Scheduler")
      .def(py::init([](const py::dict& config) { return std::make_unique<Bound>(config_of(config), config["keep"]); }), py::arg("config"))
      .def("bind", &bind, py::arg("answers"), py::arg("from_code"))
      .def("decide_batch", &decide_batch, py::arg("tasks"), py::arg("exit"), py::arg("confidences"), py::arg("now"), py::arg("samples"))
      .def("set_node_up", [](Bound& self, int node, bool up) { self.core->set_node_up(node, up); })
      .def("set_link_up", [](Bound& self, int src, int dst, bool up) { self.core->set_link_up(src, dst, up); })
      .def("time_decide", &time_decide)
      // For the benchmark alone: the same call with the arguments and the answer converted by pybind11.
      .def("decide_pybind11", [](Bound& self, int64_t task, int exit, double confidence, int64_t now) {
        return py::reinterpret_steal<py::object>(answer_of(self, self.core->decide(task, exit, confidence, now)));
      })
      .def("rebatch", [](const Bound& self, int segment, int64_t rows, int64_t others, int64_t merge_ns) {
        return self.core->rebatch(segment, rows, others, merge_ns);
      })
      .def("set_idle", [](Bound& self, bool idle) { self.core->set_idle(idle); })
      .def("next_tick", [](const Bound& self) { return self.core->next_tick(); })
      .def("admit_interval", [](const Bound& self) { return self.core->admit_interval(); })
      .def("snapshot", &snapshot);
  fastee::bindings::bind_net(m);
  fastee::bindings::bind_plan(m);
  fastee::bindings::bind_sim(m);
  fastee::bindings::bind_spatial(m);
}
