// Kernels of the device: each answers the calls that are like one that came before, and leaves the others to the
// general kernel that it stands before, which is Python's and makes calls known.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "recording/arguments.h"

namespace genie::recording {

class Kernel {
 public:
  Kernel(std::shared_ptr<const Objects> objects, py::object general)
      : objects_(std::move(objects)), general_(std::move(general)) {}
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  virtual ~Kernel() = default;

  // New reference; null with an exception set.
  [[nodiscard]] PyObject* call(PyObject* args, PyObject* kwargs) const;
  virtual int traverse(visitproc visit, void* arg) const;
  virtual void clear() { general_ = py::object(); }

 protected:
  // The result, null with an exception set; nothing where the call is not like one that came before, and nothing has
  // been recorded.
  [[nodiscard]] virtual std::optional<py::object> answer(PyObject* args, PyObject* kwargs) const = 0;
  [[nodiscard]] const Objects& objects() const noexcept { return *objects_; }

 private:
  std::shared_ptr<const Objects> objects_;
  py::object general_;
};

// A kernel of an op whose calls are known by their arguments.
class RecordingKernel : public Kernel {
 public:
  // calls: key -> Call, which others add to.
  RecordingKernel(std::shared_ptr<const Objects> objects, py::object general, const py::object& op, py::dict calls)
      : Kernel(std::move(objects), std::move(general)),
        calls_(std::move(calls)),
        signature_(op.attr("kinds"), op.attr("kind_by_name")) {}
  int traverse(visitproc visit, void* arg) const override;
  void clear() override;

 protected:
  struct Known {
    PyObject* args;
    const Held& first;                                              // see Arguments::first
    py::object call, inputs, scalars;
  };
  [[nodiscard]] std::optional<py::object> answer(PyObject* args, PyObject* kwargs) const final;
  [[nodiscard]] virtual std::optional<py::object> record(const Known& known) const = 0;
  [[nodiscard]] py::object node_of(const Known& known) const;

 private:
  py::object calls_;
  Signature signature_;
};

// An op that makes new tensors.
class Functional final : public RecordingKernel {
 public:
  Functional(std::shared_ptr<const Objects> objects, py::object general, const py::object& op);

 protected:
  [[nodiscard]] std::optional<py::object> record(const Known& known) const override;

 private:
  [[nodiscard]] std::optional<py::object> several(const Known& known) const;
  Py_ssize_t num_returns_;
  bool has_list_;
};

// A view op: its first argument is what is viewed.
class View final : public RecordingKernel {
 public:
  using RecordingKernel::RecordingKernel;

 protected:
  [[nodiscard]] std::optional<py::object> record(const Known& known) const override;
};

// An op that gives its first argument, a tensor or a list of them, new content.
class InPlace final : public RecordingKernel {
 public:
  using RecordingKernel::RecordingKernel;

 protected:
  [[nodiscard]] std::optional<py::object> record(const Known& known) const override;
};

// aten.copy_ between tensors of the device that have one shape.
class Copy final : public Kernel {
 public:
  using Kernel::Kernel;

 protected:
  [[nodiscard]] std::optional<py::object> answer(PyObject* args, PyObject* kwargs) const override;
};

}  // namespace genie::recording
