// The search for a placement, for passes/placement/: arrays in, arrays out, without the GIL between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "placement/load_search.h"
#include "placement/makespan_search.h"

namespace py = pybind11;

namespace genie {
namespace {

constexpr std::size_t kMostNodes = 1U << 28;
constexpr std::size_t kMostDevices = 1U << 12;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
[[nodiscard]] std::vector<T> taken(const py::dict& arrays, const char* name, std::size_t size) {
  const auto array = arrays[name].cast<Array<T>>();
  if (static_cast<std::size_t>(array.size()) != size) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array.size()) + " numbers, expected " +
                          std::to_string(size));
  }
  return {array.data(), array.data() + array.size()};
}

void check_range(const std::vector<std::int32_t>& values, std::size_t end, const char* name) {
  const auto outside = [end](std::int32_t i) { return i < 0 || static_cast<std::size_t>(i) >= end; };
  if (std::any_of(values.begin(), values.end(), outside)) {
    throw py::value_error(std::string(name) + " has a number outside of 0.." + std::to_string(end));
  }
}

// Lists of what is grouped by `keys`: list k holds values[i] for every i with keys[i] == k, in order.
[[nodiscard]] Ragged grouped(const std::vector<std::int32_t>& keys, const std::vector<std::int32_t>& values,
                             std::size_t num_lists) {
  Ragged lists;
  lists.begin.assign(num_lists + 1, 0);
  for (const std::int32_t key : keys) ++lists.begin[static_cast<std::size_t>(key) + 1];
  for (std::size_t i = 0; i < num_lists; ++i) lists.begin[i + 1] += lists.begin[i];
  lists.values.resize(keys.size());
  std::vector<std::int32_t> next(lists.begin.begin(), lists.begin.end() - 1);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    lists.values[static_cast<std::size_t>(next[static_cast<std::size_t>(keys[i])]++)] = values[i];
  }
  return lists;
}

[[nodiscard]] std::vector<std::int32_t> counted(std::size_t end) {
  std::vector<std::int32_t> numbers(end);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

[[nodiscard]] std::unique_ptr<MakespanSearch> make_makespan_search(const py::dict& arrays) {
  const auto nodes = static_cast<std::size_t>(py::len(arrays["atom_of"]));
  const auto atoms = static_cast<std::size_t>(py::len(arrays["memory_bytes"]));
  const auto devices = static_cast<std::size_t>(py::len(arrays["capacity_bytes"]));
  const auto edges = static_cast<std::size_t>(py::len(arrays["src"]));
  if (nodes == 0 || devices == 0 || nodes > kMostNodes || devices > kMostDevices) {
    throw py::value_error(std::to_string(nodes) + " nodes on " + std::to_string(devices) + " devices");
  }
  MakespanProblem problem;
  problem.num_devices = static_cast<std::int32_t>(devices);
  problem.num_atoms = static_cast<std::int32_t>(atoms);
  problem.order = taken<std::int32_t>(arrays, "order", nodes);
  problem.atom_of = taken<std::int32_t>(arrays, "atom_of", nodes);
  check_range(problem.order, nodes, "order");
  check_range(problem.atom_of, atoms, "atom_of");
  const auto src = taken<std::int32_t>(arrays, "src", edges);
  const auto dst = taken<std::int32_t>(arrays, "dst", edges);
  check_range(src, nodes, "src");
  check_range(dst, nodes, "dst");
  problem.users = grouped(src, dst, nodes);
  problem.makers = grouped(dst, src, nodes);
  problem.nodes_of = grouped(problem.atom_of, counted(nodes), atoms);
  problem.seconds = taken<double>(arrays, "seconds", nodes * devices);
  problem.runs = taken<std::uint8_t>(arrays, "runs", atoms * devices);
  problem.memory_bytes = taken<double>(arrays, "memory_bytes", atoms);
  problem.capacity_bytes = taken<double>(arrays, "capacity_bytes", devices);
  problem.fixed_s = taken<double>(arrays, "fixed_s", nodes);
  problem.size_bytes = taken<double>(arrays, "size_bytes", nodes);
  problem.sized = taken<double>(arrays, "sized", nodes);
  problem.s_per_byte = taken<double>(arrays, "s_per_byte", devices * devices);
  problem.latency_s = taken<double>(arrays, "latency_s", devices * devices);
  return std::make_unique<MakespanSearch>(std::move(problem));
}

[[nodiscard]] std::unique_ptr<LoadSearch> make_load_search(const py::dict& arrays) {
  const auto atoms = static_cast<std::size_t>(py::len(arrays["memory_bytes"]));
  const auto devices = static_cast<std::size_t>(py::len(arrays["capacity_bytes"]));
  const auto tensors = static_cast<std::size_t>(py::len(arrays["source"]));
  const auto pins = static_cast<std::size_t>(py::len(arrays["pin_tensor"]));
  if (atoms == 0 || devices == 0 || atoms > kMostNodes || devices > kMostDevices) {
    throw py::value_error(std::to_string(atoms) + " atoms on " + std::to_string(devices) + " devices");
  }
  LoadProblem problem;
  problem.num_devices = static_cast<std::int32_t>(devices);
  problem.num_atoms = static_cast<std::int32_t>(atoms);
  problem.source = taken<std::int32_t>(arrays, "source", tensors);
  check_range(problem.source, atoms, "source");
  const auto pin_tensor = taken<std::int32_t>(arrays, "pin_tensor", pins);
  const auto pin_atom = taken<std::int32_t>(arrays, "pin_atom", pins);
  check_range(pin_tensor, tensors, "pin_tensor");
  check_range(pin_atom, atoms, "pin_atom");
  problem.readers = grouped(pin_tensor, pin_atom, tensors);
  problem.read = grouped(pin_atom, pin_tensor, atoms);
  problem.made = grouped(problem.source, counted(tensors), atoms);
  problem.seconds = taken<double>(arrays, "seconds", atoms * devices);
  problem.memory_bytes = taken<double>(arrays, "memory_bytes", atoms);
  problem.capacity_bytes = taken<double>(arrays, "capacity_bytes", devices);
  problem.pays = taken<std::uint8_t>(arrays, "pays", devices);
  problem.fixed_s = taken<double>(arrays, "fixed_s", tensors);
  problem.size_bytes = taken<double>(arrays, "size_bytes", tensors);
  problem.sized = taken<double>(arrays, "sized", tensors);
  problem.s_per_byte = taken<double>(arrays, "s_per_byte", devices * devices);
  problem.latency_s = taken<double>(arrays, "latency_s", devices * devices);
  return std::make_unique<LoadSearch>(std::move(problem));
}

template <class T>
[[nodiscard]] py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class Search>
[[nodiscard]] auto annealed(Search& search, const Array<std::int32_t>& start_A, const AnnealOptions& options) {
  const std::vector<std::int32_t> start(start_A.data(), start_A.data() + start_A.size());
  const py::gil_scoped_release release;
  return search.anneal(start, options);
}

}  // namespace

void bind_placement(py::module_& module) {
  py::class_<MakespanSearch>(module, "MakespanSearch",
                             "Annealing of placements for min_latency; see passes/placement/makespan_search.py.")
      .def(py::init(&make_makespan_search), py::arg("arrays"))
      .def(
          "anneal",
          [](MakespanSearch& self, const Array<std::int32_t>& start_A, std::uint64_t seed, std::int64_t tries,
             double limit_s, bool cool_by_time, double hot, double cold) {
            const MakespanResult found = annealed(self, start_A, {seed, tries, limit_s, cool_by_time, hot, cold});
            return py::make_tuple(to_array(found.device_A), to_array(found.priority_N), found.makespan_s, found.tries);
          },
          py::kw_only(), py::arg("start_A"), py::arg("seed"), py::arg("tries"), py::arg("limit_s"),
          py::arg("cool_by_time"), py::arg("hot"), py::arg("cold"),
          "(device of each atom, priority of each node, makespan, schedules tried) of the best placement.");
  py::class_<LoadSearch>(module, "LoadSearch",
                         "Annealing of placements for max_throughput; see passes/placement/load_search.py.")
      .def(py::init(&make_load_search), py::arg("arrays"))
      .def(
          "anneal",
          [](LoadSearch& self, const Array<std::int32_t>& start_A, std::uint64_t seed, std::int64_t tries,
             double limit_s, bool cool_by_time, double hot, double cold) {
            const LoadResult found = annealed(self, start_A, {seed, tries, limit_s, cool_by_time, hot, cold});
            return py::make_tuple(to_array(found.device_A), found.largest_s, found.tries);
          },
          py::kw_only(), py::arg("start_A"), py::arg("seed"), py::arg("tries"), py::arg("limit_s"),
          py::arg("cool_by_time"), py::arg("hot"), py::arg("cold"),
          "(device of each atom, largest load, placements tried) of the best placement.");
}

}  // namespace genie
