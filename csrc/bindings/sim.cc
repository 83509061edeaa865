// The simulator for Python: a world as a dict of arrays in, arrays out.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "sim/simulator.h"

namespace py = pybind11;
using fastee::sim::Fault;
using fastee::sim::FaultKind;
using fastee::sim::Line;
using fastee::sim::Link;
using fastee::sim::Medium;
using fastee::sim::Simulator;
using fastee::sim::Trace;
using fastee::sim::World;

namespace {

template <typename T>
std::vector<T> column(const py::dict& d, const char* name) {
  if (!d.contains(name)) throw py::key_error(std::string("Simulator: ") + name + " is missing");
  const auto values = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(d[name]);
  if (!values) {
    PyErr_Clear();
    throw py::type_error(std::string("Simulator: ") + name + " must be an array of numbers");
  }
  return {values.data(), values.data() + values.size()};
}

template <typename T>
T number(const py::dict& d, const char* name) {
  if (!d.contains(name)) throw py::key_error(std::string("Simulator: ") + name + " is missing");
  return d[name].cast<T>();
}

World world_of(const py::dict& d) {
  World w;
  w.nodes = number<int>(d, "nodes");
  w.segments = number<int>(d, "segments");
  w.codecs = number<int>(d, "codecs");
  w.max_batch = number<int>(d, "max_batch");
  w.service = column<int64_t>(d, "service");
  w.jitter = column<double>(d, "jitter");
  w.batch = column<int64_t>(d, "batch");
  w.price = column<double>(d, "price");
  w.byte_price = number<double>(d, "byte_price");
  w.wire_bytes = column<int64_t>(d, "wire_bytes");
  w.codec_ns = column<int64_t>(d, "codec_ns");
  w.answer_bytes = number<int64_t>(d, "answer_bytes");
  for (const auto& [at, cum] : number<std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>>(d, "traces")) w.traces.push_back({at, cum});
  for (const auto& [rate, trace, offset] : number<std::vector<std::tuple<int64_t, int, int64_t>>>(d, "media")) w.media.push_back({rate, trace, offset});
  for (const auto& [source, target, medium, delay, loss, duplicate] :
       number<std::vector<std::tuple<int, int, int, int64_t, double, double>>>(d, "links"))
    w.links.push_back({source, target, medium, delay, loss, duplicate});
  w.members = number<std::vector<std::vector<int>>>(d, "members");
  w.home = column<int64_t>(d, "home");
  for (const auto& [time, kind, target, span, value] : number<std::vector<std::tuple<int64_t, int, int, int64_t, double>>>(d, "faults"))
    w.faults.push_back({time, static_cast<FaultKind>(kind), target, span, value});
  w.arrival = column<int64_t>(d, "arrival");
  w.source = column<int64_t>(d, "source");
  w.deadline = column<int64_t>(d, "deadline");
  w.row = column<int64_t>(d, "row");
  w.confidence = column<double>(d, "confidence");
  w.gate = column<double>(d, "gate");
  w.delta = column<double>(d, "delta");
  w.label = column<int64_t>(d, "label");
  w.pool = column<int64_t>(d, "pool");
  w.rows = number<int64_t>(d, "rows");
  w.detect = number<int64_t>(d, "detect");
  w.grace = number<int64_t>(d, "grace");
  w.timeout = number<int64_t>(d, "timeout");
  w.report = number<int64_t>(d, "report");
  w.stale = number<int64_t>(d, "stale");
  w.credit = number<int>(d, "credit");
  w.attempts = number<int>(d, "attempts");
  w.seed = number<uint64_t>(d, "seed");
  w.log = number<bool>(d, "log");
  return w;
}

template <typename T>
py::array_t<T> copy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The simulator with the Python objects whose schedulers it drives.
struct Held {
  py::list schedulers;
  std::unique_ptr<Simulator> core;
};

py::dict results(const Held& held) {
  const auto& r = held.core->results;
  py::dict d;
  d["latency"] = copy(r.latency);
  d["wire"] = copy(r.wire);
  d["compute"] = copy(r.compute);
  d["cost"] = copy(r.cost);
  d["node"] = copy(r.node);
  d["exit"] = copy(r.exit);
  d["outcome"] = copy(r.outcome);
  d["attempts"] = copy(r.attempts);
  d["forced"] = copy(r.forced);
  d["hops"] = copy(r.hops);
  d["busy"] = copy(held.core->busy);
  d["ran"] = copy(held.core->ran);
  d["sent"] = copy(held.core->sent);
  return d;
}

py::dict totals(const Held& held) {
  const auto& t = held.core->totals;
  py::dict d;
  const std::pair<const char*, int64_t> all[] = {{"events", t.events}, {"duplicates", t.duplicates}, {"messages", t.messages}, {"lost", t.lost},
                                                 {"retries", t.retries}, {"batches", t.batches}, {"now", t.now}, {"ended", t.ended}, {"peak", t.peak}};
  for (const auto& [name, value] : all) d[name] = value;
  return d;
}

py::array_t<int64_t> log_of(const Held& held) {
  static_assert(sizeof(Line) == 7 * sizeof(int64_t));
  const auto& log = held.core->log;
  return py::array_t<int64_t>({static_cast<py::ssize_t>(log.size()), py::ssize_t{7}}, log.empty() ? nullptr : &log.front().time);
}

// Schedulers made one after another lie together on the heap, and events visit them in no order: a thousand of them on 4 KB pages
// outgrow the TLB. On a Zen 4, processes in turn: 1.26 to 1.47 million events per second with them, 1.02 to 1.22 without. Advice only.
void on_huge_pages([[maybe_unused]] const std::vector<fastee::sched::Scheduler*>& schedulers) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21, kLeast = 4 * kPage, kMostEach = uintptr_t{1} << 20;
  if (schedulers.empty()) return;
  const auto [first, last] = std::minmax_element(schedulers.begin(), schedulers.end(), std::less<>());
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(*first) + kPage - 1) & ~(kPage - 1), end = reinterpret_cast<uintptr_t>(*last) & ~(kPage - 1);
  if (end < begin + kLeast || end - begin > schedulers.size() * kMostEach) return;  // few, or not together
  void* const at = reinterpret_cast<void*>(begin);
  madvise(at, end - begin, MADV_HUGEPAGE);
#ifdef MADV_COLLAPSE
  madvise(at, end - begin, MADV_COLLAPSE);  // at once, not when the kernel comes by; Linux 6.1
#else
  madvise(at, end - begin, 25);
#endif
#endif
}

}  // namespace

namespace fastee::bindings {

void bind_sim(py::module_& m) {
  py::class_<Held>(m, "Simulator")
      .def(py::init([](const py::dict& world, const py::list& schedulers) {
             std::vector<sched::Scheduler*> cores;
             for (py::handle each : schedulers) cores.push_back(&scheduler_of(each));
             on_huge_pages(cores);
             auto held = std::make_unique<Held>();
             held->schedulers = schedulers;
             held->core = std::make_unique<Simulator>(world_of(world), std::move(cores));
             return held;
           }),
           py::arg("world"), py::arg("schedulers"))
      .def("run", [](Held& held, int64_t most) { return held.core->run(most); }, py::arg("most"), py::call_guard<py::gil_scoped_release>())
      .def("results", &results)
      .def("totals", &totals)
      .def("log", &log_of);
}

}  // namespace fastee::bindings
