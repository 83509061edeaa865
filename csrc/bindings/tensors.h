// torch's tensors without torch's headers: through the table of C functions that torch.Tensor offers (DLPack 1.3's exchange API), 0.1 to
// 0.4 us a tensor. Hold the interpreter's lock.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>

#include "fastee/dlpack.h"

namespace fastee::bindings {

namespace py = pybind11;

// A tensor to be: the memory is `owner`'s until the tensor dies, on whatever thread.
struct Lent {
  uint32_t major = 1, minor = 0;
  void* context = nullptr;
  void (*deleter)(Lent*) = nullptr;
  uint64_t flags = 0;
  DLTensor t{};
  std::shared_ptr<void> owner;  // from here on ours
  std::array<int64_t, 16> sizes{};
};

class Exchange {
 public:
  // Null where torch is too old to have it (before 2.10).
  static const Exchange* get() {
    static const Exchange* found = [] {
      const auto* made = new Exchange();  // never destroyed: the interpreter may be gone by then
      return made->table_ != nullptr ? made : nullptr;
    }();
    return found;
  }

  // Reads a tensor; false for anything else, with no Python error set. The sizes are the tensor's own memory.
  bool view(py::handle object, DLTensor* out) const {
    if (!PyObject_TypeCheck(object.ptr(), type_)) return false;
    if (table_->tensor_from_python(object.ptr(), out) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // A contiguous CPU tensor of at most 8 dimensions over `data`.
  py::object tensor(std::shared_ptr<void> owner, void* data, DLDataType dtype, int ndim, const int64_t* shape) const {
    auto lent = std::make_unique<Lent>();
    lent->minor = table_->minor, lent->owner = std::move(owner);
    lent->deleter = [](Lent* dead) { delete dead; };
    lent->t = {data, {kDLCPU, 0}, ndim, dtype, lent->sizes.data(), lent->sizes.data() + 8, 0};
    int64_t count = 1;
    for (int i = ndim - 1; i >= 0; --i) lent->sizes[i] = shape[i], lent->sizes[8 + i] = count, count *= shape[i];
    void* made = nullptr;
    if (table_->to_python(lent.get(), &made) != 0) throw py::error_already_set();
    lent.release();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
  }

 private:
  struct Table {
    uint32_t major, minor;
    void *previous, *allocate, *managed_from_python;
    int (*to_python)(Lent*, void**);
    int (*tensor_from_python)(void*, DLTensor*);
    void* current_stream;
  };

  Exchange() {
    const py::object type = py::module_::import("torch").attr("Tensor");
    type_ = reinterpret_cast<PyTypeObject*>(type.ptr());
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* table = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) PyErr_Clear();
    else if (table->major == 1 && table->tensor_from_python != nullptr && table->to_python != nullptr) table_ = table;
  }

  PyTypeObject* type_ = nullptr;
  const Table* table_ = nullptr;
};

inline bool contiguous(const DLTensor& t) {
  int64_t count = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.strides != nullptr && t.shape[i] != 1 && t.strides[i] != count) return false;
    count *= t.shape[i];
  }
  return true;
}

}  // namespace fastee::bindings
