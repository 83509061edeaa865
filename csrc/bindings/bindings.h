// What each room adds to fastee._C: one function per room, defined in csrc/bindings/<room>.cc, called by module.cc.
#pragma once
#include <pybind11/pybind11.h>

namespace fastee::bindings {

void bind_spatial(pybind11::module_& m);

}  // namespace fastee::bindings
