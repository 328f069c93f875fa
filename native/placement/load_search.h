// max_throughput: annealing over placements, with changes of loads per move. The inner loop of
// passes/placement/load_search.py, which says what the moves are for; docs/placement.md has the definitions.
#pragma once

#include <cstdint>
#include <vector>

#include "placement/search.h"

namespace genie {

// A atoms on D devices, T tensors that leave their atom. Moving tensor t from p to q takes
// fixed_s[t] + size_bytes[t] * s_per_byte[p * D + q] + sized[t] * latency_s[p * D + q].
struct LoadProblem {
  std::int32_t num_devices = 0;
  std::int32_t num_atoms = 0;
  std::vector<std::int32_t> source;       // T: the atom that makes it
  Ragged readers;                         // T: atoms that read it, each once
  Ragged made;                            // A: tensors
  Ragged read;                            // A: tensors
  std::vector<double> seconds;            // A x D; inf where the device cannot run the atom
  std::vector<double> memory_bytes;       // A
  std::vector<double> capacity_bytes;     // D; inf: no limit
  std::vector<std::uint8_t> pays;         // D: is charged for transfers
  std::vector<double> fixed_s;            // T
  std::vector<double> size_bytes;         // T
  std::vector<double> sized;              // T
  std::vector<double> s_per_byte;         // D x D
  std::vector<double> latency_s;          // D x D
};

struct LoadResult {
  std::vector<std::int32_t> device_A;
  double largest_s = 0;
  std::int64_t tries = 0;
};

// One problem, annealed as often as one likes. Not for several threads at once.
class LoadSearch {
 public:
  explicit LoadSearch(LoadProblem problem);

  // `start_A` obeys memory and support, and so does the result. Raises: std::invalid_argument.
  [[nodiscard]] LoadResult anneal(const std::vector<std::int32_t>& start_A, const AnnealOptions& options);

 private:
  void start(const std::vector<std::int32_t>& start_A);
  void count_loads();
  // Adds what moving a tensor costs, times `sign`, to the loads.
  void charge(std::int32_t tensor, double sign);
  void apply(const Move& move);
  void step(double heat);
  void propose();
  void exchange_devices(std::int32_t one, std::int32_t other);
  void drop_if_unsupported();
  [[nodiscard]] bool holds() const;
  void take_back();
  void add_move(std::int32_t atom, std::int32_t device);
  [[nodiscard]] std::int32_t drawn_friend(std::int32_t atom);
  [[nodiscard]] double energy() const;
  [[nodiscard]] double largest() const;

  LoadProblem of_;
  Random random_{0};
  double scale_s_ = 1;

  std::vector<std::int32_t> device_A_;
  std::vector<std::int32_t> count_TD_;                // readers of a tensor on a device
  std::vector<double> loads_D_;
  std::vector<double> before_D_;                      // loads before the move under way
  std::vector<double> used_D_;
  std::vector<std::vector<std::int32_t>> members_D_;
  std::vector<std::int32_t> slot_A_;                  // where an atom stands among its device's
  double energy_ = 0;
  std::int64_t taken_ = 0;
  LoadResult best_;

  std::vector<Move> moves_;
  std::vector<Move> undo_;
};

}  // namespace genie
