// fastee._C.SpatialModel and SpatialSearch; the checks with the user's words stand in fastee.planning.spatial.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "bindings/bindings.h"
#include "plan/spatial.h"
#include "plan/spatial_search.h"

namespace py = pybind11;
using fastee::plan::SpatialLayer;
using fastee::plan::SpatialLinks;
using fastee::plan::SpatialModel;
using fastee::plan::SpatialNet;
using fastee::plan::SpatialPlan;
using fastee::plan::SpatialSearch;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ints = std::vector<int>;

std::vector<double> values(const Doubles& a) { return {a.data(), a.data() + a.size()}; }

SpatialPlan plan_of(const std::pair<Ints, Ints>& p) { return {p.first, p.second, fastee::plan::kNever}; }

py::tuple tuple_of(const SpatialPlan& p) { return py::make_tuple(p.bounds, p.cuts, p.latency); }

// Split vectors [R, N-1] in [0, 1].
int check_vectors(const SpatialModel& m, const Doubles& vectors) {
  if (vectors.ndim() != 2 || vectors.shape(0) < 1 || vectors.shape(1) != m.providers() - 1)
    throw std::invalid_argument("spatial: vectors must be [R, " + std::to_string(m.providers() - 1) + "]");
  for (py::ssize_t r = 0; r < vectors.shape(0); ++r)
    for (py::ssize_t k = 0; k < vectors.shape(1); ++k) {
      const double u = vectors.at(r, k);
      if (!(u >= 0 && u <= 1) || (k > 0 && u < vectors.at(r, k - 1)))
        throw std::invalid_argument("spatial: vectors must rise within [0, 1]");
    }
  return static_cast<int>(vectors.shape(0));
}

std::unique_ptr<SpatialModel> make_model(const std::vector<Ints>& shapes, const std::vector<Ints>& inputs, const Doubles& row_bytes,
                                         const Doubles& row_macs, int input_h, double input_row_bytes, const Doubles& times, const Doubles& tail) {
  SpatialNet net;
  net.input_h = input_h;
  net.input_row_bytes = input_row_bytes;
  if (inputs.size() != shapes.size() || row_bytes.size() != static_cast<py::ssize_t>(shapes.size()) || row_macs.size() != row_bytes.size())
    throw std::invalid_argument("spatial: shapes, inputs, row_bytes and row_macs must be of one length");
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Ints& s = shapes[i];
    if (s.size() != 6) throw std::invalid_argument("spatial: a shape is kernel, stride, padding, dilation, in_h, out_h");
    net.layers.push_back({s[0], s[1], s[2], s[3], s[4], s[5], row_bytes.data()[i], row_macs.data()[i], inputs[i]});
  }
  return std::make_unique<SpatialModel>(std::move(net), values(times), values(tail));
}

}  // namespace

namespace fastee::bindings {

// The GIL stays held: a model has scratch memory, and two threads that shared one would meet in it.
void bind_spatial(py::module_& m) {
  py::class_<SpatialModel>(m, "SpatialModel")
      .def(py::init(&make_model), py::arg("shapes"), py::arg("inputs"), py::arg("row_bytes"), py::arg("row_macs"), py::arg("input_h"),
           py::arg("input_row_bytes"), py::arg("times"), py::arg("tail"))
      .def("set_links",
           [](SpatialModel& self, const std::vector<double>& rates, const std::vector<bool>& up, double requester, double latency, bool contention) {
             SpatialLinks links;
             links.rates = rates;
             links.up.assign(up.begin(), up.end());
             links.requester = requester;
             links.latency = latency;
             links.contention = contention;
             self.set_links(std::move(links));
           },
           py::arg("rates"), py::arg("up"), py::arg("requester"), py::arg("latency"), py::arg("contention"))
      .def_property_readonly("root", &SpatialModel::root)
      .def_property_readonly("cut_points", &SpatialModel::cut_points)
      .def_property_readonly("work", [](const SpatialModel& self) { return self.work; })
      .def("latency", [](const SpatialModel& self, const Ints& bounds, const Ints& cuts) { return self.latency(bounds, cuts); }, py::arg("bounds"),
           py::arg("cuts"))
      .def("finish_times",
           [](const SpatialModel& self, const Ints& bounds, const Ints& cuts) {
             std::vector<double> finish;
             const double end = self.latency(bounds, cuts, &finish);
             return py::make_tuple(end, finish);
           },
           py::arg("bounds"), py::arg("cuts"))
      .def("part",
           [](const SpatialModel& self, int provider, int begin, int end, int lo, int hi) {
             if (provider < 0 || provider >= self.providers() || begin < 0 || end <= begin || end > self.layers() || lo < 0 || hi < lo ||
                 hi > self.height(end) || !self.is_cut_point(begin) || !self.is_cut_point(end))
               throw std::invalid_argument("spatial: part: no such provider, volume or rows");
             const auto p = self.part(provider, begin, end, {lo, hi});
             return py::make_tuple(p.seconds, p.input.lo, p.input.hi);
           })
      // What one call of the recursion costs without the way through Python: seconds are the caller's to measure.
      .def("latency_repeated",
           [](const SpatialModel& self, const Ints& bounds, const Ints& cuts, int times) {
             double sum = 0;
             for (int i = 0; i < times; ++i) sum += self.latency(bounds, cuts);
             return sum;
           })
      .def("volume_cost",
           [](const SpatialModel& self, int begin, int end, const Doubles& vectors) {
             const int count = check_vectors(self, vectors);
             if (begin < 0 || end <= begin || end > self.layers() || !self.is_cut_point(begin) || !self.is_cut_point(end))
               throw std::invalid_argument("spatial: volume_cost: no such volume");
             const auto& points = self.cut_points();
             std::vector<double> bytes(points.size()), macs(points.size());
             self.volume_costs(end, vectors.data(), count, bytes.data(), macs.data());
             const auto p = std::lower_bound(points.begin(), points.end(), begin) - points.begin();
             return py::make_tuple(bytes[p], macs[p]);
           })
      .def("lcpss",
           [](const SpatialModel& self, const Doubles& vectors, double alpha) {
             const int count = check_vectors(self, vectors);
             std::vector<double> scores;
             auto bounds = self.lcpss(vectors.data(), count, alpha, &scores);
             return py::make_tuple(bounds, scores);
           },
           py::arg("vectors"), py::arg("alpha"))
      .def("exact",
           [](const SpatialModel& self, double bound, int64_t max_steps, std::optional<size_t> front) -> py::object {
             const auto plan = fastee::plan::spatial_exact(self, bound, max_steps, front.value_or(static_cast<size_t>(-1)));
             return plan ? py::object(tuple_of(*plan)) : py::none();
           },
           py::arg("bound"), py::arg("max_steps"), py::arg("front") = py::none());
  py::class_<SpatialSearch>(m, "SpatialSearch")
      .def(py::init([](const SpatialModel& model, const std::vector<std::pair<Ints, Ints>>& starts, uint64_t seed, bool beam, int64_t window) {
             std::vector<SpatialPlan> plans;
             for (const auto& s : starts) plans.push_back(plan_of(s));
             return std::make_unique<SpatialSearch>(model, plans, seed, beam, window);
           }),
           py::arg("model"), py::arg("starts"), py::arg("seed"), py::arg("beam"), py::arg("window"), py::keep_alive<1, 2>())
      .def("run", &SpatialSearch::run, py::arg("work"))
      .def_property_readonly("tried", &SpatialSearch::tried)
      .def("best", [](const SpatialSearch& self) { return tuple_of(self.best()); });
}

}  // namespace fastee::bindings
