#include "lane/shm_lane.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace genie::shm {
namespace {

constexpr std::size_t kMaxQueued = 1024;

}  // namespace

ShmLane::ShmLane(Fd socket, bool connecting, const ShmOptions& options)
    : socket_(std::move(socket)), connecting_(connecting), dropped_(std::make_shared<Dropped>()) {
  capabilities_.name = "shm";
  capabilities_.zero_copy_receive = true;
  capabilities_.max_transfer_bytes = options.max_transfer_bytes;
  PoolOptions pool = options.pool;
  pool.sharing = connecting ? Segment::Sharing::kSharedOneWay : Segment::Sharing::kShared;
  // Who may write to a memfd may punch holes into it. Normal pages come back as zeros, hugepages perhaps not at all.
  pool.huge = pool.huge && connecting;
  pool_ = Pool::make(pool, [dropped = dropped_](std::uint32_t number) {
    const std::lock_guard hold(dropped->lock);
    dropped->numbers.push_back(number);
  });
  std::string error;
  out_segment_ = Segment::make(kRingSegmentBytes, Segment::Sharing::kShared, false, error);
  if (out_segment_ == nullptr) throw LaneError("no shared memory: " + error);
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  std::array<int, 2> bell{};
  if (!wake_.valid() || !epoll_.valid() ||
      ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, bell.data()) != 0) {
    throw LaneError(error_text("making what wakes a lane"));
  }
  bell_.reset(bell[0]);
  bell_rope_.reset(bell[1]);
  watch(wake_.get(), EPOLLIN | EPOLLET);
  watch(bell_.get(), EPOLLIN | EPOLLET);
  watch(socket_.get(), EPOLLIN | EPOLLRDHUP | EPOLLET);
}

void ShmLane::send_hello() {
  const PacketBody body{kMagic, kLaneVersion, kHello, 0, 0, kRingSegmentBytes};
  const std::array fds{out_segment_->fd(), bell_rope_.get()};
  if (!send_packet(socket_.get(), std::as_bytes(std::span(&body, 1)), fds)) throw LaneError(error_text("greeting"));
  bell_rope_.reset(-1);
  writer_ = std::make_unique<RingWriter>(out_segment_);
}

bool ShmLane::receive_hello() {
  PacketBody body{};
  std::size_t size = 0;
  std::array<Fd, 2> fds;
  switch (receive_packet(socket_.get(), std::as_writable_bytes(std::span(&body, 1)), size, fds)) {
    case Packet::kNothing: return false;
    case Packet::kEnd: throw LaneError("the other end hung up before it said hello");
    case Packet::kGot: break;
  }
  if (size != sizeof body || body.magic != kMagic || body.kind != kHello) throw LaneError("not a genie shm lane");
  if (body.version != kLaneVersion) {
    throw LaneError("the other end speaks lane version " + std::to_string(body.version) + ", this one " +
                    std::to_string(kLaneVersion));
  }
  if (body.size_bytes != kRingSegmentBytes || !is_socket(fds[1].get())) {
    throw LaneError("the other end's hello brings no ring and bell");
  }
  std::string error;
  auto segment = Segment::map(std::move(fds[0]), kRingSegmentBytes, true, error);
  if (segment == nullptr) throw LaneError(error);
  reader_ = std::make_unique<RingReader>(std::move(segment));
  peer_bell_ = std::move(fds[1]);
  return true;
}

Buffer ShmLane::allocate(std::size_t size_bytes) noexcept {
  // Who borrows may keep it for long: half of the pool stays for what has to be sent now.
  if (pool_->used_bytes() + size_bytes > pool_->options().limit_bytes / 2) return {};
  auto slab = pool_->lend(size_bytes);
  if (slab == nullptr) return {};
  std::byte* data = slab->data;
  return {data, size_bytes, false, std::move(slab)};
}

Posted ShmLane::post(const Transfer& transfer) noexcept try {
  if (closed_) return Posted::kClosed;
  if (transfer.id <= last_id_ || transfer.slices.size() > kMaxSlices) return Posted::kRefused;
  std::size_t total = 0;
  for (const Slice& slice : transfer.slices) {
    if (slice.size_bytes > kMaxSlabBytes) return Posted::kRefused;
    total += slice.size_bytes;
  }
  if (total > capabilities_.max_transfer_bytes) return Posted::kRefused;
  if (num_queued_ >= kMaxQueued) return Posted::kBusy;
  // Before the message, so that who gets an answer has his slab back with it, and fills the same warm pages again.
  if (releases_->any.load(std::memory_order_acquire)) send_releases();
  if (closed_) return Posted::kClosed;
  last_id_ = transfer.id;
  ++facts_.posted;
  facts_.bytes_open += total;
  const auto priority = static_cast<std::size_t>(transfer.priority);
  Pending pending{transfer.id, transfer.epoch, transfer.digest, transfer.priority == Priority::kBulk,
                  transfer.deadline, {transfer.slices.begin(), transfer.slices.end()}};
  if (transfer.deadline != kNoDeadline) next_deadline_ = std::min(next_deadline_, transfer.deadline);
  // What waits and is less urgent is overtaken.
  const bool is_next = std::all_of(queues_.begin(), queues_.begin() + static_cast<std::ptrdiff_t>(priority) + 1,
                                   [](const auto& queue) { return queue.empty(); });
  if (!is_next || publish(pending) == Published::kLater) {
    queues_[priority].push_back(std::move(pending));
    ++num_queued_;
  }
  return Posted::kAccepted;
} catch (...) {
  return Posted::kBusy;   // no memory for the bookkeeping; nothing was published
}

std::size_t ShmLane::poll(Sink& sink) noexcept {
  sink_ = &sink;
  reported_ = 0;
  if (!closed_) move();
  report_ends();
  if (closed_ && !said_closed_) {
    said_closed_ = true;
    ++reported_;
    sink.on_closed(why_, reason_);
  }
  sink_ = nullptr;
  return reported_;
}

bool ShmLane::arm(bool for_ends) noexcept {
  if (closed_) return said_closed_;
  if (!ends_.empty()) return false;
  armed_ = true;
  if (num_queued_ > 0 || (for_ends && !untaken_.empty())) {
    const std::uint64_t before = writer_->taken();
    writer_->header().starved.store(1, std::memory_order_seq_cst);
    if (writer_->refresh() && writer_->taken() != before) return false;
  }
  return reader_->arm();
}

bool ShmLane::cancel(std::uint64_t id) noexcept {
  for (auto& queue : queues_) {
    const auto at = std::find_if(queue.begin(), queue.end(), [id](const Pending& p) { return p.id == id; });
    if (at == queue.end()) continue;
    facts_.bytes_open -= at->size_bytes();
    queue.erase(at);
    --num_queued_;
    end(id, End::kCancelled);
    return true;
  }
  for (Untaken& sent : untaken_) {
    if (sent.id != id || sent.ended) continue;
    sent.ended = true;
    end(id, End::kCancelled);
    return true;
  }
  return false;
}

std::uint64_t ShmLane::bytes_moved(std::uint64_t id) const noexcept {
  const auto at = std::find_if(untaken_.begin(), untaken_.end(), [id](const Untaken& sent) { return sent.id == id; });
  return at == untaken_.end() ? 0 : at->size_bytes;
}

bool ShmLane::quiet() const noexcept {
  return num_queued_ == 0 && ends_.empty() &&
         std::none_of(untaken_.begin(), untaken_.end(), [](const Untaken& sent) { return !sent.ended; });
}

void ShmLane::close() noexcept {
  if (closed_) return;
  // A forked child has the parent's rings: it must not speak for it.
  if (::getpid() == pid_ && writer_ != nullptr && writer_->reserve(0, kBye) != nullptr) {
    writer_->commit();
    ring_peer();
  }
  shut(End::kCancelled, "closed here");
}

bool ShmLane::is_socket(int fd) noexcept {
  struct stat facts{};
  return fd >= 0 && ::fstat(fd, &facts) == 0 && S_ISSOCK(facts.st_mode);
}

void ShmLane::wake() noexcept {
  const std::uint64_t one = 1;
  // A full counter means that it rings already.
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof one);
}

void ShmLane::watch(int fd, std::uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
}

// The bell is the peer's, who may have filled it and made it one that waits: so it is a socket, where each call says that
// it does not. An eventfd has only the flag that both ends share.
void ShmLane::ring_peer() noexcept {
  const std::byte ring{};
  [[maybe_unused]] const ssize_t sent = ::send(peer_bell_.get(), &ring, sizeof ring, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void ShmLane::wake_peer() noexcept {
  if (!writer_->must_wake()) return;
  ++facts_.wakeups;
  ring_peer();
}

void ShmLane::end(std::uint64_t id, End how) noexcept {
  ++(how == End::kOk ? facts_.ended_ok : facts_.ended_badly);
  try {
    ends_.emplace_back(id, how);
  } catch (...) {
    shut(End::kLocal, "out of memory");
  }
}

void ShmLane::report_ends() noexcept {
  for (const auto& [id, how] : ends_) {
    sink_->on_ended(id, how);
    ++reported_;
  }
  ends_.clear();
}

void ShmLane::shut(End why, std::string reason) noexcept {
  if (closed_) return;
  closed_ = true;
  why_ = why;
  reason_ = std::move(reason);
  for (auto& queue : queues_) {
    for (const Pending& pending : queue) end(pending.id, why);
    queue.clear();
  }
  num_queued_ = 0;
  for (const Untaken& sent : untaken_) {
    if (!sent.ended) end(sent.id, why);
  }
  untaken_.clear();
  slots_.clear();
  peer_segments_.clear();
  socket_.reset(-1);
  peer_bell_.reset(-1);
  wake();   // whoever sleeps looks again
}

void ShmLane::move() noexcept {
  bool hung_up = false;
  if (armed_) {
    armed_ = false;
    hung_up = look_at_descriptors();
  }
  drain();
  if (hung_up && !closed_) {
    shut(End::kPeerLost, "the other end is gone");
    return;
  }
  if (closed_) return;
  if (releases_->any.load(std::memory_order_acquire)) send_releases();
  send_drops();
  reap();
  if (num_queued_ > 0) publish_queued();
  if (next_deadline_ != kNoDeadline) expire();
  if (!closed_ && reader_->writer_waits()) {
    ++facts_.wakeups;
    ring_peer();
  }
}

// Whether the peer has hung up. Segments that wait in the socket are taken.
bool ShmLane::look_at_descriptors() noexcept {
  std::array<epoll_event, 4> events{};
  const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const int fd = events[static_cast<std::size_t>(i)].data.fd;
    if (fd == bell_.get()) {
      std::array<std::byte, 64> rings;   // one, of a peer that keeps to the rules
      [[maybe_unused]] const ssize_t got = ::recv(fd, rings.data(), rings.size(), MSG_DONTWAIT);
    }
    if (fd == socket_.get() && !read_socket()) return true;
  }
  return false;
}

void ShmLane::expire() noexcept {
  const auto now = Clock::now();
  if (now < next_deadline_) return;
  next_deadline_ = kNoDeadline;
  for (auto& queue : queues_) {
    for (auto at = queue.begin(); at != queue.end();) {
      if (at->deadline <= now) {
        end(at->id, End::kTimeout);
        facts_.bytes_open -= at->size_bytes();
        at = queue.erase(at);
        --num_queued_;
      } else {
        next_deadline_ = std::min(next_deadline_, at->deadline);
        ++at;
      }
    }
  }
  for (Untaken& sent : untaken_) {
    if (sent.ended) continue;
    if (sent.deadline <= now) {
      sent.ended = true;
      end(sent.id, End::kTimeout);
    } else {
      next_deadline_ = std::min(next_deadline_, sent.deadline);
    }
  }
}

}  // namespace genie::shm
