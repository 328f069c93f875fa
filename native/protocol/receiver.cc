#include "protocol/receiver.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace genie::protocol {

Receiver::Receiver(Shared& shared)
  : shared_(shared), slots_(shared.config.max_transfers), finished_(kRemembered), replies_(kMaxReplies) {
  active_.reserve(slots_.size());
}

Receiver::Transfer* Receiver::find(TransferId id) noexcept {
  for (const std::uint32_t slot : active_) {
    if (slots_[slot].id == id) return &slots_[slot];
  }
  return nullptr;
}

bool Receiver::is_forgotten(TransferId id) const noexcept {
  return highest_ >= kRemembered && id <= highest_ - kRemembered;
}

bool Receiver::has_ended(TransferId id) const noexcept {
  if (id == 0 || finished_[id % kRemembered].id == id) return true;
  const bool in_progress = std::any_of(active_.begin(), active_.end(), [&](std::uint32_t slot) {
    return slots_[slot].id == id;
  });
  return !in_progress && is_forgotten(id);
}

void Receiver::on_open(const ParsedFrame& frame) noexcept {
  const TransferId id = frame.header.transfer;
  if (Transfer* known = find(id); known != nullptr) {
    if (known->state == State::kReceiving) known->owed_now = true;
    return;
  }
  // Each id begins once: one that has ended, or is too old to know, does not begin again.
  if (has_ended(id)) return answer_absent(id);
  Ticket ticket;
  const TicketLimits limits{.max_bytes = shared_.config.max_transfer_bytes,
               .max_chunk_bytes = shared_.config.max_payload_bytes};
  if (parse_ticket(frame.payload, limits, ticket) != ParseStatus::kOk) {
    ++shared_.stats.bad_tickets;
    return reply({.id = id, .is_reset = true, .reason = ResetReason::kRefused, .total = 0});
  }
  if (active_.size() == slots_.size() || !shared_.events.has_room()) return;  // it is offered again
  const auto free = std::find_if(slots_.begin(), slots_.end(), [](const Transfer& slot) {
    return slot.state == State::kFree;
  });
  *free = Transfer{};
  free->state = State::kOffered;
  free->id = id;
  free->ticket = ticket;
  free->total = ticket.num_chunks();
  active_.push_back(static_cast<std::uint32_t>(free - slots_.begin()));
  highest_ = std::max(highest_, id);
  shared_.events.push({.kind = EventKind::kOffered, .direction = Direction::kIncoming, .transfer = id,
             .end = End::kOk, .ticket = ticket});
}

bool Receiver::accept(Nanoseconds now, TransferId id, Sink sink, Nanoseconds deadline) {
  Transfer* transfer = find(id);
  if (transfer == nullptr || transfer->state != State::kOffered) return false;
  if (sink.size_bytes() != transfer->ticket.size_bytes) return false;
  transfer->state = State::kReceiving;
  transfer->sink = std::move(sink);
  transfer->deadline = deadline;
  transfer->idle_at = now + shared_.config.idle_timeout_ns;
  if (transfer->total == 0) {
    finish(*transfer, End::kOk, {});
    return true;
  }
  transfer->owed_now = true;
  transfer->trigger = ~0u;  // none has come
  transfer->trigger_at = now;
  return true;
}

bool Receiver::cancel(TransferId id, ResetReason reason) noexcept {
  Transfer* transfer = find(id);
  if (transfer == nullptr) return false;
  finish(*transfer, End::kCancelled, reason);
  return true;
}

void Receiver::on_data(Nanoseconds now, const ParsedFrame& frame) noexcept {
  const Header& header = frame.header;
  Transfer* found = find(header.transfer);
  if (found == nullptr) return answer_absent(header.transfer);
  Transfer& transfer = *found;
  const bool as_announced = transfer.state == State::kReceiving && header.total == transfer.total &&
               header.chunk < transfer.total &&
               header.offset == std::uint64_t{header.chunk} * transfer.ticket.chunk_bytes &&
               header.payload_bytes == transfer.ticket.bytes_of(header.chunk) &&
               ((header.flags & kFlagDigest) != 0) == transfer.ticket.digest;
  const std::uint32_t chunk = header.chunk;
  if (!as_announced || (chunk >= transfer.cumulative && chunk - transfer.cumulative >= kWindowChunks)) {
    ++shared_.stats.bad_tickets;
    return;
  }
  if (chunk < transfer.cumulative || transfer.there.test(chunk)) {
    ++shared_.stats.duplicates;
    return owe(transfer, now, header, true, true);
  }
  if ((header.flags & kFlagDigest) != 0) {
    Digest digest{header, transfer.ticket.epoch};
    digest.feed(frame.digested);
    if (digest.value() != frame.digest) {
      ++shared_.stats.bad_digests;
      if (++transfer.corrupt_in_a_row > shared_.config.max_corrupt_in_a_row) {
        finish(transfer, End::kCorrupt, ResetReason::kCorrupt);
      }
      return;
    }
  }
  transfer.corrupt_in_a_row = 0;
  land(transfer, frame);
  transfer.idle_at = now + shared_.config.idle_timeout_ns;
  const bool in_order = chunk == transfer.cumulative && transfer.end <= chunk;
  transfer.there.set(chunk);
  transfer.end = std::max(transfer.end, chunk + 1);
  while (transfer.cumulative < transfer.end && transfer.there.test(transfer.cumulative)) {
    transfer.there.clear(transfer.cumulative++);
  }
  if (transfer.cumulative == transfer.total) return finish(transfer, End::kOk, {});
  owe(transfer, now, header, false, !in_order || (header.flags & kFlagAckNow) != 0);
}

void Receiver::land(Transfer& transfer, const ParsedFrame& frame) const noexcept {
  const std::byte* from = frame.payload.data();
  transfer.sink.each(frame.header.offset, frame.payload.size(), [&from](std::byte* to, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    from += bytes;
  });
  shared_.stats.payload_bytes_in += frame.payload.size();
}

void Receiver::on_cancel(const ParsedFrame& frame) noexcept {
  Reset why;
  if (parse_reset(frame.payload, why) != ParseStatus::kOk || why.heard_incarnation != shared_.incarnation) {
    ++shared_.stats.bad_frames;
    return;
  }
  if (Transfer* transfer = find(frame.header.transfer); transfer != nullptr) {
    finish(*transfer, why.reason == ResetReason::kTimeout ? End::kTimeout : End::kCancelled, why.reason);
    return;
  }
  const TransferId id = frame.header.transfer;
  if (!has_ended(id)) {
    // Given up before its offer came: it must not begin when that comes after all.
    finished_[id % kRemembered] = {id, End::kCancelled, 0};
    highest_ = std::max(highest_, id);
  }
  answer_absent(id);
}

void Receiver::answer_absent(TransferId id) noexcept {
  const Finished& past = finished_[id % kRemembered];
  if (id == 0 || past.id != id) {
    return reply({.id = id, .is_reset = true, .reason = ResetReason::kUnknownTransfer, .total = 0});
  }
  ResetReason reason = ResetReason::kCancelled;
  if (past.end == End::kTimeout) reason = ResetReason::kTimeout;
  if (past.end == End::kCorrupt) reason = ResetReason::kCorrupt;
  reply({.id = id, .is_reset = past.end != End::kOk, .reason = reason, .total = past.total});
}

void Receiver::reply(const Reply& answer) noexcept {
  if (num_replies_ == replies_.size()) return;
  replies_[(first_reply_ + num_replies_) % replies_.size()] = answer;
  ++num_replies_;
}

void Receiver::finish(Transfer& transfer, End end, ResetReason reason) noexcept {
  Finished& record = finished_[transfer.id % kRemembered];
  if (record.id < transfer.id) record = {transfer.id, end, transfer.total};
  shared_.events.push({.kind = EventKind::kEnded, .direction = Direction::kIncoming, .transfer = transfer.id,
             .end = end, .ticket = transfer.ticket});
  reply({.id = transfer.id, .is_reset = end != End::kOk, .reason = reason, .total = transfer.total});
  transfer.state = State::kFree;
  transfer.id = 0;
  transfer.sink = Sink{};
  std::erase(active_, static_cast<std::uint32_t>(&transfer - slots_.data()));
}

void Receiver::on_time(Nanoseconds now) noexcept {
  for (std::size_t i = active_.size(); i-- > 0;) {
    Transfer& transfer = slots_[active_[i]];
    if (transfer.deadline <= now || transfer.idle_at <= now) {
      finish(transfer, End::kTimeout, ResetReason::kTimeout);
    }
  }
}

void Receiver::end_all(End end) noexcept {
  while (!active_.empty()) finish(slots_[active_.back()], end, ResetReason::kCancelled);
  num_replies_ = 0;
}

void Receiver::owe(Transfer& transfer, Nanoseconds now, const Header& header, bool duplicate, bool at_once) noexcept {
  if (transfer.owed_chunks++ == 0) transfer.owed_since = now;
  transfer.owed_now = transfer.owed_now || at_once;
  transfer.trigger = header.chunk;
  transfer.trigger_try = static_cast<std::uint8_t>(header.flags >> kTryShift);
  transfer.trigger_at = now;
  transfer.trigger_duplicate = duplicate;
}

bool Receiver::is_due(const Transfer& transfer, Nanoseconds now) const noexcept {
  return transfer.owed_now || transfer.owed_chunks >= shared_.config.ack_every_chunks ||
      (transfer.owed_chunks > 0 && now - transfer.owed_since >= shared_.config.ack_delay_ns);
}

bool Receiver::next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept {
  if (num_replies_ > 0) {
    const Reply answer = replies_[first_reply_];
    first_reply_ = (first_reply_ + 1) % replies_.size();
    --num_replies_;
    if (answer.is_reset) {
      std::array<std::byte, kResetBytes> payload;
      write_reset({.reason = answer.reason, .heard_incarnation = shared_.peer_incarnation}, payload);
      shared_.write_control(FrameType::kReset, answer.id, payload, nullptr, frame);
      ++shared_.stats.resets_out;
    } else {
      Sack sack;
      sack.transfer = answer.id;
      sack.cumulative = answer.total;
      sack.trigger = answer.total == 0 ? 0 : answer.total - 1;
      sack.duplicate = true;  // says nothing of when that chunk came
      shared_.write_control(FrameType::kAck, answer.id, {}, &sack, frame);
    }
    return true;
  }
  for (const std::uint32_t slot : active_) {
    if (!is_due(slots_[slot], now)) continue;
    write_owed(slots_[slot], now, frame);
    return true;
  }
  return false;
}

void Receiver::write_owed(Transfer& transfer, Nanoseconds now, OutgoingFrame& frame) noexcept {
  Sack sack;
  sack.transfer = transfer.id;
  sack.cumulative = transfer.cumulative;
  sack.trigger = transfer.trigger;
  sack.trigger_delay_ns = static_cast<std::uint32_t>(std::min<Nanoseconds>(now - transfer.trigger_at, 0xFFFFFFFF));
  sack.trigger_try = transfer.trigger_try;
  sack.duplicate = transfer.trigger_duplicate;
  for (std::uint32_t base = transfer.cumulative; base < transfer.end && sack.words < kSackWords; base += 64) {
    sack.bitmap[sack.words++] = transfer.there.from(base);
  }
  while (sack.words > 0 && sack.bitmap[sack.words - 1] == 0) --sack.words;
  shared_.write_control(FrameType::kAck, transfer.id, {}, &sack, frame);
  transfer.owed_chunks = 0;
  transfer.owed_now = false;
}

Nanoseconds Receiver::next_time(Nanoseconds now) const noexcept {
  Nanoseconds next = num_replies_ > 0 ? now : kNever;
  for (const std::uint32_t slot : active_) {
    const Transfer& transfer = slots_[slot];
    next = std::min({next, transfer.deadline, transfer.idle_at});
    if (transfer.owed_now || transfer.owed_chunks >= shared_.config.ack_every_chunks) next = std::min(next, now);
    if (transfer.owed_chunks > 0) next = std::min(next, transfer.owed_since + shared_.config.ack_delay_ns);
  }
  return next;
}

}  // namespace genie::protocol
