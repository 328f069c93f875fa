// What the searches for placements have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace genie {

// Lists of different lengths in one array: list i is values[begin[i] .. begin[i + 1]).
struct Ragged {
  std::vector<std::int32_t> begin;
  std::vector<std::int32_t> values;

  [[nodiscard]] const std::int32_t* first(std::int32_t i) const {
    return values.data() + begin[static_cast<std::size_t>(i)];
  }
  [[nodiscard]] const std::int32_t* last(std::int32_t i) const {
    return values.data() + begin[static_cast<std::size_t>(i) + 1];
  }
  [[nodiscard]] std::int32_t size(std::int32_t i) const { return static_cast<std::int32_t>(last(i) - first(i)); }
};

// splitmix64: small, and the same on every platform, which the distributions of <random> are not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // In [0, 1).
  [[nodiscard]] double uniform() {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    x ^= x >> 31;
    return static_cast<double>(x >> 11) * 0x1.0p-53;
  }
  // In 0 .. count - 1.
  [[nodiscard]] std::int32_t below(std::size_t count) {
    return static_cast<std::int32_t>(uniform() * static_cast<double>(count));
  }

 private:
  std::uint64_t state_;
};

struct Move {
  std::int32_t atom;
  std::int32_t device;
};

struct AnnealOptions {
  std::uint64_t seed = 0;
  std::int64_t tries = 0;             // placements at most
  double limit_s = 0;                 // seconds at most; inf: no limit
  bool cool_by_time = false;          // cool down over limit_s, or else over the tries
  double hot = 0;                     // worsening that is likely to be taken at first, as a share of the objective
  double cold = 0;                    // and at last
};

// Raises: std::invalid_argument.
inline void check_start(const std::vector<std::int32_t>& start_A, std::int32_t num_atoms, std::int32_t num_devices,
                        const AnnealOptions& options) {
  bool known = start_A.size() == static_cast<std::size_t>(num_atoms);
  for (const std::int32_t device : start_A) known = known && device >= 0 && device < num_devices;
  if (!known) {
    throw std::invalid_argument("the start has " + std::to_string(start_A.size()) + " atoms; expected " +
                                std::to_string(num_atoms) + " on devices below " + std::to_string(num_devices));
  }
  constexpr double kLongest = 1e9;
  if (!(options.cold > 0) || !(options.hot > 0) || !(options.limit_s >= 0) ||
      (options.cool_by_time && !(options.limit_s < kLongest))) {
    throw std::invalid_argument("annealing needs hot > 0, cold > 0 and a limit in seconds");
  }
}

}  // namespace genie
