// The sending half of a session: which chunk goes next, what is taken to be lost, how much is under way.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "protocol/bit_window.h"
#include "protocol/shared.h"

namespace genie::protocol {

class Sender {
 public:
  explicit Sender(Shared& shared);

  // 0 where there is no room now. `ticket` needs epoch, tag and priority only.
  [[nodiscard]] TransferId post(Source source, const Ticket& ticket, Nanoseconds deadline);
  // False where it is not in progress (any more).
  bool cancel(Nanoseconds now, TransferId transfer) noexcept;

  void on_sack(Nanoseconds now, const Sack& sack) noexcept;
  void on_reset(TransferId transfer, ResetReason reason) noexcept;
  void on_time(Nanoseconds now) noexcept;
  void end_all(End end) noexcept;

  // Fills `frame` with the next one that may go now.
  [[nodiscard]] bool next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept;
  // Of a frame that next_frame() has given and that has not left this host after all: it comes again.
  void take_back(std::uint64_t transmission) noexcept;
  [[nodiscard]] Nanoseconds next_time(Nanoseconds now) const noexcept;
  [[nodiscard]] bool is_idle() const noexcept { return active_.empty(); }

 private:
  enum class State : std::uint8_t { kFree, kOpening, kSending, kCancelling };

  struct Chunk {  // of those under way; chunk i stands at i % kWindowChunks
    std::uint64_t transmission = 0;
    Nanoseconds sent_at = 0;
    std::uint16_t tries = 0;
    bool in_flight = false;
  };
  struct Transfer {
    State state = State::kFree;
    TransferId id = 0;
    Ticket ticket{};
    Source source;
    Nanoseconds deadline = kNever;
    std::uint32_t total = 0;
    std::uint32_t cumulative = 0;  // all below are acknowledged
    std::uint32_t next = 0;        // never sent, from here on
    BitWindow acknowledged, lost;
    std::uint32_t num_lost = 0;
    std::array<Chunk, kWindowChunks> chunks{};
    Nanoseconds control_due = 0;   // kOpen and kCancel frames
    Nanoseconds opened_at = 0;
    std::uint32_t control_tries = 0;
    ResetReason cancelled_for = ResetReason::kCancelled;
  };
  struct Transmission {  // in the order of sending
    std::uint64_t number;
    Nanoseconds sent_at;
    std::uint32_t slot;
    TransferId transfer;
    std::uint32_t chunk;
  };

  [[nodiscard]] Transfer* find(TransferId id) noexcept;
  [[nodiscard]] Chunk* live_chunk(const Transmission& sent) noexcept;
  [[nodiscard]] static bool is_plausible(const Transfer& transfer, const Sack& sack) noexcept;
  [[nodiscard]] Nanoseconds time_trigger(Nanoseconds now, Transfer& transfer, const Sack& sack) noexcept;
  [[nodiscard]] std::uint64_t acknowledge_all(Transfer& transfer, const Sack& sack) noexcept;
  [[nodiscard]] std::uint64_t acknowledge(Transfer& transfer, std::uint32_t chunk) noexcept;
  void lose(const Transmission& sent) noexcept;
  void lose_overtaken() noexcept;
  void forget_settled() noexcept;
  [[nodiscard]] Nanoseconds timer() const noexcept;
  void raise_reordering() noexcept;
  void finish(Transfer& transfer, End end) noexcept;
  void release(Transfer& transfer) noexcept;
  void abandon(Nanoseconds now, Transfer& transfer, End end, ResetReason reason) noexcept;
  void drop_in_flight(Transfer& transfer) noexcept;

  [[nodiscard]] bool next_control(Nanoseconds now, Transfer& transfer, OutgoingFrame& frame) noexcept;
  [[nodiscard]] bool next_chunk(Nanoseconds now, Transfer& transfer, OutgoingFrame& frame) noexcept;
  [[nodiscard]] bool has_chunk(const Transfer& transfer) const noexcept;
  [[nodiscard]] std::uint32_t choose_chunk(Transfer& transfer) const noexcept;
  [[nodiscard]] std::uint64_t window() const noexcept;
  void pace(Nanoseconds now, std::uint32_t bytes) noexcept;

  static constexpr std::uint32_t kMaxTransmissions = 1u << 13;  // under way at once
  static constexpr std::uint32_t kLeastReordering = 3, kMostReordering = 512;
  static constexpr std::uint32_t kPacingBurst = 16;  // frames

  Shared& shared_;
  std::vector<Transfer> slots_;
  std::vector<std::uint32_t> active_;  // slots, by priority, then age
  TransferId last_id_ = 0;
  std::array<TransferId, 128> last_offered_{};  // by priority

  std::vector<Transmission> transmissions_;  // ring
  std::uint64_t first_transmission_ = 0, num_transmissions_ = 0;
  std::uint64_t last_number_ = 0, highest_acknowledged_ = 0;
  std::uint32_t reordering_ = kLeastReordering;  // later ones that must be there before one counts as lost
  std::uint64_t in_flight_bytes_ = 0;
  std::uint32_t backoff_ = 0;
  Nanoseconds progress_at_ = 0;  // something new was acknowledged, or the timer ran out
  CongestionWindow congestion_;
  Nanoseconds next_send_at_ = 0;
};

}  // namespace genie::protocol
