// Recording an op of the device, for calls like one that came before: see genie_dynamo/device/quick.py.
//
// What is recorded are objects of Python classes with __slots__ (genie_dynamo/device/nodes.py, memory.py). They stay
// the one definition of what is recorded; here their slots are read and written where they lie. All of it holds the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

namespace genie::recording {

namespace py = pybind11;

// A slot of a class with __slots__. Empty slots and those that hold None are told apart nowhere here.
class Slot {
 public:
  Slot() = default;
  // Throws py::type_error where the class has no such slot.
  Slot(const py::handle& owner, const char* name);

  // Borrowed; None where it is empty.
  [[nodiscard]] PyObject* get(PyObject* object) const noexcept {
    PyObject* const value = *at(object);
    return value != nullptr ? value : Py_None;
  }
  void set(PyObject* object, PyObject* value) const noexcept {      // takes a reference of its own
    Py_INCREF(value);
    PyObject* const old = *at(object);
    *at(object) = value;
    Py_XDECREF(old);                                                // last: it may run anything
  }

 private:
  [[nodiscard]] PyObject** at(PyObject* object) const noexcept {
    return reinterpret_cast<PyObject**>(reinterpret_cast<std::byte*>(object) + offset_);
  }
  Py_ssize_t offset_ = 0;
};

// What a tensor's storage holds. All null: it is no tensor of the device, and an exception is set.
struct Held {
  py::object storage;
  py::object value;                                                 // a Node or a Memory
  py::object node;                                                  // the tensor's own value, where it was asked for
};

// Everything of Python that recording touches, and the few steps that all kinds of ops share.
struct Objects {
  explicit Objects(const py::dict& given);

  py::object tensor_type, storage_of, shifted;                      // torch's
  py::object node_type, memory_type;
  py::dict memory_module, layouts, scatter_calls, item_calls;
  py::list fresh, lazy_bits;
  py::object engine, read, write, layout_of;                        // slower ways, which also know the rest
  py::object default_dtype, usual_dtype;
  bool enabled = true;

  Slot node_call, node_inputs, node_scalars, node_layout, node_value;
  Slot memory_node, memory_plain, memory_views, memory_reference;
  Slot call_single, call_random, call_exact, call_outs;
  Slot layout_shape, layout_stride, layout_offset, layout_dtype, layout_contiguous;

  [[nodiscard]] bool is_tensor(PyObject* value) const noexcept {
    return PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(tensor_type.ptr())) != 0;
  }
  [[nodiscard]] bool is_node(PyObject* value) const noexcept {
    return reinterpret_cast<PyObject*>(Py_TYPE(value)) == node_type.ptr();
  }
  [[nodiscard]] bool is_memory(PyObject* value) const noexcept {
    return reinterpret_cast<PyObject*>(Py_TYPE(value)) == memory_type.ptr();
  }
  [[nodiscard]] bool has_lazy_bits() const noexcept {
    return PyList_GET_SIZE(lazy_bits.ptr()) > 0 && PyList_GET_ITEM(lazy_bits.ptr(), 0) == Py_True;
  }

  // Under another default dtype calls have other results, which only the general kernels tell apart.
  [[nodiscard]] bool has_usual_dtype() const {
    const auto now = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(default_dtype.ptr()));
    return now.ptr() == usual_dtype.ptr();
  }

  // Null with a Python exception set, as everything below that returns an object.
  [[nodiscard]] Held held_by(PyObject* tensor) const;
  [[nodiscard]] py::object layout(PyObject* tensor) const;
  // The value of a tensor whose storage holds `held`.
  [[nodiscard]] py::object value(PyObject* tensor, PyObject* held) const;
  // Whether the recording is as long as the engine wants it: then Python decides. -1: an exception is set.
  [[nodiscard]] int is_long() const;

  [[nodiscard]] py::object make_node(PyObject* call, const py::object& inputs, const py::object& scalars,
                                     PyObject* layout) const;
  [[nodiscard]] py::object make_tensor(const py::object& node) const;
  // The storage's Memory, made where it holds a Node so far.
  [[nodiscard]] py::object memory(const Held& held) const;
  [[nodiscard]] py::object alias(PyObject* tensor, PyObject* seen, PyObject* out) const;
  // The node of output `index` of a call with several.
  [[nodiscard]] py::object item(const py::object& parent, PyObject* path, PyObject* layout, PyObject* exact) const;
  // Gives a tensor new content. False with an exception set.  seen: the tensor's layout, or null.
  [[nodiscard]] bool give(PyObject* tensor, const Held& held, py::object seen, const py::object& value) const;

 private:
  [[nodiscard]] bool give_through_python(PyObject* tensor, const py::object& value) const;
  [[nodiscard]] bool append_fresh(PyObject* reference) const;
  py::object genie_, next_cut_, create_, shape_, dtype_, stride_of_, storage_offset_of_, zero_, make_item_;
};

// A call of a Python function with arguments that stay the caller's.
template <class... Args>
[[nodiscard]] py::object called(const py::object& function, Args... args) {
  PyObject* const array[] = {args...};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(function.ptr(), array, sizeof...(args), nullptr));
}

}  // namespace genie::recording
