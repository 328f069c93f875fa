#include "simulator.h"

#include <algorithm>

namespace genie::protocol {
namespace {
constexpr std::uint64_t kSession = 0x1122334455667788;
}

Simulator::Simulator(std::uint64_t seed, const Weather& in, const Config& first, const Config& second)
    : weather(in), random_(seed), configs_{first, second} {
  sides_[0].session = std::make_unique<Session>(first, Role::kConnects, kSession, 1001, now_);
  sides_[1].session = std::make_unique<Session>(second, Role::kWaits, kSession, 2002, now_);
}

const std::vector<std::byte>& Simulator::make_bytes(std::size_t size) {
  auto bytes = std::make_unique<std::vector<std::byte>>(size);
  for (std::size_t i = 0; i < size; ++i) {
    (*bytes)[i] = static_cast<std::byte>((i * 2654435761u >> 13) + memory_.size() * 7);
  }
  memory_.push_back(std::move(bytes));
  return *memory_.back();
}

TransferId Simulator::post(int from, const std::vector<std::byte>& bytes, std::uint8_t priority, Nanoseconds timeout_ns) {
  // In three pieces, one of them empty: chunks cross their borders.
  const std::size_t cut = bytes.size() / 3;
  Source source{{{bytes.data(), cut}, {bytes.data(), 0}, {bytes.data() + cut, bytes.size() - cut}}};
  Ticket ticket;
  ticket.epoch = 42;
  ticket.tag = bytes.size();
  ticket.priority = priority;
  const TransferId id = side(from).session->post(now_, std::move(source), ticket, timeout_ns);
  if (id != 0) side(from).outgoing[id];
  serve(from);
  return id;
}

void Simulator::restart(int index, std::uint32_t incarnation, bool knows_session) {
  Side fresh;
  if (knows_session) {
    const Role role = index == 0 ? Role::kConnects : Role::kWaits;
    fresh.session = std::make_unique<Session>(configs_[index], role, kSession, incarnation, now_);
  }
  side(index) = std::move(fresh);
  serve(index);
}

void Simulator::deliver_at(Nanoseconds at, int to, std::vector<std::byte> bytes) {
  flights_.push({at, order_++, to, std::move(bytes)});
}

void Simulator::transmit(int from, const OutgoingFrame& frame) {
  std::vector<std::byte> bytes(std::max<std::size_t>(frame.size_bytes(), 46));  // Ethernet pads
  frame.copy_to(bytes.data());
  const int to = 1 - from;
  Nanoseconds& free_at = link_free_at_[from];
  const auto queued = static_cast<double>(std::max(free_at, now_) - now_) * 1e-9 * weather.bytes_per_s;
  if (chance(weather.drop) || queued > static_cast<double>(weather.queue_bytes)) return;
  free_at = std::max(free_at, now_) +
            static_cast<Nanoseconds>(static_cast<double>(bytes.size() + 24) * 1e9 / weather.bytes_per_s);
  Nanoseconds at = free_at + weather.delay_ns;
  if (chance(weather.reorder)) at += static_cast<Nanoseconds>(uniform_(random_) * static_cast<double>(weather.reorder_delay_ns));
  if (chance(weather.duplicate)) deliver_at(at + weather.delay_ns / 2, to, bytes);
  if (chance(weather.corrupt)) bytes[random_() % bytes.size()] ^= static_cast<std::byte>(1u << random_() % 8);
  last_frame_[to] = bytes;
  deliver_at(at, to, std::move(bytes));
}

void Simulator::take_events(int index) {
  Side& at = side(index);
  for (Event event; at.session->next_event(event);) {
    switch (event.kind) {
      case EventKind::kEstablished: break;
      case EventKind::kClosed: at.closed = event.end; break;
      case EventKind::kOffered: {
        ++at.offers[event.transfer];
        at.tickets[event.transfer] = event.ticket;
        auto& memory = at.landed[event.transfer];
        memory.assign(event.ticket.size_bytes, std::byte{0});
        const std::size_t half = memory.size() / 2;
        if (at.accepts) {
          at.incoming[event.transfer];
          (void)at.session->accept(now_, event.transfer, Sink{{{memory.data(), half}, {memory.data() + half, memory.size() - half}}},
                                   30 * kSecond);
        }
        break;
      }
      case EventKind::kEnded: {
        Outcome& outcome = (event.direction == Direction::kOutgoing ? at.outgoing : at.incoming)[event.transfer];
        outcome.end = event.end;
        ++outcome.times;
        if (event.direction == Direction::kIncoming) at.arrived.push_back(event.transfer);
        break;
      }
    }
  }
}

void Simulator::serve(int index) {
  Side& at = side(index);
  if (!at.running || at.session == nullptr) return;
  at.session->on_time(now_);
  take_events(index);
  for (OutgoingFrame frame; at.session->next_frame(now_, frame);) {
    if (chance(weather.refuse)) {
      at.session->take_back(frame.transmission);
      break;
    }
    transmit(index, frame);
  }
  take_events(index);
}

bool Simulator::step() {
  Nanoseconds timer = kNever;
  int whose = 0;
  for (int i = 0; i < 2; ++i) {
    if (!side(i).running || side(i).session == nullptr) continue;
    const Nanoseconds next = side(i).session->next_time(now_);
    if (next < timer) timer = next, whose = i;
  }
  if (!flights_.empty() && flights_.top().at <= timer) {
    const Flight flight = flights_.top();
    flights_.pop();
    now_ = std::max(now_, flight.at);
    Side& to = side(flight.to);
    if (!to.running) return true;
    if (to.session == nullptr) {
      OutgoingFrame reset;
      if (write_no_session(flight.bytes, reset)) transmit(flight.to, reset);
      return true;
    }
    to.session->on_frame(now_, flight.bytes);
    serve(flight.to);
    return true;
  }
  if (timer == kNever) return false;
  // A timer that is due but moves nothing must not hold the clock.
  now_ = timer > now_ ? timer : now_ + 1;
  serve(whose);
  return true;
}

bool Simulator::run(const std::function<bool()>& done, Nanoseconds limit_ns) {
  const Nanoseconds until = now_ + limit_ns;
  serve(0);
  serve(1);
  while (!done()) {
    if (now_ >= until || !step()) return done();
  }
  return true;
}

}  // namespace genie::protocol
