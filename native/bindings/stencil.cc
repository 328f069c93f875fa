#include "bindings/stencil.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace genie {
namespace {

[[nodiscard]] std::byte* address_of(const py::handle& value) {
  return reinterpret_cast<std::byte*>(py::cast<std::uintptr_t>(value));   // Python's addresses are integers
}

void fill(const Stencil& stencil, const py::sequence& values, std::byte* message) {
  if (values.size() != stencil.holes().size()) throw std::invalid_argument("a stencil takes a value for each hole");
  std::memcpy(message, stencil.bytes().data(), stencil.bytes().size());
  std::size_t i = 0;
  for (const Stencil::Hole& hole : stencil.holes()) {
    const py::object value = values[i++];
    std::byte* const to = message + hole.offset;
    switch (hole.kind) {
      case Stencil::Kind::kNumber: Stencil::put_number(to, py::cast<std::uint64_t>(value)); break;
      case Stencil::Kind::kReal: Stencil::put_real(to, py::cast<double>(value)); break;
      case Stencil::Kind::kMemory: std::memcpy(to, address_of(value), hole.size_bytes); break;
    }
  }
}

[[nodiscard]] Stencil::Kind kind_of(const std::string& name) {
  if (name == "number") return Stencil::Kind::kNumber;
  if (name == "real") return Stencil::Kind::kReal;
  if (name == "memory") return Stencil::Kind::kMemory;
  throw std::invalid_argument("a hole is for a number, a real or memory");
}

}  // namespace

Slice filled_slice(const Stencil& stencil, const py::sequence& values) {
  const std::size_t size = stencil.bytes().size();
  const std::shared_ptr<std::byte[]> message(new std::byte[size]);
  fill(stencil, values, message.get());
  return {message.get(), size, message};
}

Landing::Landing(const Stencil& stencil, const py::sequence& into, std::uint64_t first, const py::sequence& frames)
    : stencil_(stencil), first_(first) {
  into_.reserve(into.size());
  for (const py::handle& address : into) into_.push_back(address_of(address));
  const auto memory = std::ranges::count(stencil.holes(), Stencil::Kind::kMemory, &Stencil::Hole::kind);
  if (static_cast<std::size_t>(memory) != into_.size()) {
    throw std::invalid_argument("each hole of memory has an address");
  }
  frames_.reserve(frames.size());
  for (const py::handle& frame : frames) {
    const auto pair = py::cast<py::tuple>(frame);
    frames_.emplace_back(address_of(pair[0]), py::cast<std::size_t>(pair[1]));
  }
}

bool Landing::land(const Message& message) const noexcept {
  if (message.buffers.size() != frames_.size() + 1) return false;
  const Buffer& head = message.buffers.front();
  if (!stencil_.matches({head.data, head.size_bytes})) return false;
  if (first_ != 0 && (stencil_.holes().empty() || Stencil::number_at(head.data + stencil_.holes()[0].offset) != first_)) {
    return false;
  }
  for (std::size_t i = 0; i < frames_.size(); ++i) {
    if (message.buffers[i + 1].size_bytes != frames_[i].second) return false;
  }
  std::size_t next = 0;
  for (const Stencil::Hole& hole : stencil_.holes()) {
    if (hole.kind == Stencil::Kind::kMemory) std::memcpy(into_[next++], head.data + hole.offset, hole.size_bytes);
  }
  for (std::size_t i = 0; i < frames_.size(); ++i) {
    if (frames_[i].first != nullptr) std::memcpy(frames_[i].first, message.buffers[i + 1].data, frames_[i].second);
  }
  return true;
}

std::size_t Landing::copied_bytes() const noexcept {
  std::size_t size = stencil_.memory_bytes();
  for (const auto& [to, bytes] : frames_) size += to == nullptr ? 0 : bytes;
  return size;
}

py::tuple Landing::values(const Message& message) const {
  py::list found;
  for (const Stencil::Hole& hole : stencil_.holes()) {
    const std::byte* at = message.buffers.front().data + hole.offset;
    if (hole.kind == Stencil::Kind::kNumber) found.append(Stencil::number_at(at));
    if (hole.kind == Stencil::Kind::kReal) found.append(Stencil::real_at(at));
  }
  return py::tuple(std::move(found));
}

py::list Landing::frames(Message&& message) const {
  py::list left;
  for (std::size_t i = 0; i < frames_.size(); ++i) {
    if (frames_[i].first == nullptr) left.append(py::cast(std::move(message.buffers[i + 1])));
  }
  return left;
}

void bind_stencil(py::module_& module) {
  py::class_<Stencil>(module, "Stencil", "See native/message/stencil.h.")
      .def(py::init([](const std::string& bytes, const std::vector<std::tuple<std::size_t, std::size_t, std::string>>& holes) {
             std::vector<Stencil::Hole> found;
             for (const auto& [offset, size, kind] : holes) found.push_back({offset, size, kind_of(kind)});
             return Stencil(std::as_bytes(std::span(bytes)), std::move(found));
           }),
           py::arg("bytes"), py::arg("holes"), "holes: (offset, size in bytes, \"number\" | \"real\" | \"memory\").")
      .def(
          "fill",
          [](const Stencil& self, const py::sequence& values) {
            const Slice slice = filled_slice(self, values);
            return py::bytes(reinterpret_cast<const char*>(slice.data), slice.size_bytes);
          },
          py::arg("values"), "The message; values as for Channel.send_stencil: addresses for memory.");
}

}  // namespace genie
