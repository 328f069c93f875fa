// Two sessions and a seeded network between them that drops, doubles, reorders, corrupts and delays. Time is virtual: what a
// run says of speed is a property of the protocol under this model of a network, not a measurement.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <vector>

#include "protocol/session.h"

namespace genie::protocol {

struct Weather {
  double drop = 0, duplicate = 0, corrupt = 0, reorder = 0;      // chances of one frame
  double refuse = 0;                                             // that the driver has no room for it now
  Nanoseconds delay_ns = 10 * kMicrosecond;                      // one way
  Nanoseconds reorder_delay_ns = 100 * kMicrosecond;             // on top, of those that are reordered
  double bytes_per_s = 1.25e9;
  std::uint64_t queue_bytes = ~0ull;                             // of the switch: more is dropped
};

struct Outcome {
  End end = End::kPending;
  int times = 0;  // that it ended; at most once is right
};

// One end, with what an application does: it lets everything land that is offered, if told to.
struct Side {
  std::unique_ptr<Session> session;
  bool running = true;
  bool accepts = true;
  std::map<TransferId, std::vector<std::byte>> landed;  // by incoming transfer
  std::map<TransferId, Ticket> tickets;
  std::map<TransferId, int> offers;
  std::map<TransferId, Outcome> outgoing, incoming;
  std::vector<TransferId> arrived;                      // in the order of their ends
  End closed = End::kPending;
};

class Simulator {
 public:
  Simulator(std::uint64_t seed, const Weather& in, const Config& config = {}) : Simulator(seed, in, config, config) {}
  Simulator(std::uint64_t seed, const Weather& in, const Config& first, const Config& second);

  // Runs until `done` or for `limit_ns`; true where it was done.
  bool run(const std::function<bool()>& done, Nanoseconds limit_ns = 60 * kSecond);
  // One step of the network: the next frame or timer. False where nothing will ever happen.
  bool step();

  // Bytes that say which they are; they live as long as the simulator.
  [[nodiscard]] const std::vector<std::byte>& make_bytes(std::size_t size);
  TransferId post(int from, const std::vector<std::byte>& bytes, std::uint8_t priority = 0,
                  Nanoseconds timeout_ns = 30 * kSecond);
  // Replaces an end by another life of it that knows nothing.
  void restart(int side, std::uint32_t incarnation, bool knows_session);
  void inject(int to, std::vector<std::byte> frame) { deliver_at(now_, to, std::move(frame)); }
  [[nodiscard]] std::vector<std::byte>& last_frame_to(int side) { return last_frame_[static_cast<std::size_t>(side)]; }

  [[nodiscard]] Side& side(int index) { return sides_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] Nanoseconds now() const { return now_; }
  void pass(Nanoseconds time) { now_ += time; }
  Weather weather;

 private:
  struct Flight {
    Nanoseconds at;
    std::uint64_t order;
    int to;
    std::vector<std::byte> bytes;
    bool operator>(const Flight& other) const { return at != other.at ? at > other.at : order > other.order; }
  };
  void serve(int side);
  void take_events(int side);
  void transmit(int from, const OutgoingFrame& frame);
  void deliver_at(Nanoseconds at, int to, std::vector<std::byte> bytes);
  [[nodiscard]] bool chance(double probability) { return probability > 0 && uniform_(random_) < probability; }

  std::mt19937_64 random_;
  std::uniform_real_distribution<double> uniform_{0.0, 1.0};
  Config configs_[2];
  Side sides_[2];
  Nanoseconds now_ = 0;
  Nanoseconds link_free_at_[2] = {0, 0};
  std::uint64_t order_ = 0;
  std::priority_queue<Flight, std::vector<Flight>, std::greater<>> flights_;
  std::vector<std::byte> last_frame_[2];
  std::vector<std::unique_ptr<std::vector<std::byte>>> memory_;
};

}  // namespace genie::protocol
