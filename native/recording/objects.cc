#include "recording/objects.h"

#include <structmember.h>

#include <string>
#include <utility>

namespace genie::recording {
namespace {

[[nodiscard]] py::object part(const py::dict& given, const char* name) { return given[name]; }

[[nodiscard]] py::object pair(PyObject* first, PyObject* second) {
  return py::reinterpret_steal<py::object>(PyTuple_Pack(2, first, second));
}

// A new object of a class with __slots__, without its __init__.
[[nodiscard]] py::object blank(const py::object& type) {
  auto* const of = reinterpret_cast<PyTypeObject*>(type.ptr());
  return py::reinterpret_steal<py::object>(of->tp_alloc(of, 0));
}

}  // namespace

Slot::Slot(const py::handle& owner, const char* name) {
  const py::object found = owner.attr(name);
  if (!Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type)) throw py::type_error(std::string(name) + " is no slot");
  const PyMemberDef* const member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
  if (member->type != T_OBJECT_EX) throw py::type_error(std::string(name) + " holds no object");
  offset_ = member->offset;
}

Objects::Objects(const py::dict& given)
    : tensor_type(part(given, "tensor_type")), storage_of(part(given, "storage_of")), shifted(part(given, "shifted")),
      node_type(part(given, "node_type")), memory_type(part(given, "memory_type")), memory_module(part(given, "memory_module")),
      layouts(part(given, "layouts")), scatter_calls(part(given, "scatter_calls")), item_calls(part(given, "item_calls")),
      fresh(part(given, "fresh")), lazy_bits(part(given, "lazy_bits")), engine(part(given, "engine")), read(part(given, "read")),
      write(part(given, "write")), layout_of(part(given, "layout_of")),
      default_dtype(part(given, "default_dtype")), usual_dtype(part(given, "usual_dtype")),
      node_call(node_type, "call"), node_inputs(node_type, "inputs"), node_scalars(node_type, "scalars"),
      node_layout(node_type, "layout"), node_value(node_type, "value"),
      memory_node(memory_type, "node"), memory_plain(memory_type, "plain"), memory_views(memory_type, "views"),
      memory_reference(memory_type, "reference"),
      call_single(part(given, "call_type"), "single"), call_random(part(given, "call_type"), "random"),
      call_exact(part(given, "call_type"), "exact"), call_outs(part(given, "call_type"), "outs"),
      layout_shape(part(given, "layout_type"), "shape"), layout_stride(part(given, "layout_type"), "stride"),
      layout_offset(part(given, "layout_type"), "offset"), layout_dtype(part(given, "layout_type"), "dtype"),
      layout_contiguous(part(given, "layout_type"), "contiguous"),
      genie_(py::str("genie")), next_cut_(py::str("next_cut")), create_(py::str("create")), shape_(py::str("shape")),
      dtype_(py::str("dtype")), stride_of_(tensor_type.attr("stride")),
      storage_offset_of_(tensor_type.attr("storage_offset")), zero_(py::int_(0)), make_item_(part(given, "make_item")) {
  if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type is no class");
  for (py::object* const name : {&genie_, &next_cut_, &create_, &shape_, &dtype_}) {
    PyObject* own = name->release().ptr();
    PyUnicode_InternInPlace(&own);
    *name = py::reinterpret_steal<py::object>(own);
  }
}

Held Objects::held_by(PyObject* tensor) const {
  py::object storage = called(storage_of, tensor);
  if (!storage) return {};
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(storage.ptr(), genie_.ptr()));
  if (!value) return {};
  return {std::move(storage), std::move(value), {}};
}

py::object Objects::layout(PyObject* tensor) const {
  const auto shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, shape_.ptr()));
  const auto stride = called(stride_of_, tensor);
  const auto offset = called(storage_offset_of_, tensor);
  const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, dtype_.ptr()));
  if (!shape || !stride || !offset || !dtype) return {};
  const auto key = py::reinterpret_steal<py::object>(
      PyTuple_Pack(4, shape.ptr(), stride.ptr(), offset.ptr(), dtype.ptr()));
  if (!key) return {};
  PyObject* const found = PyDict_GetItemWithError(layouts.ptr(), key.ptr());
  if (found != nullptr) return py::reinterpret_borrow<py::object>(found);
  return PyErr_Occurred() != nullptr ? py::object() : called(layout_of, tensor);
}

py::object Objects::value(PyObject* tensor, PyObject* held) const {
  if (is_node(held)) return py::reinterpret_borrow<py::object>(held);
  if (!is_memory(held)) {
    PyErr_SetString(PyExc_TypeError, "a storage of the device holds a Node or a Memory");
    return {};
  }
  auto current = py::reinterpret_borrow<py::object>(memory_node.get(held));
  if (memory_plain.get(held) == Py_True) return current;
  if (!has_lazy_bits()) {
    const py::object seen = layout(tensor);
    if (!seen) return {};
    if (seen.ptr() == node_layout.get(current.ptr())) return current;
    PyObject* const views = memory_views.get(held);
    PyObject* const known = PyDict_Check(views) ? PyDict_GetItemWithError(views, seen.ptr()) : nullptr;
    if (known != nullptr) return py::reinterpret_borrow<py::object>(known);
    if (PyErr_Occurred() != nullptr) return {};
  }
  return called(read, tensor, held);
}

int Objects::is_long() const {
  const auto limit = py::reinterpret_steal<py::object>(PyObject_GetAttr(engine.ptr(), next_cut_.ptr()));
  if (!limit) return -1;
  const Py_ssize_t count = PyLong_AsSsize_t(limit.ptr());
  if (count == -1 && PyErr_Occurred() != nullptr) return -1;
  return PyList_GET_SIZE(fresh.ptr()) > count ? 1 : 0;
}

py::object Objects::make_node(PyObject* call, const py::object& inputs, const py::object& scalars,
                              PyObject* layout) const {
  py::object node = blank(node_type);
  if (node) {
    node_call.set(node.ptr(), call);
    node_inputs.set(node.ptr(), inputs.ptr());
    node_scalars.set(node.ptr(), scalars.ptr());
    node_layout.set(node.ptr(), layout);
    node_value.set(node.ptr(), Py_None);
  }
  return node;
}

py::object Objects::make_tensor(const py::object& node) const {
  PyObject* const out = node_layout.get(node.ptr());
  PyObject* const create = PyDict_GetItemWithError(memory_module.ptr(), create_.ptr());   // another in a forked process
  if (create == nullptr) return {};
  py::object tensor = called(py::reinterpret_borrow<py::object>(create), layout_shape.get(out), layout_dtype.get(out));
  if (tensor && layout_contiguous.get(out) != Py_True) {
    tensor = called(shifted, tensor.ptr(), layout_shape.get(out), layout_stride.get(out), zero_.ptr());
  }
  if (!tensor) return {};
  const py::object owner = called(storage_of, tensor.ptr());
  if (!owner || PyObject_SetAttr(owner.ptr(), genie_.ptr(), node.ptr()) != 0) return {};
  const auto reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(owner.ptr(), nullptr));
  if (!reference || !append_fresh(reference.ptr())) return {};
  return tensor;
}

bool Objects::append_fresh(PyObject* reference) const { return PyList_Append(fresh.ptr(), reference) == 0; }

py::object Objects::memory(const Held& held) const {
  if (is_memory(held.value.ptr())) return held.value;
  py::object made = blank(memory_type);
  if (!made) return {};
  const auto reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(held.storage.ptr(), nullptr));
  if (!reference) return {};
  memory_node.set(made.ptr(), held.value.ptr());
  memory_plain.set(made.ptr(), Py_True);
  memory_views.set(made.ptr(), Py_None);
  memory_reference.set(made.ptr(), reference.ptr());
  if (PyObject_SetAttr(held.storage.ptr(), genie_.ptr(), made.ptr()) != 0) return {};
  return made;
}

py::object Objects::alias(PyObject* tensor, PyObject* seen, PyObject* out) const {
  const auto shift =
      py::reinterpret_steal<py::object>(PyNumber_Subtract(layout_offset.get(out), layout_offset.get(seen)));
  if (!shift) return {};
  return called(shifted, tensor, layout_shape.get(out), layout_stride.get(out), shift.ptr());
}

py::object Objects::item(const py::object& parent, PyObject* path, PyObject* layout, PyObject* exact) const {
  if (PyTuple_GET_SIZE(path) == 1) {
    const py::object key = pair(PyTuple_GET_ITEM(path, 0), exact);
    if (!key) return {};
    const auto call = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(item_calls.ptr(), key.ptr()));
    if (call) {
      const auto inputs = py::reinterpret_steal<py::object>(PyTuple_Pack(1, parent.ptr()));
      const auto scalars = py::reinterpret_steal<py::object>(PyTuple_New(0));
      return inputs && scalars ? make_node(call.ptr(), inputs, scalars, layout) : py::object();
    }
    if (PyErr_Occurred() != nullptr) return {};
  }
  return called(make_item_, parent.ptr(), path, layout, exact);
}

bool Objects::give_through_python(PyObject* tensor, const py::object& value) const {
  return static_cast<bool>(called(write, tensor, value.ptr()));
}

bool Objects::give(PyObject* tensor, const Held& to, py::object seen, const py::object& value) const {
  const py::object& held = to.value;
  PyObject* const made = node_layout.get(value.ptr());
  if (is_node(held.ptr())) {
    if (made != node_layout.get(held.ptr())) return give_through_python(tensor, value);
    const auto reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(to.storage.ptr(), nullptr));
    return reference && PyObject_SetAttr(to.storage.ptr(), genie_.ptr(), value.ptr()) == 0 && append_fresh(reference.ptr());
  }
  if (!is_memory(held.ptr()) || has_lazy_bits()) return give_through_python(tensor, value);
  const auto whole = py::reinterpret_borrow<py::object>(memory_node.get(held.ptr()));
  const auto own = py::reinterpret_borrow<py::object>(node_layout.get(whole.ptr()));
  if (memory_plain.get(held.ptr()) == Py_True) seen = own;
  if (!seen) seen = layout(tensor);
  if (!seen) return false;
  py::object changed = value;
  if (!seen.is(own)) {
    // The memory's value with the elements of this view replaced, as memory.write says; what else there is, it knows.
    PyObject* const call_of_whole = node_call.get(whole.ptr());
    const bool laid_out = call_of_whole == Py_None || call_exact.get(call_of_whole) == Py_True;
    if (made == Py_None || !laid_out || layout_dtype.get(seen.ptr()) != layout_dtype.get(own.ptr()) ||
        layout_dtype.get(made) != layout_dtype.get(seen.ptr())) {
      return give_through_python(tensor, value);
    }
    const int same = PyObject_RichCompareBool(layout_shape.get(made), layout_shape.get(seen.ptr()), Py_EQ);
    const py::object key = same == 1 ? pair(own.ptr(), seen.ptr()) : py::object();
    const auto call = py::reinterpret_borrow<py::object>(
        key ? PyDict_GetItemWithError(scatter_calls.ptr(), key.ptr()) : nullptr);
    if (PyErr_Occurred() != nullptr) return false;
    if (!call) return give_through_python(tensor, value);
    const py::object inputs = pair(whole.ptr(), value.ptr());
    const auto scalars = py::reinterpret_steal<py::object>(PyTuple_New(0));
    changed = inputs && scalars ? make_node(call.ptr(), inputs, scalars, own.ptr()) : py::object();
    if (!changed) return false;
  } else if (made != own.ptr()) {
    return give_through_python(tensor, value);
  }
  const auto reference = py::reinterpret_borrow<py::object>(memory_reference.get(held.ptr()));
  const auto views = py::reinterpret_borrow<py::object>(memory_views.get(held.ptr()));   // go when all is in place
  memory_node.set(held.ptr(), changed.ptr());
  memory_views.set(held.ptr(), Py_None);
  return append_fresh(reference.ptr());
}

}  // namespace genie::recording
