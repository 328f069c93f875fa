// A session of two ends: transfers in both directions over a way that may drop, double, reorder, corrupt and delay
// frames. A pure state machine: frames and the time go in, frames and events come out; it does no I/O, reads no clock,
// takes no lock, and neither allocates nor throws but in its constructor, post() and accept().
//
// One end connects, the other waits to be connected to; both know the session's id, from elsewhere. An incarnation is
// a number that no other life of that end has.
//
//     on each step:  on_frame() for all that came;  on_time(now);  while (next_frame(now, f)) send(f);
//                    while (next_event(e)) ...;  then wait for a frame, or until next_time(now)
#pragma once

#include <cstdint>
#include <optional>

#include "protocol/receiver.h"
#include "protocol/sender.h"
#include "protocol/shared.h"

namespace genie::protocol {

enum class Role : std::uint8_t { kConnects, kWaits };

class Session {
 public:
  Session(const Config& config, Role role, std::uint64_t session, std::uint32_t incarnation, Nanoseconds now);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Offer `source` to the other end. 0: not now (too many in progress, or the session is closed).
  // `timeout_ns` bounds it: after that it ends in kTimeout, whatever happens.
  [[nodiscard]] TransferId post(Nanoseconds now, Source source, const Ticket& ticket, Nanoseconds timeout_ns);
  [[nodiscard]] bool accept(Nanoseconds now, TransferId transfer, Sink sink, Nanoseconds timeout_ns);
  bool refuse(TransferId transfer) noexcept { return receiver_.cancel(transfer, ResetReason::kRefused); }
  bool cancel(Nanoseconds now, Direction direction, TransferId transfer) noexcept;
  // What the other end may have in flight from now on; 0 stops it.
  void grant(std::uint32_t credit_bytes) noexcept;
  // Ends everything in `end`; a last frame tells the other end.
  void close(End end = End::kCancelled) noexcept;

  void on_frame(Nanoseconds now, std::span<const std::byte> bytes) noexcept;
  void on_time(Nanoseconds now) noexcept;
  [[nodiscard]] bool next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept;
  // Of a frame from next_frame() that the driver had no room for: its chunk, if it has one, comes again at once and
  // counts neither as lost nor as sent.
  void take_back(std::uint64_t transmission) noexcept { sender_.take_back(transmission); }
  [[nodiscard]] bool next_event(Event& event) noexcept { return shared_.events.pop(event); }
  [[nodiscard]] Nanoseconds next_time(Nanoseconds now) const noexcept;

  [[nodiscard]] std::uint64_t id() const noexcept { return shared_.session; }
  [[nodiscard]] bool is_established() const noexcept { return state_ == State::kEstablished; }
  [[nodiscard]] bool is_closed() const noexcept { return state_ == State::kClosed; }
  // Of an incoming transfer; true for 0. What Ticket::after names has to have ended for transfers to keep their order.
  [[nodiscard]] bool has_ended(TransferId transfer) const noexcept { return receiver_.has_ended(transfer); }
  [[nodiscard]] bool has_outgoing() const noexcept { return !sender_.is_idle(); }
  [[nodiscard]] std::uint32_t chunk_bytes() const noexcept { return shared_.chunk_bytes; }
  [[nodiscard]] Stats stats() const noexcept;

 private:
  enum class State : std::uint8_t { kConnecting, kEstablished, kClosed };

  void on_hello(Nanoseconds now, const ParsedFrame& frame, FrameType type) noexcept;
  void on_reset(const ParsedFrame& frame) noexcept;
  void dispatch(Nanoseconds now, const ParsedFrame& frame, FrameType type) noexcept;
  void establish(Nanoseconds now, const Header& header, const Hello& hello) noexcept;
  void fail(End end) noexcept;
  void write_hello_frame(FrameType type, OutgoingFrame& frame) noexcept;

  Shared shared_;
  Sender sender_;
  Receiver receiver_;
  Role role_;
  State state_ = State::kConnecting;
  Nanoseconds connect_deadline_;
  Nanoseconds hello_due_;
  std::uint32_t hello_tries_ = 0;
  Nanoseconds last_heard_ = 0;
  Nanoseconds ping_due_ = kNever;
  std::uint32_t unanswered_pings_ = 0;
  bool owes_hello_ack_ = false, owes_ping_ = false, owes_pong_ = false, owes_bye_ = false;
};

// The session that a frame names, whatever else is wrong with it; nullopt where it is too short to name one.
[[nodiscard]] std::optional<std::uint64_t> session_named_in(std::span<const std::byte> bytes) noexcept;

// What to answer a frame whose session is not here. False: nothing, for it is no frame, or itself a reset.
[[nodiscard]] bool write_no_session(std::span<const std::byte> bytes, OutgoingFrame& frame) noexcept;

}  // namespace genie::protocol
