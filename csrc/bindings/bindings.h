// What each room adds to fastee._C: one function per room, defined in csrc/bindings/<room>.cc, called by module.cc.
#pragma once
#include <pybind11/pybind11.h>

#include <span>

namespace fastee::sched {
class Scheduler;
}

namespace fastee::bindings {

void bind_net(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_sim(pybind11::module_& m);
void bind_spatial(pybind11::module_& m);

// The functions of `table` as C functions over a capsule named `kind` that points to `core`, a part of `self`, which lives as long as they do.
pybind11::dict bound_functions(const pybind11::object& self, void* core, const char* kind, std::span<PyMethodDef> table);

// The core inside a fastee._C.Scheduler; the object must outlive the use. Throws py::cast_error for anything else.
sched::Scheduler& scheduler_of(pybind11::handle object);

}  // namespace fastee::bindings
