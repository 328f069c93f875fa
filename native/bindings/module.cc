// genie_dynamo._native: conversions only; what it does stands in lane/, memory/, placement/ and recording/.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "lane/digest.h"
#include "lane/landing.h"
#include "lane/lane.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "Lanes and registered memory (used through genie_dynamo.runtime.lanes), the search for placements, and "
      "the device's recording of known calls.";
  module.attr("LANE_VERSION") = genie::kLaneVersion;
  module.attr("API_VERSION") = genie::kApiVersion;
  py::register_exception<genie::LaneError>(module, "LaneError", PyExc_OSError);
  module.def(
      "crc32c",
      [](const py::buffer& data, std::uint32_t crc) {
        const py::buffer_info view = data.request();
        const auto size = static_cast<std::size_t>(view.size * view.itemsize);
        const py::gil_scoped_release release;
        return genie::crc32c(view.ptr, size, crc);
      },
      py::arg("data"), py::arg("crc") = 0, "CRC32C of contiguous bytes, going on from `crc`.");
  static const genie::LandingWay landing{&genie::land};
  module.attr("landing") = py::capsule(&landing, "genie.LandingWay");   // for _dpdk
  genie::bind_memory(module);
  genie::bind_lanes(module);
  genie::bind_placement(module);
  genie::bind_recording(module);
}
