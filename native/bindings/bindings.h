#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "lane/lane.h"
#include "memory/pool.h"

namespace genie {

[[nodiscard]] pybind11::dict to_dict(const PoolStatistics& facts);
void bind_memory(pybind11::module_& module);
void bind_lanes(pybind11::module_& module);
void bind_placement(pybind11::module_& module);
void bind_recording(pybind11::module_& module);

// Python buffers that C++ holds. They are let go under the GIL, whichever thread lets go of them.
class HeldBuffers {
 public:
  // Takes views of contiguous buffers. Raises (as error_already_set) where one is none.
  static std::vector<Slice> hold(const pybind11::sequence& buffers);
  // Lets go of what other threads have left. With the GIL; called by every function that may have left some.
  static void sweep();
};

}  // namespace genie
