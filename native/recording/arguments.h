// The arguments of a call as what tells calls apart, and what changes from call to call: Op.gather, for the usual ones.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "recording/objects.h"

namespace genie::recording {

// How an argument enters a recorded call: genie_dynamo/device/record.py.
enum class Kind : std::uint8_t { kTensor, kNumber, kScalar, kLiteral };

[[nodiscard]] Kind kind_of(const std::string& name);                // throws py::value_error

// Strong references in order; the first few need no memory of their own.
class Items {
 public:
  Items() = default;
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items();
  // False, and an exception is set, where there is nothing to add.
  [[nodiscard]] bool add(py::object item);
  [[nodiscard]] bool add(PyObject* item) { return add(py::reinterpret_borrow<py::object>(item)); }
  // A tuple of them; null with an exception set.
  [[nodiscard]] py::object tuple() const;

 private:
  static constexpr std::size_t kNear = 16;
  std::array<PyObject*, kNear> near_{};
  std::vector<PyObject*> far_;
  std::size_t size_ = 0;
};

struct Signature {
  std::vector<Kind> kinds;                                          // of the op's arguments, in order
  std::vector<std::pair<std::string, Kind>> by_name;

  Signature(const py::tuple& kinds, const py::dict& by_name);
};

class Arguments {
 public:
  Arguments(const Objects& objects, const Signature& signature) : objects_(objects), signature_(signature) {}
  // False where the call is none of the usual ones; an exception may be set then, and is not meant for anybody.
  [[nodiscard]] bool take(PyObject* args, PyObject* kwargs);

  [[nodiscard]] py::object key() const { return key_.tuple(); }
  [[nodiscard]] py::object inputs() const { return inputs_.tuple(); }
  [[nodiscard]] py::object scalars() const { return scalars_.tuple(); }
  // Of the first argument, where that is a tensor: its storage and what that holds.
  [[nodiscard]] const Held& first() const noexcept { return first_; }

 private:
  [[nodiscard]] bool take(PyObject* value, Kind kind);
  [[nodiscard]] bool take_tensor(PyObject* tensor);
  [[nodiscard]] bool take_literal(PyObject* value);

  const Objects& objects_;
  const Signature& signature_;
  Items key_, inputs_, scalars_;
  Held first_;
};

}  // namespace genie::recording
