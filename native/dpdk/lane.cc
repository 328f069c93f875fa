#include "dpdk/lane.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <map>

#include "dpdk/endpoint.h"
#include "dpdk/hub.h"
#include "lane/landing.h"

namespace genie::dpdk {

using protocol::Direction;
using protocol::Event;
using protocol::EventKind;
using protocol::Nanoseconds;
using protocol::TransferId;

namespace {

// What stands before the slices of a transfer: how many there are and their sizes. Everything is aligned to 64 bytes.
constexpr std::uint32_t kManifestMagic = 0x464D4E47;
constexpr std::size_t kManifestHead = 16;  // magic, number of slices, id
constexpr std::size_t kAlignment = 64;
constexpr std::array<std::byte, kAlignment> kPadding{};
constexpr std::uint64_t kMaxUntakenBytes = std::uint64_t{256} << 20;   // landed, and nobody has polled for it yet
constexpr Nanoseconds kLongest = 3600 * protocol::kSecond;  // of a transfer without a deadline

constexpr std::size_t aligned(std::size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

DpdkLane::DpdkLane(std::shared_ptr<Hub> hub, const protocol::Config& config, protocol::Role role, std::uint64_t session,
                   std::uint32_t incarnation)
    : Client(config, role, session, incarnation), hub_(std::move(hub)), wait_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wait_fd_ < 0) throw LaneError("no descriptor left for an eventfd");
  capabilities_.name = "dpdk";
  capabilities_.off_host = hub_->port().kind() != PortKind::kMemif;
  capabilities_.hardware_verified = hub_->port().kind() != PortKind::kPci;
  capabilities_.max_slices = kMaxSlices;
  capabilities_.max_transfer_bytes = config.max_transfer_bytes - aligned(kManifestHead + 8 * kMaxSlices) - kAlignment * kMaxSlices;
}

DpdkLane::~DpdkLane() {
  close();
  ::close(wait_fd_);
  if (generation_ != fork_generation()) keep_for_ever(hub_);
}

Posted DpdkLane::post(const Transfer& transfer) noexcept try {
  const auto lock = hub_->lock();
  if (closed_ || session_.is_closed()) return Posted::kClosed;
  if (transfer.id <= last_id_ || transfer.slices.size() > kMaxSlices) return Posted::kRefused;
  Sending sending;
  sending.id = transfer.id;
  std::size_t payload = 0;
  for (const Slice& slice : transfer.slices) payload += slice.size_bytes;
  if (payload > capabilities_.max_transfer_bytes) return Posted::kRefused;
  sending.size_bytes = payload;
  sending.slices.assign(transfer.slices.begin(), transfer.slices.end());
  protocol::Source source = describe(sending);
  const Nanoseconds now = now_ns();
  Nanoseconds timeout = kLongest;
  if (transfer.deadline != kNoDeadline) {
    const auto left = transfer.deadline - Clock::now();
    timeout = left.count() > 0 ? static_cast<Nanoseconds>(std::chrono::nanoseconds(left).count()) : 0;
  }
  protocol::Ticket ticket;
  ticket.epoch = transfer.epoch;
  ticket.tag = transfer.id;
  ticket.priority = static_cast<std::uint8_t>(transfer.priority);
  ticket.digest = transfer.digest;
  const std::uint64_t whole = source.size_bytes();
  const TransferId id = session_.post(now, std::move(source), ticket, timeout);
  if (id == 0) return Posted::kBusy;
  last_id_ = transfer.id;
  ++facts_.posted;
  facts_.bytes_sent += payload;
  facts_.bytes_copied_out += whole;
  facts_.bytes_open += payload;
  sending_.emplace(id, std::move(sending));
  hub_->pump();
  return Posted::kAccepted;
} catch (...) {
  return Posted::kBusy;
}

// The manifest of a transfer, then its slices, each padded.
protocol::Source DpdkLane::describe(Sending& sending) {
  const std::size_t count = sending.slices.size();
  sending.manifest.resize(aligned(kManifestHead + 8 * count));
  const auto put = [&](std::size_t at, auto value) { std::memcpy(sending.manifest.data() + at, &value, sizeof value); };
  put(0, kManifestMagic);
  put(4, static_cast<std::uint32_t>(count));
  put(8, sending.id);
  std::vector<protocol::ConstPiece> pieces{{sending.manifest.data(), sending.manifest.size()}};
  for (std::size_t i = 0; i < count; ++i) {
    const Slice& slice = sending.slices[i];
    put(kManifestHead + 8 * i, static_cast<std::uint64_t>(slice.size_bytes));
    pieces.push_back({slice.data, slice.size_bytes});
    pieces.push_back({kPadding.data(), aligned(slice.size_bytes) - slice.size_bytes});
  }
  return protocol::Source{std::move(pieces)};
}

void DpdkLane::on_event(Nanoseconds now, const Event& event) noexcept {
  switch (event.kind) {
    case EventKind::kEstablished: return;
    case EventKind::kOffered: return on_offered(now, event);
    case EventKind::kClosed: {
      return shut(event.end, event.end == End::kPeerLost ? "the other end is gone" : "it was closed here");
    }
    case EventKind::kEnded: break;
  }
  if (event.direction == Direction::kIncoming) {
    if (event.end != End::kOk) {
      std::erase_if(waiting_, [&](const Event& offer) { return offer.transfer == event.transfer; });
      if (const auto at = landing_.find(event.transfer); at != landing_.end()) {
        untaken_bytes_ -= at->second.ticket.size_bytes;
        landing_.erase(at);
      }
    } else if (const auto at = landing_.find(event.transfer); at != landing_.end()) {
      at->second.is_whole = true;
    }
    return;
  }
  const auto at = sending_.find(event.transfer);
  if (at == sending_.end()) return;
  facts_.bytes_open -= at->second.size_bytes;
  ++(event.end == End::kOk ? facts_.ended_ok : facts_.ended_badly);
  ended_.push_back({at->second.id, event.end});
  done_.push_back(std::move(at->second));   // its owners go when nobody holds the lock
  sending_.erase(at);
}

// The port's thread lands what comes, whoever polls or not; what nobody polls for is bounded, and the sender waits.
void DpdkLane::on_offered(Nanoseconds now, const Event& event) noexcept {
  try {
    if (untaken_bytes_ > 0 && untaken_bytes_ + event.ticket.size_bytes > kMaxUntakenBytes) {
      waiting_.push_back(event);
      return;
    }
    Landing landing{event.ticket, land(event.ticket.size_bytes), false};
    if (landing.memory.data == nullptr) {
      session_.refuse(event.transfer);
      return;
    }
    protocol::Sink sink{{{landing.memory.data, event.ticket.size_bytes}}};
    landing_.emplace(event.transfer, std::move(landing));
    if (session_.accept(now, event.transfer, std::move(sink), kLongest)) {
      untaken_bytes_ += event.ticket.size_bytes;
    } else {
      landing_.erase(event.transfer);
    }
  } catch (const std::bad_alloc&) {
    session_.refuse(event.transfer);
  }
}

// Hands on what is whole, each priority in the order of its offers.
void DpdkLane::on_events_told() noexcept {
  for (auto at = landing_.begin(); at != landing_.end();) {
    const TransferId after = at->second.ticket.after;
    const bool in_turn = session_.has_ended(after) && !landing_.contains(after);
    if (!at->second.is_whole || !in_turn) {
      ++at;
      continue;
    }
    Arrived arrived;
    arrived.whole_bytes = at->second.ticket.size_bytes;
    const bool sound = open(at->second, arrived);
    at = landing_.erase(at);
    if (!sound) {
      session_.close(End::kCorrupt);
      return shut(End::kCorrupt, "a transfer's slices do not fill it");
    }
    ++facts_.arrived;
    arrived_.push_back(std::move(arrived));
    at = landing_.begin();   // what waited for this one
  }
  const bool told = !arrived_.empty() || closed_ || (armed_for_ends_ && !ended_.empty());
  if (armed_ && told) wake();
}

bool DpdkLane::open(Landing& landing, Arrived& arrived) noexcept try {
  const Buffer& whole = landing.memory;
  const std::uint64_t size = landing.ticket.size_bytes;
  const auto get = [&](std::size_t at, auto& value) { std::memcpy(&value, whole.data + at, sizeof value); };
  std::uint32_t magic = 0, count = 0;
  if (size < aligned(kManifestHead)) return false;
  get(0, magic);
  get(4, count);
  get(8, arrived.id);
  if (magic != kManifestMagic || count > kMaxSlices || arrived.id != landing.ticket.tag) return false;
  std::uint64_t at = aligned(kManifestHead + std::size_t{8} * count);
  if (at > size) return false;
  arrived.epoch = landing.ticket.epoch;
  for (std::uint32_t i = 0; i < count; ++i) {
    std::uint64_t bytes = 0;
    get(kManifestHead + std::size_t{8} * i, bytes);
    if (bytes > size - at || aligned(bytes) > size - at) return false;
    Buffer buffer;
    buffer.data = whole.data + at;
    buffer.size_bytes = bytes;
    buffer.owner = whole.owner;
    arrived.buffers.push_back(std::move(buffer));
    facts_.bytes_arrived += bytes;
    at += aligned(bytes);
  }
  facts_.bytes_copied_in += size;
  return at == size;
} catch (...) {
  return false;
}

void DpdkLane::shut(End why, const char* reason) noexcept {
  if (closed_) return;
  closed_ = true;
  why_ = why;
  reason_ = reason;
  if (armed_) wake();
}

std::size_t DpdkLane::poll(Sink& sink) noexcept {
  std::deque<Arrived> arrived;
  std::vector<Ended> ended;
  std::vector<Sending> done;
  bool tell_closed = false;
  {
    const auto lock = hub_->lock();
    if (attached_) hub_->pump();
    armed_ = false;
    if (rung_.exchange(false)) {
      std::uint64_t rings = 0;
      [[maybe_unused]] const ssize_t got = ::read(wait_fd_, &rings, sizeof rings);
    }
    arrived.swap(arrived_);
    for (const Arrived& one : arrived) untaken_bytes_ -= one.whole_bytes;
    while (!arrived.empty() && !waiting_.empty() && !closed_ &&
           (untaken_bytes_ == 0 || untaken_bytes_ + waiting_.front().ticket.size_bytes <= kMaxUntakenBytes)) {
      const Event offer = waiting_.front();
      waiting_.pop_front();
      on_offered(now_ns(), offer);
    }
    ended.swap(ended_);
    done.swap(done_);
    tell_closed = closed_ && !told_closed_;
    told_closed_ = closed_;
  }
  for (Arrived& one : arrived) sink.on_arrived(one.id, one.epoch, std::move(one.buffers));
  for (const Ended& one : ended) sink.on_ended(one.id, one.end);
  if (tell_closed) sink.on_closed(why_, reason_);
  return arrived.size() + ended.size() + (tell_closed ? 1 : 0);
}

bool DpdkLane::arm(bool for_ends) noexcept {
  const auto lock = hub_->lock();
  if (!arrived_.empty() || (for_ends && !ended_.empty()) || (closed_ && !told_closed_) || rung_) return false;
  armed_ = true;
  armed_for_ends_ = for_ends;
  return true;
}

void DpdkLane::wake() noexcept {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wait_fd_, &one, sizeof one);
  rung_ = true;   // after the write: whoever takes it off finds what was written, or looks once more
}

bool DpdkLane::cancel(std::uint64_t id) noexcept {
  const auto lock = hub_->lock();
  for (const auto& [transfer, sending] : sending_) {
    if (sending.id == id) return session_.cancel(now_ns(), Direction::kOutgoing, transfer);
  }
  return false;
}

bool DpdkLane::quiet() const noexcept {
  const auto lock = hub_->lock();
  return sending_.empty();
}

void DpdkLane::close() noexcept {
  if (generation_ != fork_generation()) return;
  const auto lock = hub_->lock();
  if (!attached_) return;
  session_.close();
  hub_->pump();   // the last frame goes out, the last events come in
  hub_->detach(*this);
  attached_ = false;
  landing_.clear();
  shut(End::kCancelled, "it was closed here");
}

Statistics DpdkLane::statistics() const noexcept {
  const auto lock = hub_->lock();
  return facts_;
}

std::vector<std::pair<std::string, std::uint64_t>> DpdkLane::details() const {
  const auto lock = hub_->lock();
  const protocol::Stats stats = session_.stats();
  const PortStats& port = hub_->port().stats();
  return {{"chunk_bytes", session_.chunk_bytes()},           {"chunks_sent_again", stats.chunks_sent_again},
          {"timeouts", stats.timeouts},                      {"duplicates", stats.duplicates},
          {"bad_frames", stats.bad_frames},                  {"bad_digests", stats.bad_digests},
          {"bad_tickets", stats.bad_tickets},                {"stale_frames", stats.stale_frames},
          {"smoothed_rtt_ns", stats.smoothed_rtt_ns},        {"window_bytes", stats.window_bytes},
          {"frames_in", port.frames_in},                     {"frames_out", port.frames_out},
          {"foreign_frames", port.foreign_frames},           {"not_taken", port.not_taken},
          {"no_buffer", port.no_buffer},                     {"linearised", port.linearised},
          {"gathered", port.gathered},                       {"untaken_bytes", untaken_bytes_}};
}

}  // namespace genie::dpdk
