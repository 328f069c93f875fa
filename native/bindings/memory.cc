// Memory: what arrived, what a lane or a pool lends, as Python buffers; and Python buffers as slices.
#include <pybind11/pybind11.h>

#include <cstring>
#include <mutex>
#include <utility>

#include "bindings/bindings.h"
#include "gpu/pinning.h"
#include "lane/landing.h"
#include "memory/pool.h"
#include "memory/segment.h"

namespace py = pybind11;

namespace genie {
namespace {

struct Views {
  std::vector<Py_buffer> views;
};

std::mutex& swept_lock() {
  static auto* lock = new std::mutex();
  return *lock;
}

std::vector<Views*>& to_sweep() {
  static auto* list = new std::vector<Views*>();
  return *list;
}

void leave_to_sweep(Views* views) {
  const std::lock_guard hold(swept_lock());
  to_sweep().push_back(views);
}

}  // namespace

py::dict to_dict(const PoolStatistics& facts) {
  py::dict row;
  row["reserved_bytes"] = facts.reserved_bytes;
  row["used_bytes"] = facts.used_bytes;
  row["asked_bytes"] = facts.asked_bytes;
  row["peak_used_bytes"] = facts.peak_used_bytes;
  row["num_segments"] = facts.num_segments;
  row["num_allocations"] = facts.num_allocations;
  row["num_refusals"] = facts.num_refusals;
  row["fragmentation"] = facts.used_bytes == 0 ? 0.0
                                               : 1.0 - static_cast<double>(facts.asked_bytes) /
                                                           static_cast<double>(facts.used_bytes);
  row["pages"] = name_of(facts.pages);
  return row;
}

std::vector<Slice> HeldBuffers::hold(const py::sequence& buffers) {
  const std::size_t count = buffers.size();
  auto views = std::make_unique<Views>();
  views->views.reserve(count);
  const auto release = [&views] {
    for (Py_buffer& view : views->views) PyBuffer_Release(&view);
  };
  for (std::size_t i = 0; i < count; ++i) {
    Py_buffer view{};
    const py::object item = buffers[i];
    if (PyObject_GetBuffer(item.ptr(), &view, PyBUF_SIMPLE) != 0) {
      release();
      throw py::error_already_set();
    }
    views->views.push_back(view);
  }
  const std::shared_ptr<Views> owner(views.release(), leave_to_sweep);
  std::vector<Slice> slices;
  slices.reserve(count);
  for (const Py_buffer& view : owner->views) {
    slices.push_back({static_cast<const std::byte*>(view.buf), static_cast<std::size_t>(view.len), owner});
  }
  return slices;
}

void HeldBuffers::sweep() {
  std::vector<Views*> left;
  {
    const std::lock_guard hold(swept_lock());
    if (to_sweep().empty()) return;
    left.swap(to_sweep());
  }
  for (Views* views : left) {
    for (Py_buffer& view : views->views) PyBuffer_Release(&view);
    delete views;
  }
}

void bind_memory(py::module_& module) {
  py::class_<Buffer>(module, "Memory", py::buffer_protocol(),
                     "Bytes that a lane or a pool has lent; they go back with the last reference. Where `read_only` "
                     "is true they are another process's pages, and writing to them ends this process.")
      .def_buffer([](Buffer& self) {
        return py::buffer_info(self.data, 1, "B", static_cast<py::ssize_t>(self.size_bytes), false);
      })
      .def("__len__", [](const Buffer& self) { return self.size_bytes; })
      .def_readonly("read_only", &Buffer::read_only)
      .def_readonly("foreign", &Buffer::foreign, "Another process's pages: it gets them back with the last reference.")
      .def_property_readonly("address", [](const Buffer& self) { return reinterpret_cast<std::uintptr_t>(self.data); });

  module.def(
      "in_foreign_pages",
      [](std::uintptr_t address) { return in_foreign_pages(reinterpret_cast<const void*>(address)); },
      "Whether an address lies in another process's pages, which must not be written to.");
  module.def(
      "copy_blocks",
      [](std::uintptr_t to, std::size_t to_step, std::uintptr_t from, std::size_t from_step, std::size_t size_bytes,
         std::size_t count) {
        auto* target = reinterpret_cast<std::byte*>(to);
        const auto* source = reinterpret_cast<const std::byte*>(from);
        const py::gil_scoped_release release;
        for (std::size_t i = 0; i < count; ++i) std::memcpy(target + i * to_step, source + i * from_step, size_bytes);
      },
      py::arg("to"), py::arg("to_step"), py::arg("from"), py::arg("from_step"), py::arg("size_bytes"), py::arg("count"),
      "Copy `count` blocks of `size_bytes`, whose addresses lie so many bytes apart. By the calling thread alone.");
  module.def("landing_statistics", [] { return to_dict(landing_statistics()); },
             "The numbers of the pool that received payload lands in.");
  module.def("pin_segments", [] {
    std::string why;
    return py::make_tuple(gpu::pin_segments(why), why);
  }, "Page-lock the memory of lanes and pools from here on, for a CUDA device: (whether it can be, why not).");
  module.def("pin_statistics", [] {
    const gpu::PinStatistics facts = gpu::pin_statistics();
    py::dict row;
    row["pinned_bytes"] = facts.pinned_bytes;
    row["num_pinned"] = facts.num_pinned;
    row["num_refused"] = facts.num_refused;
    return row;
  });
  module.attr("HUGEPAGE_BYTES") = hugepage_bytes();

  py::class_<Pool, std::shared_ptr<Pool>>(module, "Pool", "Slabs of memory, used again: see native/memory/pool.h.")
      .def(py::init([](std::size_t limit_bytes, std::size_t keep_idle_bytes, bool huge) {
             PoolOptions options;
             options.limit_bytes = limit_bytes;
             options.keep_idle_bytes = keep_idle_bytes;
             options.huge = huge;
             return Pool::make(options);
           }),
           py::arg("limit_bytes") = PoolOptions{}.limit_bytes,
           py::arg("keep_idle_bytes") = PoolOptions{}.keep_idle_bytes, py::arg("huge") = true)
      .def(
          "allocate",
          [](Pool& self, std::size_t size_bytes) {
            auto slab = self.lend(size_bytes);
            if (slab == nullptr) {
              PyErr_SetString(PyExc_MemoryError, self.last_refusal().c_str());
              throw py::error_already_set();
            }
            std::byte* data = slab->data;
            return Buffer{data, size_bytes, false, std::move(slab)};
          },
          "Memory of at least this size. Raises: MemoryError, which says what is full.")
      .def("reserve", &Pool::reserve, py::arg("size_bytes"), py::arg("count"),
           py::call_guard<py::gil_scoped_release>(), "Have that many slabs ready; False where they would be too many.")
      .def("trim", &Pool::trim)
      .def("statistics", [](const Pool& self) { return to_dict(self.statistics()); });
}

}  // namespace genie
