// _native.Recorder: what stands in native/recording/, as callables for torch.library.
#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <utility>

#include "bindings/bindings.h"
#include "recording/kernels.h"

namespace py = pybind11;

namespace genie {
namespace {

using recording::Kernel;
using recording::Objects;

// A type of its own, not pybind11's: a call then costs no look-up of overloads.
struct Callable {
  PyObject_HEAD
  Kernel* kernel;
};

[[nodiscard]] Kernel* kernel_of(PyObject* self) { return reinterpret_cast<Callable*>(self)->kernel; }

PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  try {
    return kernel_of(self)->call(args, kwargs);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return kernel_of(self) != nullptr ? kernel_of(self)->traverse(visit, arg) : 0;
}

int clear(PyObject* self) {
  if (kernel_of(self) != nullptr) kernel_of(self)->clear();
  return 0;
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  delete kernel_of(self);
  type->tp_free(self);
  Py_DECREF(type);
}

[[nodiscard]] PyTypeObject* kernel_type() {
  static PyTypeObject* const type = [] {
    static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&call)},
                                  {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                                  {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                                  {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                                  {0, nullptr}};
    static PyType_Spec spec = {"genie_dynamo._native.Kernel", sizeof(Callable), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  }();
  if (type == nullptr) throw py::error_already_set();
  return type;
}

template <class K, class... Args>
[[nodiscard]] py::object make(Args&&... args) {
  auto kernel = std::make_unique<K>(std::forward<Args>(args)...);
  PyTypeObject* const type = kernel_type();
  auto made = py::reinterpret_steal<py::object>(type->tp_alloc(type, 0));
  if (!made) throw py::error_already_set();
  reinterpret_cast<Callable*>(made.ptr())->kernel = kernel.release();
  return made;
}

}  // namespace

void bind_recording(py::module_& module) {
  py::class_<Objects, std::shared_ptr<Objects>>(module, "Recorder", "See genie_dynamo/device/quick.py.")
      .def(py::init<const py::dict&>(), py::arg("objects"), "objects: what recording touches, by name.")
      .def_readwrite("enabled", &Objects::enabled, "False: every call goes to the general kernel.")
      .def(
          "functional",
          [](const std::shared_ptr<Objects>& self, py::object general, const py::object& op) {
            return make<recording::Functional>(self, std::move(general), op);
          },
          py::arg("general"), py::arg("op"))
      .def(
          "view",
          [](const std::shared_ptr<Objects>& self, py::object general, const py::object& op) {
            return make<recording::View>(self, std::move(general), op, op.attr("calls"));
          },
          py::arg("general"), py::arg("op"))
      .def(
          "in_place",
          [](const std::shared_ptr<Objects>& self, py::object general, const py::object& op, py::dict calls) {
            return make<recording::InPlace>(self, std::move(general), op, std::move(calls));
          },
          py::arg("general"), py::arg("op"), py::arg("calls"))
      .def(
          "copy",
          [](const std::shared_ptr<Objects>& self, py::object general) {
            return make<recording::Copy>(self, std::move(general));
          },
          py::arg("general"));
}

}  // namespace genie
