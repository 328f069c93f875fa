#include "recording/arguments.h"

#include <pybind11/stl.h>

#include <utility>

namespace genie::recording {

Kind kind_of(const std::string& name) {
  if (name == "tensor") return Kind::kTensor;
  if (name == "number") return Kind::kNumber;
  if (name == "scalar") return Kind::kScalar;
  if (name == "literal") return Kind::kLiteral;
  throw py::value_error("an argument is a tensor, a number, a scalar or a literal, not a " + name);
}

Signature::Signature(const py::tuple& given, const py::dict& named) {
  for (const py::handle& kind : given) kinds.push_back(kind_of(py::cast<std::string>(kind)));
  for (const auto& [name, kind] : named) {
    by_name.emplace_back(py::cast<std::string>(name), kind_of(py::cast<std::string>(kind)));
  }
}

Items::~Items() {
  for (std::size_t i = 0; i < size_ && i < kNear; ++i) Py_DECREF(near_[i]);
  for (PyObject* const item : far_) Py_DECREF(item);
}

bool Items::add(py::object item) {
  if (!item) return false;
  if (size_ < kNear) {
    near_[size_] = item.release().ptr();
  } else {
    far_.push_back(item.ptr());
    item.release();
  }
  ++size_;
  return true;
}

py::object Items::tuple() const {
  PyObject* const made = PyTuple_New(static_cast<Py_ssize_t>(size_));
  for (std::size_t i = 0; made != nullptr && i < size_; ++i) {
    PyObject* const item = i < kNear ? near_[i] : far_[i - kNear];
    Py_INCREF(item);
    PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), item);
  }
  return py::reinterpret_steal<py::object>(made);
}

bool Arguments::take(PyObject* args, PyObject* kwargs) {
  const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(args));
  if (count > signature_.kinds.size()) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (!take(PyTuple_GET_ITEM(args, static_cast<Py_ssize_t>(i)), signature_.kinds[i])) return false;
  }
  if (kwargs == nullptr || PyDict_GET_SIZE(kwargs) == 0) return true;
  PyObject* name = nullptr;
  PyObject* value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &value) != 0;) {
    const auto held = py::reinterpret_borrow<py::object>(value);
    const Kind* kind = nullptr;
    for (const auto& [known, of] : signature_.by_name) {
      if (PyUnicode_CompareWithASCIIString(name, known.c_str()) == 0) kind = &of;
    }
    if (kind == nullptr || !key_.add(name) || !take(held.ptr(), *kind)) return false;
  }
  return true;
}

bool Arguments::take(PyObject* value, Kind kind) {
  if (objects_.is_tensor(value)) return take_tensor(value);
  const bool is_int = PyLong_CheckExact(value) != 0;
  if (kind == Kind::kNumber && (is_int || PyList_CheckExact(value) != 0 || PyTuple_CheckExact(value) != 0)) {
    return is_int ? key_.add(value) : key_.add(py::reinterpret_steal<py::object>(PySequence_Tuple(value)));
  }
  if ((kind == Kind::kScalar || kind == Kind::kTensor) && (is_int || PyFloat_CheckExact(value) != 0)) {
    return key_.add(reinterpret_cast<PyObject*>(Py_TYPE(value))) && scalars_.add(value);
  }
  if (PyList_Check(value) != 0 || PyTuple_Check(value) != 0) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(value));   // reading a tensor may run anything
    if (!items || !key_.add(py::reinterpret_steal<py::object>(PyLong_FromSsize_t(PyTuple_GET_SIZE(items.ptr()))))) {
      return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
      if (!take(PyTuple_GET_ITEM(items.ptr(), i), kind)) return false;
    }
    return true;
  }
  if (objects_.is_node(value)) return false;
  return kind == Kind::kNumber ? key_.add(value) : take_literal(value);
}

bool Arguments::take_tensor(PyObject* tensor) {
  Held held = objects_.held_by(tensor);
  py::object node = held.value ? objects_.value(tensor, held.value.ptr()) : py::object();
  if (!node || !key_.add(objects_.node_layout.get(node.ptr()))) return false;
  if (!first_.storage) {
    first_ = std::move(held);
    first_.node = node;
  }
  return inputs_.add(std::move(node));
}

bool Arguments::take_literal(PyObject* value) {
  const bool by_digits = PyFloat_CheckExact(value) != 0 || PyComplex_CheckExact(value) != 0;   // -0.0 is not 0.0
  const auto said = by_digits ? py::reinterpret_steal<py::object>(PyObject_Repr(value))
                              : py::reinterpret_borrow<py::object>(value);
  return said && key_.add(py::reinterpret_steal<py::object>(
                     PyTuple_Pack(2, reinterpret_cast<PyObject*>(Py_TYPE(value)), said.ptr())));
}

}  // namespace genie::recording
