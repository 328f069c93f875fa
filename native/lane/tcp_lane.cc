#include "lane/tcp_lane.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace genie::tcp {
namespace {

constexpr std::size_t kMaxQueued = 1024;

}  // namespace

TcpLane::TcpLane(Fd socket, const TcpOptions& options) : socket_(std::move(socket)), staging_(kStagingBytes) {
  capabilities_.name = "tcp";
  capabilities_.off_host = true;
  capabilities_.max_transfer_bytes = options.max_transfer_bytes;
  const int one = 1;
  ::setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!wake_.valid() || !epoll_.valid()) throw LaneError(error_text("making an eventfd"));
  watch(EPOLL_CTL_ADD, wake_.get(), EPOLLIN | EPOLLET);
  watch(EPOLL_CTL_ADD, socket_.get(), EPOLLIN | EPOLLRDHUP);
}

void TcpLane::send_hello() {
  std::array<std::byte, tcp::kHelloBytes> hello{};
  tcp::write_hello(capabilities_.max_transfer_bytes, hello.data());
  if (::send(socket_.get(), hello.data(), hello.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(hello.size())) {
    throw LaneError(error_text("greeting"));
  }
}

bool TcpLane::receive_hello() {
  while (hello_have_ < hello_.size()) {
    const ssize_t got = ::recv(socket_.get(), hello_.data() + hello_have_, hello_.size() - hello_have_, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (got <= 0) throw LaneError("the other end hung up before it said hello");
    hello_have_ += static_cast<std::size_t>(got);
  }
  std::uint32_t magic = 0;
  std::uint16_t version = 0;
  std::uint64_t peer_max = 0;
  std::memcpy(&magic, hello_.data(), 4);
  std::memcpy(&version, hello_.data() + 4, 2);
  std::memcpy(&peer_max, hello_.data() + 8, 8);
  if (magic != tcp::kMagic) throw LaneError("not a genie tcp lane");
  if (version != kLaneVersion) {
    throw LaneError("the other end speaks lane version " + std::to_string(version) + ", this one " +
                    std::to_string(kLaneVersion));
  }
  peer_max_ = peer_max;
  return true;
}

Posted TcpLane::post(const Transfer& transfer) noexcept try {
  if (closed_) return Posted::kClosed;
  if (transfer.id <= last_id_ || transfer.slices.size() > kMaxSlices) return Posted::kRefused;
  std::size_t total = 0;
  for (const Slice& slice : transfer.slices) total += slice.size_bytes;
  if (total > peer_max_) return Posted::kRefused;
  if (num_queued_ >= kMaxQueued) return Posted::kBusy;
  Outgoing out;
  out.id = transfer.id;
  out.epoch = transfer.epoch;
  out.digest = transfer.digest;
  out.bulk = transfer.priority == Priority::kBulk;
  out.deadline = transfer.deadline;
  out.slices.assign(transfer.slices.begin(), transfer.slices.end());
  last_id_ = transfer.id;
  queues_[static_cast<std::size_t>(transfer.priority)].push_back(std::move(out));
  ++num_queued_;
  ++facts_.posted;
  facts_.bytes_sent += total;
  facts_.bytes_open += total;
  if (transfer.deadline != kNoDeadline) next_deadline_ = std::min(next_deadline_, transfer.deadline);
  if (!blocked_) send_queued();
  return Posted::kAccepted;
} catch (...) {
  return Posted::kBusy;
}

std::size_t TcpLane::poll(Sink& sink) noexcept {
  sink_ = &sink;
  reported_ = 0;
  if (!closed_) {
    receive();
    if (!closed_) send_queued();
    if (!closed_ && next_deadline_ != kNoDeadline) expire();
  }
  for (const auto& [id, how] : ends_) {
    sink.on_ended(id, how);
    ++reported_;
  }
  ends_.clear();
  if (closed_ && !said_closed_) {
    said_closed_ = true;
    ++reported_;
    sink.on_closed(why_, reason_);
  }
  sink_ = nullptr;
  return reported_;
}

bool TcpLane::arm(bool) noexcept {
  if (closed_) return said_closed_;
  if (last_arrived_ > said_acked_) {
    queue_bare(tcp::Kind::kAck);
    send_queued();
    if (closed_) return false;
  }
  return ends_.empty() && !more_;
}

void TcpLane::wake() noexcept {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof one);
}

bool TcpLane::cancel(std::uint64_t id) noexcept {
  for (auto& queue : queues_) {
    const auto at = std::find_if(queue.begin(), queue.end(), [id](const Outgoing& o) { return !o.bare && o.id == id; });
    if (at == queue.end()) continue;
    if (at->started()) {
      if (was_cancelled(id)) return false;
      // Half of it is on the wire: only the stream's end could take it back. The peer will get it.
      cancelled_.push_back(id);
    } else {
      facts_.bytes_open -= at->size_bytes();
      queue.erase(at);
      --num_queued_;
    }
    end(id, End::kCancelled);
    return true;
  }
  for (Unacked& sent : unacked_) {
    if (sent.id != id || sent.ended) continue;
    sent.ended = true;
    end(id, End::kCancelled);
    return true;
  }
  return false;
}

std::uint64_t TcpLane::bytes_moved(std::uint64_t id) const noexcept {
  for (const auto& queue : queues_) {
    for (const Outgoing& out : queue) {
      if (!out.bare && out.id == id) return out.moved_bytes();
    }
  }
  for (const Unacked& sent : unacked_) {
    if (sent.id == id) return sent.size_bytes;
  }
  return 0;
}

bool TcpLane::quiet() const noexcept {
  return num_queued_ == 0 && ends_.empty() &&
         std::all_of(unacked_.begin(), unacked_.end(), [](const Unacked& sent) { return sent.ended; });
}

void TcpLane::close() noexcept {
  if (closed_) return;
  if (::getpid() == pid_ && !mid_message()) {
    std::array<std::byte, tcp::kHeaderBytes> bye{};
    tcp::write_header({tcp::Kind::kBye, 0, 0, 0, 0, 0, last_arrived_}, bye.data());
    [[maybe_unused]] const ssize_t sent = ::send(socket_.get(), bye.data(), bye.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  shut(End::kCancelled, "closed here");
}

void TcpLane::watch(int operation, int fd, std::uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), operation, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
}

bool TcpLane::mid_message() const noexcept {
  return std::any_of(queues_.begin(), queues_.end(),
                     [](const auto& queue) { return !queue.empty() && queue.front().started(); });
}

void TcpLane::end(std::uint64_t id, End how) noexcept {
  ++(how == End::kOk ? facts_.ended_ok : facts_.ended_badly);
  try {
    ends_.emplace_back(id, how);
  } catch (...) {
    shut(End::kLocal, "out of memory");
  }
}

void TcpLane::shut(End why, std::string reason) noexcept {
  if (closed_) return;
  closed_ = true;
  why_ = why;
  reason_ = std::move(reason);
  for (auto& queue : queues_) {
    for (const Outgoing& out : queue) {
      if (!out.bare && !was_cancelled(out.id)) end(out.id, why);
    }
    queue.clear();
  }
  num_queued_ = 0;
  for (const Unacked& sent : unacked_) {
    if (!sent.ended) end(sent.id, why);
  }
  unacked_.clear();
  slices_.clear();
  socket_.reset(-1);
  wake();
}

bool TcpLane::was_cancelled(std::uint64_t id) const noexcept {
  return std::find(cancelled_.begin(), cancelled_.end(), id) != cancelled_.end();
}

void TcpLane::expire() noexcept {
  const auto now = Clock::now();
  if (now < next_deadline_) return;
  next_deadline_ = kNoDeadline;
  for (auto& queue : queues_) {
    for (auto at = queue.begin(); at != queue.end();) {
      if (at->deadline > now) {
        next_deadline_ = std::min(next_deadline_, at->deadline);
        ++at;
      } else if (at->started()) {
        return shut(End::kTimeout, "the other end does not read");   // half a message is of no use
      } else {
        end(at->id, End::kTimeout);
        facts_.bytes_open -= at->size_bytes();
        at = queue.erase(at);
        --num_queued_;
      }
    }
  }
  for (Unacked& sent : unacked_) {
    if (sent.ended) continue;
    if (sent.deadline <= now) {
      sent.ended = true;
      end(sent.id, End::kTimeout);
    } else {
      next_deadline_ = std::min(next_deadline_, sent.deadline);
    }
  }
}

}  // namespace genie::tcp
