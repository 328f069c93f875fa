// min_latency: annealing over placements, each judged by its whole schedule. The inner loop of
// passes/placement/makespan_search.py, which says what the moves are for; docs/placement.md has the definitions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "placement/search.h"

namespace genie {

// N nodes in A atoms on D devices. A transfer of node n's output from p to q takes
// fixed_s[n] + size_bytes[n] * s_per_byte[p * D + q] + sized[n] * latency_s[p * D + q].
struct MakespanProblem {
  std::int32_t num_devices = 0;
  std::int32_t num_atoms = 0;
  std::vector<std::int32_t> order;        // nodes, topological
  std::vector<std::int32_t> atom_of;      // N
  Ragged users;                           // N
  Ragged makers;                          // N
  Ragged nodes_of;                        // A
  std::vector<double> seconds;            // N x D; inf where the device cannot run the node
  std::vector<std::uint8_t> runs;         // A x D
  std::vector<double> memory_bytes;       // A
  std::vector<double> capacity_bytes;     // D; inf: no limit
  std::vector<double> fixed_s;            // N
  std::vector<double> size_bytes;         // N
  std::vector<double> sized;              // N
  std::vector<double> s_per_byte;         // D x D
  std::vector<double> latency_s;          // D x D

  [[nodiscard]] std::size_t num_nodes() const { return atom_of.size(); }
};

struct MakespanResult {
  std::vector<std::int32_t> device_A;
  std::vector<double> priority_N;     // with which a list schedule gives the makespan
  double makespan_s = 0;
  std::int64_t tries = 0;
};

// One problem, annealed as often as one likes. Not for several threads at once.
class MakespanSearch {
 public:
  explicit MakespanSearch(MakespanProblem problem);

  // `start_A` obeys memory and support, and so does the result. Raises: std::invalid_argument.
  [[nodiscard]] MakespanResult anneal(const std::vector<std::int32_t>& start_A, const AnnealOptions& options);

 private:
  struct Ready {        // of a device: highest priority first; of equal ones, the shorter: what follows can start elsewhere
    double priority;
    double seconds;
    std::int32_t node;
  };
  struct Waiting {      // of a link: highest priority first
    double priority;
    std::int32_t node;
    double seconds;
  };
  struct Event {        // link < 0: the node is done; else its output has come over the link
    double at_s;
    std::int32_t node;
    std::int32_t link;
  };
  static bool later(const Event& a, const Event& b);
  static bool after(const Ready& a, const Ready& b);
  static bool behind(const Waiting& a, const Waiting& b);

  [[nodiscard]] double transfer_s(std::int32_t node, std::int32_t src, std::int32_t dst) const;

  void find_ranks();
  // The makespan of device_N_ with ranks + bias as priorities, or inf once it is sure to be above `worst_s`.
  [[nodiscard]] double schedule(double worst_s);
  void queue(std::int32_t node);
  void touch(std::int32_t device);
  void deliver(std::int32_t node, std::int32_t device);
  void finish(std::int32_t node);
  void send(double now_s, std::int32_t link);
  [[nodiscard]] bool begin(double now_s, std::int32_t device, double worst_s);

  void start(const std::vector<std::int32_t>& start_A);
  void step(double heat_s);
  void reorder(double heat_s);
  bool judge(double heat_s);
  void propose();
  void add_run_of(std::int32_t node, std::int32_t device);
  void add_atom(std::int32_t atom);
  void apply(const std::vector<Move>& moves);
  void find_critical();

  MakespanProblem of_;
  Random random_{0};

  // The placement that is moved about.
  std::vector<std::int32_t> device_A_;
  std::vector<std::int32_t> device_N_;
  std::vector<double> used_D_;
  std::vector<double> bias_N_;            // what is added to ranks for priorities
  double now_s_ = 0;
  std::vector<std::int32_t> critical_;    // start plus way to the end is the makespan
  MakespanResult best_;

  // The schedule under way.
  std::vector<double> rank_N_;
  std::vector<double> priority_N_;
  std::vector<double> start_N_;
  std::vector<std::int32_t> missing_N_;
  std::vector<std::vector<Ready>> ready_D_;
  std::vector<std::uint8_t> busy_D_;
  std::vector<std::uint8_t> touched_D_;
  std::vector<std::int32_t> touched_;
  std::vector<std::vector<Waiting>> waiting_L_;     // link p * D + q
  std::vector<std::uint8_t> sending_L_;
  std::vector<std::int32_t> links_;
  std::vector<Event> events_;
  double end_s_ = 0;

  // Proposals.
  std::vector<Move> moves_;
  std::vector<Move> undo_;
  std::vector<std::int32_t> atoms_;
};

}  // namespace genie
