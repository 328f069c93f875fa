#include "protocol/sender.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace genie::protocol {

Sender::Sender(Shared& shared)
  : shared_(shared),
   slots_(shared.config.max_transfers),
   transmissions_(kMaxTransmissions),
   congestion_(shared.config, shared.config.max_payload_bytes) {
  active_.reserve(slots_.size());
}

TransferId Sender::post(Source source, const Ticket& ticket, Nanoseconds deadline) {
  if (!shared_.events.has_room() || last_id_ == ~TransferId{0}) return 0;
  const auto free = std::find_if(slots_.begin(), slots_.end(), [](const Transfer& slot) {
    return slot.state == State::kFree;
  });
  if (free == slots_.end()) return 0;
  Transfer& transfer = *free;
  transfer.state = State::kOpening;
  transfer.id = ++last_id_;
  transfer.ticket = ticket;
  transfer.ticket.size_bytes = source.size_bytes();
  transfer.ticket.priority &= 0x7F;
  transfer.source = std::move(source);
  transfer.deadline = deadline;
  transfer.total = transfer.cumulative = transfer.next = transfer.num_lost = 0;
  transfer.acknowledged.clear_all();
  transfer.lost.clear_all();
  transfer.chunks.fill(Chunk{});
  transfer.control_due = 0;
  transfer.control_tries = 0;
  const auto slot = static_cast<std::uint32_t>(free - slots_.begin());
  const auto after = std::find_if(active_.begin(), active_.end(), [&](std::uint32_t other) {
    return slots_[other].ticket.priority > ticket.priority;
  });
  active_.insert(after, slot);
  return transfer.id;
}

bool Sender::cancel(Nanoseconds now, TransferId id) noexcept {
  Transfer* transfer = find(id);
  if (transfer == nullptr || transfer->state == State::kCancelling) return false;
  abandon(now, *transfer, End::kCancelled, ResetReason::kCancelled);
  return true;
}

Sender::Transfer* Sender::find(TransferId id) noexcept {
  for (const std::uint32_t slot : active_) {
    if (slots_[slot].id == id) return &slots_[slot];
  }
  return nullptr;
}

// The chunk that `sent` carries, while nothing has been heard of it and it is not sent again.
Sender::Chunk* Sender::live_chunk(const Transmission& sent) noexcept {
  Transfer& transfer = slots_[sent.slot];
  if (transfer.id != sent.transfer || transfer.state != State::kSending) return nullptr;
  Chunk& chunk = transfer.chunks[sent.chunk % kWindowChunks];
  return chunk.in_flight && chunk.transmission == sent.number ? &chunk : nullptr;
}

void Sender::on_sack(Nanoseconds now, const Sack& sack) noexcept {
  Transfer* found = find(sack.transfer);
  if (found == nullptr || found->state == State::kCancelling) return;  // late
  Transfer& transfer = *found;
  if (transfer.state == State::kOpening) {
    if (transfer.control_tries == 0) {  // it was never offered
      ++shared_.stats.bad_tickets;
      return;
    }
    transfer.state = State::kSending;
    if (transfer.control_tries == 1) shared_.rtt.sample(now - transfer.opened_at);
  }
  if (!is_plausible(transfer, sack)) {
    ++shared_.stats.bad_tickets;
    return;
  }
  const Nanoseconds rtt = time_trigger(now, transfer, sack);
  const std::uint64_t bytes = acknowledge_all(transfer, sack);
  if (bytes > 0) {
    backoff_ = 0;
    progress_at_ = now;
    if (shared_.config.off_host) congestion_.on_delivered(now, bytes, rtt, shared_.rtt);
  }
  lose_overtaken();
  if (transfer.cumulative == transfer.total) finish(transfer, End::kOk);
}

// What was never sent cannot be there.
bool Sender::is_plausible(const Transfer& transfer, const Sack& sack) noexcept {
  std::uint64_t end = sack.cumulative;
  if (sack.words > 0) {
    end += 64 * sack.words - static_cast<std::uint64_t>(std::countl_zero(sack.bitmap[sack.words - 1]));
  }
  return end <= transfer.next;
}

// What the chunk that came last tells: which of its sendings arrived is known exactly, so that its round trip can be
// timed, and what was sent before it and is not there can be taken for lost. Returns the round trip, 0 for none.
Nanoseconds Sender::time_trigger(Nanoseconds now, Transfer& transfer, const Sack& sack) noexcept {
  if (sack.trigger >= transfer.next || transfer.next - sack.trigger > kWindowChunks) return 0;
  const Chunk& chunk = transfer.chunks[sack.trigger % kWindowChunks];
  if (chunk.tries == 0) return 0;
  if (static_cast<std::uint8_t>(chunk.tries) != sack.trigger_try) {
    if (chunk.in_flight) raise_reordering();  // an earlier sending came: it was only late
    return 0;
  }
  if (sack.duplicate || !chunk.in_flight) return 0;
  highest_acknowledged_ = std::max(highest_acknowledged_, chunk.transmission);
  const Nanoseconds waited = now - chunk.sent_at;
  const Nanoseconds rtt = std::max<Nanoseconds>(1, waited - std::min<Nanoseconds>(waited, sack.trigger_delay_ns));
  shared_.rtt.sample(rtt);
  return rtt;
}

// Returns the bytes of which nothing was known before.
std::uint64_t Sender::acknowledge_all(Transfer& transfer, const Sack& sack) noexcept {
  std::uint64_t bytes = 0;
  for (; transfer.cumulative < sack.cumulative; ++transfer.cumulative) {
    bytes += acknowledge(transfer, transfer.cumulative);
    transfer.acknowledged.clear(transfer.cumulative);
  }
  if (sack.cumulative < transfer.cumulative) return bytes;  // an old one
  for (std::size_t i = 0; i < sack.words; ++i) {
    const auto base = sack.cumulative + static_cast<std::uint32_t>(64 * i);
    for (std::uint64_t bits = sack.bitmap[i] & ~transfer.acknowledged.from(base); bits != 0; bits &= bits - 1) {
      const auto chunk = base + static_cast<std::uint32_t>(std::countr_zero(bits));
      bytes += acknowledge(transfer, chunk);
      transfer.acknowledged.set(chunk);
    }
  }
  return bytes;
}

std::uint64_t Sender::acknowledge(Transfer& transfer, std::uint32_t number) noexcept {
  if (transfer.acknowledged.test(number)) return 0;
  Chunk& chunk = transfer.chunks[number % kWindowChunks];
  const std::uint32_t bytes = transfer.ticket.bytes_of(number);
  if (chunk.in_flight) {
    chunk.in_flight = false;
    in_flight_bytes_ -= bytes;
    // Of one that was sent several times, it is not known which came (but for the trigger).
    if (chunk.tries == 1) highest_acknowledged_ = std::max(highest_acknowledged_, chunk.transmission);
  }
  if (transfer.lost.test(number)) {  // it was only late
    transfer.lost.clear(number);
    --transfer.num_lost;
    raise_reordering();
  }
  return bytes;
}

// What was taken to be lost was only late.
void Sender::raise_reordering() noexcept {
  reordering_ = std::min(2 * reordering_, kMostReordering);
  congestion_.on_late();
}

void Sender::forget_settled() noexcept {
  while (num_transmissions_ > 0) {
    if (live_chunk(transmissions_[first_transmission_ % kMaxTransmissions]) != nullptr) return;
    ++first_transmission_;
    --num_transmissions_;
  }
}

// What was sent `reordering_` frames before one that has arrived is taken to be lost.
void Sender::lose_overtaken() noexcept {
  for (forget_settled(); num_transmissions_ > 0; forget_settled()) {
    const Transmission& oldest = transmissions_[first_transmission_ % kMaxTransmissions];
    if (oldest.number + reordering_ > highest_acknowledged_) return;
    lose(oldest);
  }
}

void Sender::lose(const Transmission& sent) noexcept {
  Chunk* chunk = live_chunk(sent);
  if (chunk == nullptr) return;
  Transfer& transfer = slots_[sent.slot];
  const std::uint32_t bytes = transfer.ticket.bytes_of(sent.chunk);
  chunk->in_flight = false;
  in_flight_bytes_ -= bytes;
  transfer.lost.set(sent.chunk);
  ++transfer.num_lost;
  congestion_.on_lost(bytes);
}

void Sender::take_back(std::uint64_t transmission) noexcept {
  if (num_transmissions_ == 0) return;
  const std::uint64_t oldest = transmissions_[first_transmission_ % kMaxTransmissions].number;
  if (transmission < oldest || transmission - oldest >= num_transmissions_) return;
  const Transmission& sent = transmissions_[(first_transmission_ + transmission - oldest) % kMaxTransmissions];
  Chunk* chunk = live_chunk(sent);
  if (chunk == nullptr) return;
  Transfer& transfer = slots_[sent.slot];
  chunk->in_flight = false;
  if (--chunk->tries > 0) --shared_.stats.chunks_sent_again;   // nobody has seen it
  in_flight_bytes_ -= transfer.ticket.bytes_of(sent.chunk);
  transfer.lost.set(sent.chunk);
  ++transfer.num_lost;
}

// When the retransmission timer runs out. It begins anew whenever something is acknowledged: while answers come, a queue
// that grows is not taken for loss.
Nanoseconds Sender::timer() const noexcept {
  if (num_transmissions_ == 0) return kNever;
  const Nanoseconds oldest = transmissions_[first_transmission_ % kMaxTransmissions].sent_at;
  return std::max(oldest, progress_at_) + shared_.rtt.rto(backoff_);
}

void Sender::on_time(Nanoseconds now) noexcept {
  forget_settled();
  if (timer() <= now) {
    const Nanoseconds rto = shared_.rtt.rto(backoff_);
    ++shared_.stats.timeouts;
    ++backoff_;
    progress_at_ = now;
    if (shared_.config.off_host) congestion_.on_timeout(now, shared_.rtt);
    for (std::uint64_t i = 0; i < num_transmissions_; ++i) {
      const Transmission& sent = transmissions_[(first_transmission_ + i) % kMaxTransmissions];
      if (sent.sent_at + rto > now) break;
      lose(sent);
    }
    forget_settled();
  }
  for (std::size_t i = 0; i < active_.size();) {
    Transfer& transfer = slots_[active_[i]];
    const std::size_t before = active_.size();
    if (transfer.state != State::kCancelling && transfer.deadline <= now) {
      abandon(now, transfer, End::kTimeout, ResetReason::kTimeout);
    }
    if (active_.size() == before) ++i;
  }
}

void Sender::on_reset(TransferId id, ResetReason reason) noexcept {
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;
  if (transfer->state == State::kCancelling) {
    release(*transfer);
    return;
  }
  switch (reason) {
    case ResetReason::kTimeout: return finish(*transfer, End::kTimeout);
    case ResetReason::kCorrupt: return finish(*transfer, End::kCorrupt);
    case ResetReason::kRefused:
    case ResetReason::kCancelled: return finish(*transfer, End::kCancelled);
    case ResetReason::kNoSession:
    case ResetReason::kUnknownTransfer: return finish(*transfer, End::kPeerLost);
  }
}

void Sender::drop_in_flight(Transfer& transfer) noexcept {
  const std::uint32_t end = transfer.next;
  for (std::uint32_t number = transfer.cumulative; number < end; ++number) {
    Chunk& chunk = transfer.chunks[number % kWindowChunks];
    if (!chunk.in_flight) continue;
    chunk.in_flight = false;
    in_flight_bytes_ -= transfer.ticket.bytes_of(number);
  }
}

void Sender::finish(Transfer& transfer, End end) noexcept {
  shared_.events.push({.kind = EventKind::kEnded, .direction = Direction::kOutgoing, .transfer = transfer.id,
             .end = end, .ticket = transfer.ticket});
  release(transfer);
}

void Sender::release(Transfer& transfer) noexcept {
  if (transfer.state == State::kSending) drop_in_flight(transfer);
  transfer.state = State::kFree;
  transfer.id = 0;
  transfer.source = Source{};
  std::erase(active_, static_cast<std::uint32_t>(&transfer - slots_.data()));
}

// Ends a transfer here and keeps telling the receiver so until it answers: it must not wait for this one for ever.
void Sender::abandon(Nanoseconds now, Transfer& transfer, End end, ResetReason reason) noexcept {
  const bool was_offered = transfer.control_tries > 0;
  if (!was_offered) return finish(transfer, end);
  shared_.events.push({.kind = EventKind::kEnded, .direction = Direction::kOutgoing, .transfer = transfer.id,
             .end = end, .ticket = transfer.ticket});
  if (transfer.state == State::kSending) drop_in_flight(transfer);
  transfer.source = Source{};
  transfer.state = State::kCancelling;
  transfer.cancelled_for = reason;
  transfer.control_tries = 0;
  transfer.control_due = now;
}

void Sender::end_all(End end) noexcept {
  while (!active_.empty()) {
    Transfer& transfer = slots_[active_.back()];
    if (transfer.state == State::kCancelling) {
      release(transfer);
    } else {
      finish(transfer, end);
    }
  }
  num_transmissions_ = 0;
}

std::uint64_t Sender::window() const noexcept {
  return shared_.config.off_host ? std::min(shared_.peer_credit_bytes, congestion_.bytes())
                  : shared_.peer_credit_bytes;
}

bool Sender::next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept {
  for (const std::uint32_t slot : active_) {
    if (slots_[slot].state != State::kSending && next_control(now, slots_[slot], frame)) return true;
  }
  if (now < next_send_at_) return false;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    Transfer& transfer = slots_[active_[i]];
    if (transfer.state == State::kSending && has_chunk(transfer)) return next_chunk(now, transfer, frame);
  }
  return false;
}

bool Sender::next_control(Nanoseconds now, Transfer& transfer, OutgoingFrame& frame) noexcept {
  if (transfer.control_due > now) return false;
  if (transfer.state == State::kCancelling) {
    std::array<std::byte, kResetBytes> payload;
    write_reset({.reason = transfer.cancelled_for, .heard_incarnation = shared_.peer_incarnation}, payload);
    shared_.write_control(FrameType::kCancel, transfer.id, payload, nullptr, frame);
  } else {
    if (transfer.control_tries == 0) {
      transfer.ticket.chunk_bytes = shared_.chunk_bytes;
      transfer.ticket.digest = transfer.ticket.digest || shared_.digest;
      transfer.ticket.after = std::exchange(last_offered_[transfer.ticket.priority], transfer.id);
    }
    transfer.total = transfer.ticket.num_chunks();
    std::array<std::byte, kTicketBytes> payload;
    write_ticket(transfer.ticket, payload);
    shared_.write_control(FrameType::kOpen, transfer.id, payload, nullptr, frame);
    transfer.opened_at = now;
  }
  transfer.control_due = now + shared_.rtt.rto(transfer.control_tries);
  ++transfer.control_tries;
  return true;
}

bool Sender::has_chunk(const Transfer& transfer) const noexcept {
  return transfer.num_lost > 0 ||
      (transfer.next < transfer.total && transfer.next - transfer.cumulative < kWindowChunks);
}

// What was lost first, in order; else the next new one.
std::uint32_t Sender::choose_chunk(Transfer& transfer) const noexcept {
  if (transfer.num_lost == 0) return transfer.next;
  std::uint32_t base = transfer.cumulative;
  while (transfer.lost.from(base) == 0) base += 64;
  return base + static_cast<std::uint32_t>(std::countr_zero(transfer.lost.from(base)));
}

bool Sender::next_chunk(Nanoseconds now, Transfer& transfer, OutgoingFrame& frame) noexcept {
  if (num_transmissions_ == kMaxTransmissions) return false;
  const std::uint32_t number = choose_chunk(transfer);
  const std::uint32_t bytes = transfer.ticket.bytes_of(number);
  const std::uint64_t allowed = window();
  // One frame may always be under way, else a window below a frame would stop everything; none without credit.
  if (allowed == 0 || (in_flight_bytes_ > 0 && in_flight_bytes_ + bytes > allowed)) return false;
  Chunk& chunk = transfer.chunks[number % kWindowChunks];
  if (number == transfer.next) {
    chunk.tries = 0;
    ++transfer.next;
    shared_.stats.payload_bytes_out += bytes;
  } else {
    if (chunk.tries > shared_.config.max_retries) {
      abandon(now, transfer, End::kTimeout, ResetReason::kTimeout);
      return next_frame(now, frame);
    }
    transfer.lost.clear(number);
    --transfer.num_lost;
    if (chunk.tries > 0) ++shared_.stats.chunks_sent_again;   // else it was taken back
  }
  ++chunk.tries;
  chunk.in_flight = true;
  chunk.sent_at = now;
  chunk.transmission = ++last_number_;
  in_flight_bytes_ += bytes;
  transmissions_[(first_transmission_ + num_transmissions_) % kMaxTransmissions] = {
    last_number_, now, static_cast<std::uint32_t>(&transfer - slots_.data()), transfer.id, number};
  ++num_transmissions_;
  pace(now, bytes);

  Header header = shared_.header(FrameType::kData);
  header.transfer = transfer.id;
  header.chunk = number;
  header.total = transfer.total;
  header.offset = std::uint64_t{number} * transfer.ticket.chunk_bytes;
  header.payload_bytes = static_cast<std::uint16_t>(bytes);
  const bool waits = !has_chunk(transfer) || in_flight_bytes_ + bytes > allowed;
  header.flags = static_cast<std::uint16_t>(chunk.tries << kTryShift);
  if (waits || chunk.tries > 1) header.flags |= kFlagAckNow;
  frame.head_bytes = kHeaderBytes;
  frame.source = &transfer.source;
  frame.source_offset = header.offset;
  frame.payload_bytes = bytes;
  frame.transmission = chunk.transmission;
  if (transfer.ticket.digest) {
    header.flags |= kFlagDigest;
    header.header_bytes = kHeaderBytes + kDigestBytes;
    Digest digest{header, transfer.ticket.epoch};
    transfer.source.each(header.offset, bytes, [&digest](const std::byte* data, std::size_t size) {
      digest.feed({data, size});
    });
    const std::uint32_t value = digest.value();
    std::memcpy(frame.head.data() + kHeaderBytes, &value, sizeof value);
    frame.head_bytes += kDigestBytes;
  }
  write_header(header, std::span{frame.head}.first<kHeaderBytes>());
  ++shared_.stats.frames_out;
  shared_.stats.window_bytes = allowed;
  return true;
}

// Spreads a window over a round trip; what was not used lets a burst of kPacingBurst frames through.
void Sender::pace(Nanoseconds now, std::uint32_t bytes) noexcept {
  const Nanoseconds rtt = shared_.rtt.smoothed();
  if (!shared_.config.off_host || rtt == 0) return;
  const auto gap = static_cast<Nanoseconds>(static_cast<double>(bytes) * static_cast<double>(rtt) /
                       static_cast<double>(window()));
  const Nanoseconds earliest = now - std::min(now, kPacingBurst * gap);
  next_send_at_ = std::max(next_send_at_, earliest) + gap;
}

Nanoseconds Sender::next_time(Nanoseconds now) const noexcept {
  Nanoseconds next = kNever;
  bool has_data = false;
  for (const std::uint32_t slot : active_) {
    const Transfer& transfer = slots_[slot];
    next = std::min(next, transfer.state == State::kCancelling ? kNever : transfer.deadline);
    if (transfer.state != State::kSending) next = std::min(next, std::max(now, transfer.control_due));
    has_data = has_data || (transfer.state == State::kSending && has_chunk(transfer));
  }
  next = std::min(next, timer());
  const std::uint64_t allowed = window();
  const bool may_send = allowed > 0 && (in_flight_bytes_ == 0 || in_flight_bytes_ + shared_.chunk_bytes <= allowed);
  if (has_data && may_send) next = std::min(next, std::max(now, next_send_at_));
  return next;
}

}  // namespace genie::protocol
