#include "protocol/session.h"

#include <algorithm>
#include <cstring>

namespace genie::protocol {

Session::Session(const Config& config, Role role, std::uint64_t session, std::uint32_t incarnation, Nanoseconds now)
  : shared_(config, session, incarnation),
   sender_(shared_),
   receiver_(shared_),
   role_(role),
   connect_deadline_(now + config.connect_timeout_ns),
   hello_due_(role == Role::kConnects ? now : kNever) {}

TransferId Session::post(Nanoseconds now, Source source, const Ticket& ticket, Nanoseconds timeout_ns) {
  if (state_ == State::kClosed || source.size_bytes() > shared_.config.max_transfer_bytes) return 0;
  return sender_.post(std::move(source), ticket, now + timeout_ns);
}

bool Session::accept(Nanoseconds now, TransferId transfer, Sink sink, Nanoseconds timeout_ns) {
  return receiver_.accept(now, transfer, std::move(sink), now + timeout_ns);
}

bool Session::cancel(Nanoseconds now, Direction direction, TransferId transfer) noexcept {
  return direction == Direction::kOutgoing ? sender_.cancel(now, transfer)
                       : receiver_.cancel(transfer, ResetReason::kCancelled);
}

void Session::grant(std::uint32_t credit_bytes) noexcept {
  if (shared_.credit_bytes == credit_bytes) return;
  shared_.credit_bytes = credit_bytes;
  owes_pong_ = state_ == State::kEstablished;  // any frame says it
}

void Session::close(End end) noexcept {
  if (state_ == State::kClosed) return;
  owes_bye_ = state_ == State::kEstablished;
  fail(end);
}

void Session::fail(End end) noexcept {
  state_ = State::kClosed;
  sender_.end_all(end);
  receiver_.end_all(end);
  owes_hello_ack_ = owes_ping_ = owes_pong_ = false;
  shared_.events.push({.kind = EventKind::kClosed, .direction = Direction::kOutgoing, .transfer = 0, .end = end,
             .ticket = {}});
}

void Session::on_frame(Nanoseconds now, std::span<const std::byte> bytes) noexcept {
  if (state_ == State::kClosed) return;
  ++shared_.stats.frames_in;
  ParsedFrame frame;
  if (parse_frame(bytes, frame) != ParseStatus::kOk || frame.header.session != shared_.session) {
    ++shared_.stats.bad_frames;
    return;
  }
  const auto type = static_cast<FrameType>(frame.header.type);
  if (type != FrameType::kData) {  // whose digest is bound to its ticket
    Digest digest{frame.header, 0};
    digest.feed(frame.digested);
    if (digest.value() != frame.digest) {
      ++shared_.stats.bad_digests;
      return;
    }
  }
  if (type == FrameType::kHello || type == FrameType::kHelloAck) return on_hello(now, frame, type);
  if (type == FrameType::kReset) return on_reset(frame);
  if (state_ != State::kEstablished || frame.header.incarnation != shared_.peer_incarnation) {
    ++shared_.stats.stale_frames;
    return;
  }
  last_heard_ = now;
  unanswered_pings_ = 0;
  shared_.peer_credit_bytes = std::uint64_t{frame.header.credit} * kCreditUnitBytes;
  dispatch(now, frame, type);
}

void Session::dispatch(Nanoseconds now, const ParsedFrame& frame, FrameType type) noexcept {
  switch (type) {
    case FrameType::kOpen: return receiver_.on_open(frame);
    case FrameType::kData: return receiver_.on_data(now, frame);
    case FrameType::kCancel: return receiver_.on_cancel(frame);
    case FrameType::kAck: {
      Sack sack;
      if (parse_sack(frame.trailer, sack) == ParseStatus::kOk) return sender_.on_sack(now, sack);
      ++shared_.stats.bad_frames;
      return;
    }
    case FrameType::kPing: owes_pong_ = true; return;
    case FrameType::kPong: return;
    case FrameType::kBye: return fail(End::kPeerLost);
    case FrameType::kHello:
    case FrameType::kHelloAck:
    case FrameType::kReset: return;  // handled before
  }
}

void Session::on_hello(Nanoseconds now, const ParsedFrame& frame, FrameType type) noexcept {
  Hello hello;
  if (parse_hello(frame.payload, hello) != ParseStatus::kOk) {
    ++shared_.stats.bad_frames;
    return;
  }
  const bool for_me = (type == FrameType::kHello) == (role_ == Role::kWaits) &&
            (type == FrameType::kHello || hello.heard_incarnation == shared_.incarnation);
  if (!for_me) {
    ++shared_.stats.stale_frames;
    return;
  }
  if (state_ == State::kEstablished && frame.header.incarnation != shared_.peer_incarnation) {
    return fail(End::kPeerLost);  // it has begun another life
  }
  if (state_ == State::kConnecting) establish(now, frame.header, hello);
  owes_hello_ack_ = type == FrameType::kHello;
}

void Session::establish(Nanoseconds now, const Header& header, const Hello& hello) noexcept {
  state_ = State::kEstablished;
  shared_.peer_incarnation = header.incarnation;
  shared_.peer_credit_bytes = std::uint64_t{header.credit} * kCreditUnitBytes;
  shared_.chunk_bytes = std::min(shared_.config.max_payload_bytes, hello.max_payload_bytes);
  shared_.digest = shared_.config.digest || hello.digest;
  last_heard_ = now;
  ping_due_ = now + shared_.config.ping_interval_ns;
  shared_.events.push({.kind = EventKind::kEstablished, .direction = Direction::kOutgoing, .transfer = 0,
             .end = End::kOk, .ticket = {}});
}

void Session::on_reset(const ParsedFrame& frame) noexcept {
  Reset reset;
  if (parse_reset(frame.payload, reset) != ParseStatus::kOk) {
    ++shared_.stats.bad_frames;
    return;
  }
  // While connecting, the other end may only not have been told of the session yet.
  if (state_ != State::kEstablished || reset.heard_incarnation != shared_.incarnation) {
    ++shared_.stats.stale_frames;
    return;
  }
  if (reset.reason == ResetReason::kNoSession) return fail(End::kPeerLost);
  if (frame.header.incarnation == shared_.peer_incarnation) sender_.on_reset(frame.header.transfer, reset.reason);
}

void Session::on_time(Nanoseconds now) noexcept {
  if (state_ == State::kClosed) return;
  if (state_ == State::kConnecting) {
    if (connect_deadline_ <= now) return fail(End::kPeerLost);
  } else if (ping_due_ <= now) {
    // Silence is counted in questions without an answer, not in time: an end that was itself stopped for a while
    // asks before it gives up.
    const Config& config = shared_.config;
    if (unanswered_pings_ * config.ping_interval_ns >= config.peer_timeout_ns) return fail(End::kPeerLost);
    if (now - last_heard_ >= config.ping_interval_ns) {
      owes_ping_ = true;
      ++unanswered_pings_;
    }
    ping_due_ = now + config.ping_interval_ns;
  }
  sender_.on_time(now);
  receiver_.on_time(now);
}

void Session::write_hello_frame(FrameType type, OutgoingFrame& frame) noexcept {
  std::array<std::byte, kHelloBytes> payload;
  write_hello({.max_payload_bytes = shared_.config.max_payload_bytes, .heard_incarnation = shared_.peer_incarnation,
               .token = shared_.config.token,
               .digest = shared_.config.digest}, payload);
  shared_.write_control(type, 0, payload, nullptr, frame);
}

bool Session::next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept {
  if (state_ != State::kEstablished) {
    if (owes_bye_) {
      owes_bye_ = false;
      shared_.write_control(FrameType::kBye, 0, {}, nullptr, frame);
      return true;
    }
    if (state_ == State::kClosed || hello_due_ > now) return false;
    hello_due_ = now + shared_.rtt.rto(hello_tries_++);
    write_hello_frame(FrameType::kHello, frame);
    return true;
  }
  if (owes_hello_ack_) {
    owes_hello_ack_ = false;
    write_hello_frame(FrameType::kHelloAck, frame);
    return true;
  }
  if (owes_ping_ || owes_pong_) {
    bool& owed = owes_pong_ ? owes_pong_ : owes_ping_;
    const FrameType type = owes_pong_ ? FrameType::kPong : FrameType::kPing;
    owed = false;
    shared_.write_control(type, 0, {}, nullptr, frame);
    return true;
  }
  return receiver_.next_frame(now, frame) || sender_.next_frame(now, frame);
}

Nanoseconds Session::next_time(Nanoseconds now) const noexcept {
  switch (state_) {
    case State::kClosed: return owes_bye_ ? now : kNever;
    case State::kConnecting: return std::min(connect_deadline_, std::max(now, hello_due_));
    case State::kEstablished: break;
  }
  if (owes_hello_ack_ || owes_ping_ || owes_pong_) return now;
  return std::min({ping_due_, sender_.next_time(now), receiver_.next_time(now)});
}

std::optional<std::uint64_t> session_named_in(std::span<const std::byte> bytes) noexcept {
  if (bytes.size() < kHeaderBytes) return std::nullopt;
  Header header;
  std::memcpy(&header, bytes.data(), kHeaderBytes);
  return header.session;
}

bool write_no_session(std::span<const std::byte> bytes, OutgoingFrame& frame) noexcept {
  ParsedFrame asked;
  if (parse_frame(bytes, asked) != ParseStatus::kOk) return false;
  const auto type = static_cast<FrameType>(asked.header.type);
  // A hello may only be early; and a reset of a reset would go on for ever.
  if (type == FrameType::kReset || type == FrameType::kHello || type == FrameType::kBye) return false;
  std::array<std::byte, kResetBytes> payload;
  write_reset({.reason = ResetReason::kNoSession, .heard_incarnation = asked.header.incarnation}, payload);
  Header header;
  header.session = asked.header.session;
  write_control_frame(header, FrameType::kReset, payload, nullptr, frame);
  return true;
}

Stats Session::stats() const noexcept {
  Stats stats = shared_.stats;
  stats.smoothed_rtt_ns = shared_.rtt.smoothed();
  return stats;
}

}  // namespace genie::protocol
