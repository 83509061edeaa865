// The planners and the threshold search for Python. What a re-planning loop calls at every change of a link are METH_FASTCALL
// functions over a capsule; the rest goes through pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "plan/joint.h"
#include "plan/pipeline.h"
#include "plan/search.h"

namespace py = pybind11;

namespace {

using fastee::plan::Account;
using fastee::plan::Objective;
using fastee::plan::Pipeline;
using fastee::plan::Placement;
using fastee::plan::Problem;
using fastee::plan::Replanner;
using fastee::plan::ThresholdSearch;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::vector<double> flat(const py::dict& d, const char* name) {
  const auto values = Doubles::ensure(d[name]);
  if (!values) {
    PyErr_Clear();
    throw py::type_error(std::string("plan: ") + name + " must be an array of numbers");
  }
  return {values.data(), values.data() + values.size()};
}

Problem problem_of(const py::dict& d) {
  Problem p;
  p.segments = d["segments"].cast<int>();
  p.nodes = d["nodes"].cast<int>();
  p.codecs = d["codecs"].cast<int>();
  p.source = d["source"].cast<int>();
  const int objective = d["objective"].cast<int>();
  if (objective < 0 || objective > 2) throw py::value_error("plan: objective must be in 0..2, got " + std::to_string(objective));
  p.objective = static_cast<Objective>(objective);
  p.run = flat(d, "run");
  p.head = flat(d, "head");
  p.wire_bytes = flat(d, "wire_bytes");
  p.codec_seconds = flat(d, "codec_seconds");
  p.bandwidth = flat(d, "bandwidth");
  p.delay = flat(d, "delay");
  p.leave = flat(d, "leave");
  p.loss = flat(d, "loss");
  p.memory = flat(d, "memory");
  p.room = flat(d, "room");
  p.price = flat(d, "price");
  p.second_price = d["second_price"].cast<double>();
  p.byte_price = d["byte_price"].cast<double>();
  p.answer_bytes = d["answer_bytes"].cast<double>();
  p.deadline = d["deadline"].cast<double>();
  p.max_drop = d["max_drop"].cast<double>();
  p.choose_exits = d["choose_exits"].cast<bool>();
  p.max_width = d["max_width"].cast<int>();
  return p;
}

py::dict dict_of(const Placement& plan) {
  py::dict d;
  d["found"] = plan.found;
  d["place"] = plan.place;
  d["codec"] = plan.codec;
  d["on"] = std::vector<bool>(plan.on.begin(), plan.on.end());
  d["value"] = plan.value;
  d["bound"] = plan.bound;
  d["exact"] = plan.exact;
  d["states"] = plan.states;
  return d;
}

void check_length(const char* name, size_t got, size_t want) {
  if (got != want) throw py::value_error(std::string("account: ") + name + " must hold " + std::to_string(want) + " numbers, got " + std::to_string(got));
}

py::dict account(const Pipeline& self, std::vector<int> place, std::vector<int> codec, const std::vector<bool>& on) {
  const Problem& p = self.problem();
  check_length("place", place.size(), p.segments);
  check_length("codec", codec.size(), p.segments);
  check_length("on", on.size(), p.segments - 1);
  int from = p.source;
  for (int s = 0; s < p.segments; ++s) {
    if (place[s] < 0 || place[s] >= p.nodes)
      throw py::value_error("account: place must hold nodes in 0.." + std::to_string(p.nodes - 1) + ", got " + std::to_string(place[s]));
    if (place[s] != from && (codec[s] < 0 || codec[s] >= p.codecs))
      throw py::value_error("account: codec must be in 0.." + std::to_string(p.codecs - 1) + " where the carry moves, got " + std::to_string(codec[s]) +
                            " at segment " + std::to_string(s));
    from = place[s];
  }
  Placement plan;
  plan.place = std::move(place);
  plan.codec = std::move(codec);
  plan.on.assign(on.begin(), on.end());
  const Account a = self.account(plan);
  py::dict d;
  d["value"] = a.value;
  d["seconds"] = a.seconds;
  d["cost"] = a.cost;
  d["bottleneck"] = a.bottleneck;
  d["bytes"] = a.bytes;
  d["drop"] = a.drop;
  d["reach"] = a.reach;
  d["memory"] = a.memory;
  d["fits"] = self.fits(plan);
  return d;
}

constexpr char kReplanner[] = "fastee.Replanner";

Replanner* replanner_of(PyObject* self) { return static_cast<Replanner*>(PyCapsule_GetPointer(self, kReplanner)); }

bool take_count(const char* call, Py_ssize_t given, Py_ssize_t want) {
  if (given == want) return true;
  PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, got %zd", call, want, given);
  return false;
}

bool take_index(const char* call, const char* name, PyObject* value, int size, int* out) {
  const long long v = PyLong_AsLongLong(value);
  if (v == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s must be an int, got %R", call, name, value);
    return false;
  }
  if (v < 0 || v >= size) {
    PyErr_Format(PyExc_ValueError, "%s: %s must be in 0..%d, got %lld", call, name, size - 1, v);
    return false;
  }
  *out = static_cast<int>(v);
  return true;
}

bool take_number(const char* call, const char* name, PyObject* value, double high, bool positive, double* out) {
  *out = PyFloat_AsDouble(value);
  if (*out == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s must be a number, got %s", call, name, Py_TYPE(value)->tp_name);
    return false;
  }
  if (std::isfinite(*out) && *out <= high && (positive ? *out > 0 : *out >= 0)) return true;
  PyErr_Format(PyExc_ValueError, "%s: %s must be finite and %s%s, got %R", call, name, positive ? "> 0" : ">= 0", high == 1.0 ? " and <= 1" : "", value);
  return false;
}

constexpr double kAny = 1e300;

PyObject* call_set_link(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  Replanner* r = replanner_of(self);
  int src, dst;
  double bandwidth, delay;
  if (r == nullptr || !take_count("set_link", given, 4) || !take_index("set_link", "src", args[0], r->tables().problem().nodes, &src) ||
      !take_index("set_link", "dst", args[1], r->tables().problem().nodes, &dst) || !take_number("set_link", "bandwidth", args[2], kAny, false, &bandwidth) ||
      !take_number("set_link", "delay", args[3], kAny, false, &delay))
    return nullptr;
  r->tables().set_link(src, dst, bandwidth, delay);
  Py_RETURN_NONE;
}

PyObject* call_set_speed(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  Replanner* r = replanner_of(self);
  int node;
  double factor;
  if (r == nullptr || !take_count("set_speed", given, 2) || !take_index("set_speed", "node", args[0], r->tables().problem().nodes, &node) ||
      !take_number("set_speed", "factor", args[1], kAny, true, &factor))
    return nullptr;
  r->tables().set_speed(node, factor);
  Py_RETURN_NONE;
}

PyObject* call_set_leave(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  Replanner* r = replanner_of(self);
  int exit;
  double share;
  if (r == nullptr || !take_count("set_leave", given, 2) || !take_index("set_leave", "exit", args[0], r->tables().problem().segments - 1, &exit) ||
      !take_number("set_leave", "share", args[1], 1.0, false, &share))
    return nullptr;
  r->tables().set_leave(exit, share);
  Py_RETURN_NONE;
}

PyObject* call_replan(PyObject* self, PyObject* const*, Py_ssize_t given) {
  Replanner* r = replanner_of(self);
  if (r == nullptr || !take_count("replan", given, 0)) return nullptr;
  return PyBool_FromLong(r->replan());
}

PyMethodDef method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function)), METH_FASTCALL, doc};
}

PyMethodDef kReplannerMethods[] = {
    method("set_link", call_set_link, "set_link(src, dst, bandwidth, delay)"),
    method("set_speed", call_set_speed, "set_speed(node, factor)"),
    method("set_leave", call_set_leave, "set_leave(exit, share)"),
    method("replan", call_replan, "replan() -> bool"),
};

std::unique_ptr<ThresholdSearch> make_search(const Doubles& score, const py::array_t<int8_t, py::array::c_style>& loss, const Doubles& cost) {
  if (score.ndim() != 2 || loss.ndim() != 2 || cost.ndim() != 1 || loss.shape(0) != score.shape(0) || loss.shape(1) != score.shape(1) ||
      cost.shape(0) != score.shape(1) + 1)
    throw py::value_error("search: expected score [N, K], loss [N, K] and cost [K + 1]");
  return std::make_unique<ThresholdSearch>(score.data(), loss.data(), cost.data(), score.shape(0), static_cast<int>(score.shape(1)));
}

py::tuple evaluate(const ThresholdSearch& self, const std::vector<double>& thresholds) {
  if (static_cast<int>(thresholds.size()) != self.exits())
    throw py::value_error("evaluate: thresholds must hold " + std::to_string(self.exits()) + " numbers, got " + std::to_string(thresholds.size()));
  for (double t : thresholds)
    if (std::isnan(t)) throw py::value_error("evaluate: thresholds must not hold NaN");
  auto value = self.evaluate(thresholds.data());
  return py::make_tuple(value.cost, value.loss, std::move(value.exits));
}

py::dict search(const ThresholdSearch& self, const std::vector<std::vector<double>>& grid, int64_t max_loss, bool refine, int64_t max_policies) {
  fastee::plan::SearchResult r;
  {
    py::gil_scoped_release free;
    r = self.search(grid, max_loss, refine, max_policies);
  }
  py::dict d;
  d["thresholds"] = r.thresholds;
  d["cost"] = r.value.cost;
  d["loss"] = r.value.loss;
  d["exits"] = r.value.exits;
  d["exact"] = r.exact;
  d["grid_cost"] = r.grid_cost;
  d["policies"] = r.policies;
  return d;
}

}  // namespace

void fastee::bindings::bind_plan(py::module_& m) {
  py::class_<Pipeline>(m, "Pipeline")
      .def(py::init([](const py::dict& problem) { return std::make_unique<Pipeline>(problem_of(problem)); }), py::arg("problem"))
      .def("solve", [](Pipeline& self) {
        py::gil_scoped_release free;
        Placement plan = self.solve();
        py::gil_scoped_acquire held;
        return dict_of(plan);
      })
      .def("account", &account, py::arg("place"), py::arg("codec"), py::arg("on"));
  py::class_<Replanner>(m, "Replanner")
      .def(py::init([](const py::dict& problem, double hysteresis) { return std::make_unique<Replanner>(problem_of(problem), hysteresis); }),
           py::arg("problem"), py::arg("hysteresis"))
      .def("bind", [](const py::object& self) {
        return fastee::bindings::bound_functions(self, &self.cast<Replanner&>(), kReplanner, kReplannerMethods);
      })
      .def("current", [](const Replanner& self) { return dict_of(self.current()); })
      .def("best_value", &Replanner::best_value)
      .def("account", [](Replanner& self, std::vector<int> place, std::vector<int> codec, const std::vector<bool>& on) {
        return account(self.tables(), std::move(place), std::move(codec), on);
      });
  py::class_<ThresholdSearch>(m, "ThresholdSearch")
      .def(py::init(&make_search), py::arg("score"), py::arg("loss"), py::arg("cost"))
      .def("evaluate", &evaluate, py::arg("thresholds"))
      .def("quantile_grid", &ThresholdSearch::quantile_grid, py::arg("levels"))
      .def("search", &search, py::arg("grid"), py::arg("max_loss"), py::arg("refine"), py::arg("max_policies"));
}
