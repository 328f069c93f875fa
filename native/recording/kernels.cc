#include "recording/kernels.h"

#include <string>

namespace genie::recording {
namespace {

constexpr Py_ssize_t kMaxViews = 64;

[[nodiscard]] bool is_sequence(PyObject* value) { return PyList_Check(value) != 0 || PyTuple_Check(value) != 0; }

}  // namespace

PyObject* Kernel::call(PyObject* args, PyObject* kwargs) const {
  const py::object general = general_;                 // whatever happens to this kernel meanwhile
  if (objects_->enabled) {
    std::optional<py::object> result = answer(args, kwargs);
    if (result) return result->release().ptr();
    if (PyErr_Occurred() != nullptr) {
      if (PyErr_ExceptionMatches(PyExc_Exception) == 0) return nullptr;    // an interrupt
      PyErr_Clear();                                   // what it was the general kernel meets too, and says
    }
  }
  if (!general) {
    PyErr_SetString(PyExc_RuntimeError, "this kernel was taken apart with its module");
    return nullptr;
  }
  return PyObject_Call(general.ptr(), args, kwargs);
}

int Kernel::traverse(visitproc visit, void* arg) const {
  Py_VISIT(general_.ptr());
  return 0;
}

int RecordingKernel::traverse(visitproc visit, void* arg) const {
  Py_VISIT(calls_.ptr());
  return Kernel::traverse(visit, arg);
}

void RecordingKernel::clear() {
  calls_ = py::object();
  Kernel::clear();
}

std::optional<py::object> RecordingKernel::answer(PyObject* args, PyObject* kwargs) const {
  if (!calls_ || objects().is_long() != 0 || !objects().has_usual_dtype()) return {};
  Arguments arguments(objects(), signature_);
  if (!arguments.take(args, kwargs)) return {};
  const py::object key = arguments.key();
  if (!key) return {};
  PyObject* const call = PyDict_GetItemWithError(calls_.ptr(), key.ptr());
  if (call == nullptr || objects().call_random.get(call) == Py_True) return {};
  const Known known{args, arguments.first(), py::reinterpret_borrow<py::object>(call), arguments.inputs(), arguments.scalars()};
  if (!known.inputs || !known.scalars) return {};
  return record(known);
}

py::object RecordingKernel::node_of(const Known& known) const {
  return objects().make_node(known.call.ptr(), known.inputs, known.scalars,
                             objects().call_single.get(known.call.ptr()));
}

Functional::Functional(std::shared_ptr<const Objects> objects, py::object general, const py::object& op)
    : RecordingKernel(std::move(objects), std::move(general), op, op.attr("calls")) {
  const py::list returns = op.attr("target").attr("_schema").attr("returns");
  num_returns_ = static_cast<Py_ssize_t>(returns.size());
  has_list_ = false;
  for (const py::handle& returned : returns) {
    const std::string type = py::str(returned.attr("type"));
    has_list_ = has_list_ || type.find("List") != std::string::npos;
  }
}

std::optional<py::object> Functional::record(const Known& known) const {
  if (objects().call_single.get(known.call.ptr()) == Py_None) return several(known);
  const py::object node = node_of(known);
  return node ? objects().make_tensor(node) : py::object();
}

std::optional<py::object> Functional::several(const Known& known) const {
  const auto outs = py::reinterpret_borrow<py::object>(objects().call_outs.get(known.call.ptr()));
  const Py_ssize_t count = PyTuple_GET_SIZE(outs.ptr());
  if (count == 0 || (num_returns_ != 1 && has_list_)) return {};
  const bool as_list = num_returns_ == 1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const path = PyTuple_GET_ITEM(PyTuple_GET_ITEM(outs.ptr(), i), 0);
    if (PyTuple_GET_SIZE(path) != 1) return {};
    const Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(path, 0));
    if (as_list ? index != i : index < 0 || index >= num_returns_) return {};
  }
  const auto made = py::reinterpret_steal<py::object>(as_list ? PyList_New(count) : PyTuple_New(num_returns_));
  const py::object parent = made ? node_of(known) : py::object();
  if (!parent) return py::object();
  PyObject* const exact = objects().call_exact.get(known.call.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const out = PyTuple_GET_ITEM(outs.ptr(), i);
    const py::object node = objects().item(parent, PyTuple_GET_ITEM(out, 0), PyTuple_GET_ITEM(out, 1), exact);
    py::object tensor = node ? objects().make_tensor(node) : py::object();
    if (!tensor) return py::object();
    if (as_list) {
      PyList_SET_ITEM(made.ptr(), i, tensor.release().ptr());
    } else {
      PyTuple_SET_ITEM(made.ptr(), PyLong_AsSsize_t(PyTuple_GET_ITEM(PyTuple_GET_ITEM(out, 0), 0)),
                       tensor.release().ptr());
    }
  }
  for (Py_ssize_t i = 0; !as_list && i < num_returns_; ++i) {
    if (PyTuple_GET_ITEM(made.ptr(), i) == nullptr) {        // an output that the op leaves out
      Py_INCREF(Py_None);
      PyTuple_SET_ITEM(made.ptr(), i, Py_None);
    }
  }
  return made;
}

std::optional<py::object> View::record(const Known& known) const {
  const Objects& all = objects();
  PyObject* const out = all.call_single.get(known.call.ptr());
  if (PyTuple_GET_SIZE(known.args) == 0 || out == Py_None || all.has_lazy_bits() ||
      PyTuple_GET_SIZE(known.inputs.ptr()) != 1 || PyTuple_GET_SIZE(known.scalars.ptr()) != 0) {
    return {};
  }
  PyObject* const tensor = PyTuple_GET_ITEM(known.args, 0);
  const auto seen = py::reinterpret_borrow<py::object>(
      all.node_layout.get(PyTuple_GET_ITEM(known.inputs.ptr(), 0)));
  if (all.layout_dtype.get(out) != all.layout_dtype.get(seen.ptr())) return {};
  const py::object memory = all.memory(known.first);
  if (!memory) return {};
  auto views = py::reinterpret_borrow<py::object>(all.memory_views.get(memory.ptr()));
  const int has = views.is_none() ? 0 : PyDict_Contains(views.ptr(), out);
  if (has < 0) return {};
  if (has == 0) {
    const py::object node = node_of(known);
    if (!node) return py::object();
    if (views.is_none() || PyDict_GET_SIZE(views.ptr()) >= kMaxViews) {
      views = py::reinterpret_steal<py::object>(PyDict_New());
      if (!views) return py::object();
      all.memory_views.set(memory.ptr(), views.ptr());
    }
    if (PyDict_SetItem(views.ptr(), out, node.ptr()) != 0) return py::object();
    all.memory_plain.set(memory.ptr(), Py_False);
  }
  return all.alias(tensor, seen.ptr(), out);
}

std::optional<py::object> InPlace::record(const Known& known) const {
  if (PyTuple_GET_SIZE(known.args) == 0) return {};
  const Objects& all = objects();
  const auto target = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(known.args, 0));
  if (all.call_single.get(known.call.ptr()) != Py_None) {
    if (!all.is_tensor(target.ptr())) return {};
    const py::object node = node_of(known);
    if (!node) return py::object();
    const auto seen = py::reinterpret_borrow<py::object>(all.node_layout.get(known.first.node.ptr()));
    return all.give(target.ptr(), known.first, seen, node) ? target : py::object();
  }
  const auto outs = py::reinterpret_borrow<py::object>(all.call_outs.get(known.call.ptr()));
  if (!is_sequence(target.ptr())) return {};
  const auto tensors = py::reinterpret_steal<py::object>(PySequence_Tuple(target.ptr()));
  if (!tensors || PyTuple_GET_SIZE(tensors.ptr()) != PyTuple_GET_SIZE(outs.ptr())) return {};
  const py::object parent = node_of(known);
  if (!parent) return py::object();
  PyObject* const exact = all.call_exact.get(known.call.ptr());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(outs.ptr()); ++i) {
    PyObject* const out = PyTuple_GET_ITEM(outs.ptr(), i);
    const py::object node = all.item(parent, PyTuple_GET_ITEM(out, 0), PyTuple_GET_ITEM(out, 1), exact);
    PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    const Held held = node ? all.held_by(tensor) : Held{};
    if (!held.value || !all.give(tensor, held, {}, node)) return py::object();
  }
  return py::none();
}

std::optional<py::object> Copy::answer(PyObject* args, PyObject* kwargs) const {
  const Objects& all = objects();
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  if ((kwargs != nullptr && PyDict_GET_SIZE(kwargs) != 0) || count < 2 || count > 3) return {};
  PyObject* const to = PyTuple_GET_ITEM(args, 0);
  PyObject* const from = PyTuple_GET_ITEM(args, 1);
  if (!all.is_tensor(to) || !all.is_tensor(from)) return {};
  const Held target = all.held_by(to);
  const Held source = target.value ? all.held_by(from) : Held{};
  const py::object value = source.value ? all.value(from, source.value.ptr()) : py::object();
  const py::object seen = value ? all.layout(to) : py::object();
  if (!seen) return {};
  PyObject* const made = all.node_layout.get(value.ptr());
  if (made == Py_None) return {};
  const int fits = made == seen.ptr() ? 1 : PyObject_RichCompareBool(all.layout_shape.get(made),
                                                                     all.layout_shape.get(seen.ptr()), Py_EQ);
  if (fits != 1) return {};
  return all.give(to, target, seen, value) ? py::reinterpret_borrow<py::object>(to) : py::object();
}

}  // namespace genie::recording
