// What sender, receiver and session of one connection share.
#pragma once

#include <cstdint>
#include <vector>

#include "protocol/timing.h"
#include "protocol/types.h"

namespace genie::protocol {

// Events wait here until the caller takes them. Room for every event that transfers in progress can still cause is kept
// by begins(): none is ever dropped.
class EventQueue {
 public:
  explicit EventQueue(std::uint32_t max_transfers) : ring_(std::size_t{max_transfers} * 8 + 16) {}

  void push(const Event& event) noexcept {
    ring_[(first_ + size_) % ring_.size()] = event;
    ++size_;
  }
  [[nodiscard]] bool pop(Event& event) noexcept {
    if (size_ == 0) return false;
    event = ring_[first_];
    first_ = (first_ + 1) % ring_.size();
    --size_;
    return true;
  }
  // Whether another transfer may begin.
  [[nodiscard]] bool has_room() const noexcept { return size_ < ring_.size() / 2; }

 private:
  std::vector<Event> ring_;
  std::size_t first_ = 0, size_ = 0;
};

// A frame that carries nothing but `payload` and perhaps a SACK, after a header whose session, incarnation, credit and
// transfer are set.
void write_control_frame(Header header, FrameType type, std::span<const std::byte> payload, const Sack* sack,
                         OutgoingFrame& frame) noexcept;

struct Shared {
  Shared(const Config& with, std::uint64_t session_id, std::uint32_t own_incarnation)
    : config(with),
     session(session_id),
     incarnation(own_incarnation),
     credit_bytes(with.credit_bytes),
     chunk_bytes(with.max_payload_bytes),
     events(with.max_transfers),
     rtt(with) {}

  void write_control(FrameType type, TransferId transfer, std::span<const std::byte> payload, const Sack* sack,
            OutgoingFrame& frame) noexcept;
  [[nodiscard]] Header header(FrameType type) const noexcept;

  const Config config;
  const std::uint64_t session;
  const std::uint32_t incarnation;
  std::uint32_t peer_incarnation = 0;
  std::uint32_t credit_bytes;           // that this end grants
  std::uint64_t peer_credit_bytes = 0;  // that the other end grants
  std::uint32_t chunk_bytes;            // of what is sent from here: what both ends take
  bool digest = true;                   // on chunks
  EventQueue events;
  RttEstimator rtt;
  Stats stats;
};

}  // namespace genie::protocol
