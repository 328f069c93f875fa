// genie_dynamo._dpdk: makes the dpdk lane. What it makes goes to _native in capsules, which owns it from then on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>

#include "dpdk/eal.h"
#include "dpdk/hub.h"
#include "dpdk/lane.h"
#include "dpdk/port.h"
#include "lane/landing.h"

namespace py = pybind11;
using namespace genie::dpdk;

namespace {

Memory parse_memory(const std::string& name) {
  if (name == "auto") return Memory::kAuto;
  if (name == "hugepages") return Memory::kHugepages;
  if (name == "normal") return Memory::kNormal;
  throw DpdkError("memory is auto, hugepages or normal, not '" + name + "'");
}

// The receiver of the capsule takes what is in it, and leaves null behind.
template <typename T>
py::capsule wrap(std::unique_ptr<T> made, const char* name) {
  auto* box = new std::unique_ptr<T>(std::move(made));
  return py::capsule(box, name, [](PyObject* capsule) {
    delete static_cast<std::unique_ptr<T>*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  });
}

py::dict to_dict(const EalFacts& facts) {
  py::dict row;
  row["hugepages"] = facts.hugepages;
  row["memory"] = facts.memory;
  row["file_prefix"] = facts.file_prefix;
  row["init_s"] = facts.init_s;
  return row;
}

}  // namespace

PYBIND11_MODULE(_dpdk, module) {
  module.doc() = "The dpdk lane (native/dpdk/); used through genie_dynamo.runtime.lanes.dpdk.";
  py::register_exception<DpdkError>(module, "DpdkError", PyExc_OSError);
  py::register_local_exception<genie::LaneError>(module, "LaneError", PyExc_OSError);
  const py::module_ native = py::module_::import("genie_dynamo._native");
  if (py::getattr(native, "API_VERSION", py::int_(1)).cast<int>() != genie::kApiVersion) {
    throw py::import_error("_native was built from other sources");
  }
  const py::capsule landing = native.attr("landing");
  if (std::string_view(landing.name()) != "genie.LandingWay") throw py::import_error("not the _native of this build");
  genie::land_through(*landing.get_pointer<const genie::LandingWay>());
  module.def(
      "start",
      [](const std::string& memory, unsigned memory_mb, const std::vector<std::string>& pci, const std::string& iova) {
        const EalOptions options{parse_memory(memory), memory_mb, pci, iova};
        const EalFacts* facts = nullptr;
        {
          const py::gil_scoped_release release;
          facts = &start_eal(options);
        }
        return to_dict(*facts);
      },
      py::arg("memory") = "auto", py::arg("memory_mb") = 128, py::arg("pci") = std::vector<std::string>{},
      py::arg("iova") = "", "Start EAL, once in a process. Raises: DpdkError.");
  module.def("is_running", &eal_is_running);
  module.def(
      "stop",
      [] {
        Hub::stop_all();
        stop_eal();
      },
      py::call_guard<py::gil_scoped_release>(), "End every lane, close every port, let go of EAL's memory and files.");
  module.def("lose", &Hub::lose_all, py::arg("chance"), py::arg("seed") = 1, py::call_guard<py::gil_scoped_release>(),
             "For tests and benches: lose this share of the frames that this process's open ports would send.");
  module.def("why_no_hugepages", &why_no_hugepages, py::arg("memory_mb"));
  module.def(
      "listen",
      [](const std::string& port, const std::string& directory, std::optional<bool> digest) {
        std::unique_ptr<genie::Listener> listener;
        {
          const py::gil_scoped_release release;
          listener = listen_dpdk(port, directory, digest);
        }
        return wrap(std::move(listener), "genie.Listener");
      },
      py::arg("port"), py::arg("directory"), py::arg("digest") = py::none());
  module.def(
      "connect",
      [](const std::string& port, const std::string& address, double timeout_s, std::optional<bool> digest) {
        std::unique_ptr<genie::Lane> lane;
        {
          const py::gil_scoped_release release;
          lane = connect_dpdk(port, address, std::chrono::milliseconds(static_cast<std::int64_t>(timeout_s * 1e3)), digest);
        }
        return wrap(std::move(lane), "genie.Lane");
      },
      py::arg("port"), py::arg("address"), py::arg("timeout_s"), py::arg("digest") = py::none());
}
