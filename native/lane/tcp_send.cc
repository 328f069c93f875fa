#include "lane/tcp_lane.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "lane/digest.h"

namespace genie::tcp {
namespace {

constexpr std::size_t kMaxParts = 64;                           // of one system call

}  // namespace

void TcpLane::queue_bare(tcp::Kind kind) noexcept try {
  Outgoing out;
  out.bare = true;
  out.kind = kind;
  auto& urgent = queues_[0];
  // Not into the middle of a message.
  urgent.insert(!urgent.empty() && urgent.front().started() ? urgent.begin() + 1 : urgent.begin(), std::move(out));
  ++num_queued_;
} catch (...) {
  shut(End::kLocal, "out of memory");
}

// The one that is on the wire already, else the most urgent; null where that is bulk, and enough of it is under way.
std::deque<Outgoing>* TcpLane::choose() noexcept {
  std::deque<Outgoing>* first = nullptr;
  for (auto& queue : queues_) {
    if (queue.empty()) continue;
    if (queue.front().started()) return &queue;
    if (first == nullptr) first = &queue;
  }
  if (first != nullptr && first->front().bulk && !bulk_.has_room(first->front().size_bytes())) return nullptr;
  return first;
}

void TcpLane::begin(Outgoing& out) {
  if (!out.bare) out.sequence = ++last_sequence_;
  tcp::Header header{out.kind, static_cast<std::uint8_t>(out.digest ? tcp::kHasDigest : 0),
                     static_cast<std::uint16_t>(out.slices.size()), out.id, out.sequence, out.epoch,
                     last_arrived_};
  const std::size_t sizes = out.bare ? 0 : out.slices.size() * 8 + 4;
  out.lead.resize(tcp::kHeaderBytes + sizes);
  tcp::write_header(header, out.lead.data());
  if (!out.bare) {
    std::byte* at = out.lead.data() + tcp::kHeaderBytes;
    for (const Slice& slice : out.slices) {
      const std::uint64_t size = slice.size_bytes;
      std::memcpy(at, &size, 8);
      at += 8;
    }
    const std::uint32_t crc = crc32c(out.lead.data() + tcp::kHeaderBytes, out.slices.size() * 8);
    std::memcpy(at, &crc, 4);
  }
  said_acked_ = last_arrived_;
  out.crc = crc32c(&out.epoch, sizeof out.epoch);
}

void TcpLane::send_queued() noexcept try {
  while (num_queued_ > 0) {
    std::deque<Outgoing>* queue = choose();
    if (queue == nullptr) return;
    Outgoing& out = queue->front();
    const std::uint64_t acked_before = said_acked_;
    if (out.lead.empty()) begin(out);
    if (!send_some(out)) {
      if (!closed_ && !out.bare && !out.started()) {
        // Nothing of it has left: it may still be cancelled or overtaken, so its number goes to whoever is next.
        out.lead.clear();
        --last_sequence_;
        said_acked_ = acked_before;
      }
      return;
    }
    if (!out.bare) {
      Unacked sent{out.id, out.sequence, out.deadline, out.bulk, false, 0, std::move(out.slices)};
      for (const Slice& slice : sent.slices) sent.size_bytes += slice.size_bytes;
      if (sent.bulk) bulk_.left(sent.size_bytes);
      if (const auto at = std::find(cancelled_.begin(), cancelled_.end(), out.id); at != cancelled_.end()) {
        cancelled_.erase(at);
        sent.ended = true;
      }
      unacked_.push_back(std::move(sent));
    }
    queue->pop_front();
    --num_queued_;
  }
} catch (...) {
  shut(End::kLocal, "out of memory");
}

// False where the socket takes no more now, or is gone.
bool TcpLane::send_some(Outgoing& out) noexcept {
  while (out.part < out.num_parts()) {
    std::array<iovec, kMaxParts> parts{};
    std::size_t count = 0;
    std::size_t wanted = 0;
    for (std::size_t which = out.part; which < out.num_parts() && count < kMaxParts; ++which) {
      std::span<const std::byte> bytes = out.bytes_of(which);
      if (which == out.part) bytes = bytes.subspan(out.sent);
      if (out.digest && which > 0) {
        // Summed right before it is sent, a step of one part at a time; the trailer once all slices are summed.
        if (which != out.part) break;
        if (which > out.slices.size()) {
          std::memcpy(out.trailer.data(), &out.crc, out.trailer.size());
        } else {
          bytes = bytes.first(std::min(bytes.size(), kDigestStep));
          sum_up_to(out, out.sent + bytes.size());
        }
      }
      parts[count++] = {const_cast<std::byte*>(bytes.data()), bytes.size()};
      wanted += bytes.size();
    }
    if (wanted == 0) {
      ++out.part;
      out.sent = out.summed = 0;
      continue;
    }
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = count;
    const ssize_t sent = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT |
                                                                   (out.part + count < out.num_parts() ? MSG_MORE : 0));
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        set_blocked(true);
      } else {
        shut(End::kPeerLost, error_text("sending"));
      }
      return false;
    }
    advance(out, static_cast<std::size_t>(sent));
  }
  set_blocked(false);
  return true;
}

void TcpLane::sum_up_to(Outgoing& out, std::size_t until) noexcept {
  if (until <= out.summed) return;
  const std::span<const std::byte> bytes = out.bytes_of(out.part);
  out.crc = crc32c(bytes.data() + out.summed, until - out.summed, out.crc);
  out.summed = until;
}

void TcpLane::advance(Outgoing& out, std::size_t sent) noexcept {
  while (sent > 0) {
    const std::size_t left = out.bytes_of(out.part).size() - out.sent;
    if (sent < left) {
      out.sent += sent;
      return;
    }
    sent -= left;
    ++out.part;
    out.sent = out.summed = 0;
  }
}

void TcpLane::set_blocked(bool blocked) noexcept {
  if (blocked == blocked_ || closed_) return;
  blocked_ = blocked;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | (blocked ? EPOLLOUT : 0U);
  event.data.fd = socket_.get();
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, socket_.get(), &event);
}

bool TcpLane::take_acked(std::uint64_t sequence) noexcept {
  if (sequence > last_sequence_) return false;
  while (!unacked_.empty() && unacked_.front().sequence <= sequence) {
    if (!unacked_.front().ended) end(unacked_.front().id, End::kOk);
    facts_.bytes_open -= unacked_.front().size_bytes;
    if (unacked_.front().bulk) bulk_.taken(unacked_.front().size_bytes);
    unacked_.pop_front();
  }
  return true;
}

}  // namespace genie::tcp
