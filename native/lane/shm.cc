#include "lane/shm.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "lane/digest.h"
#include "lane/landing.h"
#include "lane/ring.h"
#include "lane/unix_socket.h"

namespace genie {
namespace {

constexpr std::uint32_t kMagic = 0x4D4C4E47U;            // "GNLM"
constexpr std::size_t kInlineSliceBytes = 16U << 10;     // a copy in and out costs less than a slab's bookkeeping
constexpr std::size_t kMaxQueued = 1024;
constexpr std::size_t kInlineRecordBytes = 64U << 10;    // at most, with everything that is inside a record
constexpr std::size_t kMaxPeerSegments = 4096;
constexpr std::size_t kMaxRecordsPerPoll = 256;          // others want their turn
constexpr std::size_t kMaxPendingPeers = 64;
constexpr auto kHandshakeTime = std::chrono::seconds(5);

enum PacketKind : std::uint16_t { kHello = 1, kSegment = 2 };
enum RecordKind : std::uint32_t { kMessage = 1, kRelease = 2, kDrop = 3, kBye = 4 };
enum MessageFlag : std::uint32_t { kHasDigest = 1, kCopyOut = 2 };

// What goes over the socket. Same machine, same compiler: native layout, but every size is asserted.
struct PacketBody {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t kind;
  std::uint32_t number;       // of a segment
  std::uint32_t reserved;
  std::uint64_t size_bytes;   // of the segment that comes with it
};
static_assert(sizeof(PacketBody) == 24);

struct MessageHead {
  std::uint64_t id;
  std::uint64_t sequence;     // of messages in the ring, from 1; ids follow posting, whose order priorities change
  std::uint64_t epoch;
  std::uint32_t num_slices;
  std::uint32_t flags;
  std::uint32_t digest;
  std::uint32_t reserved;
};
static_assert(sizeof(MessageHead) == 40);

struct SliceRef {
  std::uint64_t size_bytes;
  std::uint64_t offset;       // in the segment, or in the record's inline bytes
  std::uint64_t token;        // to be given back; of no meaning inline
  std::uint32_t segment;      // 0: inline
  std::uint32_t reserved;
};
static_assert(sizeof(SliceRef) == 32);
static_assert(sizeof(MessageHead) + kMaxSlices * sizeof(SliceRef) <= kMaxRecordBytes);

[[nodiscard]] constexpr std::size_t aligned(std::size_t size) noexcept { return (size + 15) & ~std::size_t{15}; }

[[nodiscard]] std::uint32_t digest_of(std::span<const Slice> slices, std::uint64_t epoch) noexcept {
  std::uint32_t crc = crc32c(&epoch, sizeof epoch);
  for (const Slice& slice : slices) crc = crc32c(slice.data, slice.size_bytes, crc);
  return crc;
}

// Tokens of slabs that this side reads no more, from any thread.
struct Releases {
  std::mutex lock;
  std::vector<std::uint64_t> tokens;
  std::atomic<bool> any{false};

  void add(std::uint64_t token) noexcept {
    const std::lock_guard hold(lock);
    try {
      tokens.push_back(token);
      any.store(true, std::memory_order_release);
    } catch (...) {
      // No memory for eight bytes: the peer keeps the slab until the lane closes.
    }
  }
};

// Keeps a peer's pages mapped for as long as somebody reads them, and says when nobody does.
struct Borrowed {
  std::shared_ptr<Segment> segment;
  std::shared_ptr<Releases> releases;
  std::uint64_t token = 0;

  Borrowed(std::shared_ptr<Segment> from, std::shared_ptr<Releases> to, std::uint64_t which) noexcept
      : segment(std::move(from)), releases(std::move(to)), token(which) {}
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() { releases->add(token); }
};

// Numbers of this side's segments that went back to the system, from any thread.
struct Dropped {
  std::mutex lock;
  std::vector<std::uint32_t> numbers;
};

struct Pending {
  std::uint64_t id = 0;
  std::uint64_t epoch = 0;
  bool digest = false;
  Deadline deadline = kNoDeadline;
  std::vector<Slice> slices;

  [[nodiscard]] std::uint64_t size_bytes() const noexcept {
    std::uint64_t total = 0;
    for (const Slice& slice : slices) total += slice.size_bytes;
    return total;
  }
};

struct Untaken {
  std::uint64_t size_bytes = 0;
  std::uint64_t position = 0;   // of the ring, after its record
  std::uint64_t id = 0;
  Deadline deadline = kNoDeadline;
  bool ended = false;
};

struct Slot {
  std::uint32_t generation = 0;
  bool busy = false;
  std::shared_ptr<void> owner;
};

class ShmLane final : public Lane {
 public:
  ShmLane(Fd socket, bool connecting, const ShmOptions& options)
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
    if (!wake_.valid() || !epoll_.valid()) throw LaneError(error_text("making an eventfd"));
    watch(wake_.get(), EPOLLIN | EPOLLET);
    watch(socket_.get(), EPOLLIN | EPOLLRDHUP | EPOLLET);
  }

  ~ShmLane() override { close(); }

  // Set-up. Both ends send one hello with their ring and their eventfd, and read the other's.
  void send_hello() {
    const PacketBody body{kMagic, kLaneVersion, kHello, 0, 0, kRingSegmentBytes};
    const std::array fds{out_segment_->fd(), wake_.get()};
    if (!send_packet(socket_.get(), std::as_bytes(std::span(&body, 1)), fds)) throw LaneError(error_text("greeting"));
    writer_ = std::make_unique<RingWriter>(out_segment_);
  }

  // False while the peer has not said hello.
  [[nodiscard]] bool receive_hello() {
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
    if (body.size_bytes != kRingSegmentBytes || !is_eventfd(fds[1].get())) {
      throw LaneError("the other end's hello brings no ring and eventfd");
    }
    std::string error;
    auto segment = Segment::map(std::move(fds[0]), kRingSegmentBytes, true, error);
    if (segment == nullptr) throw LaneError(error);
    reader_ = std::make_unique<RingReader>(std::move(segment));
    peer_wake_ = std::move(fds[1]);
    return true;
  }

  [[nodiscard]] int socket() const noexcept { return socket_.get(); }

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }

  [[nodiscard]] Buffer allocate(std::size_t size_bytes) noexcept override {
    auto slab = pool_->lend(size_bytes);
    if (slab == nullptr) return {};
    std::byte* data = slab->data;
    return {data, size_bytes, false, std::move(slab)};
  }

  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }

  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override try {
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
    Pending pending{transfer.id, transfer.epoch, transfer.digest, transfer.deadline,
                    {transfer.slices.begin(), transfer.slices.end()}};
    if (transfer.deadline != kNoDeadline) next_deadline_ = std::min(next_deadline_, transfer.deadline);
    if (num_queued_ > 0 || publish(pending) == Published::kLater) {
      queues_[static_cast<std::size_t>(transfer.priority)].push_back(std::move(pending));
      ++num_queued_;
    }
    return Posted::kAccepted;
  } catch (...) {
    return Posted::kBusy;   // no memory for the bookkeeping; nothing was published
  }

  std::size_t poll(Sink& sink) noexcept override {
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

  [[nodiscard]] bool arm(bool for_ends) noexcept override {
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

  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  void wake() noexcept override { ring_bell(wake_.get()); }

  [[nodiscard]] Deadline next_timer() const noexcept override { return next_deadline_; }
  [[nodiscard]] bool in_progress() const noexcept override { return !closed_ && num_queued_ > 0; }

  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override {
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

  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t id) const noexcept override {
    const auto at = std::find_if(untaken_.begin(), untaken_.end(), [id](const Untaken& sent) { return sent.id == id; });
    return at == untaken_.end() ? 0 : at->size_bytes;
  }

  [[nodiscard]] bool quiet() const noexcept override {
    return num_queued_ == 0 && ends_.empty() &&
           std::none_of(untaken_.begin(), untaken_.end(), [](const Untaken& sent) { return !sent.ended; });
  }

  void close() noexcept override {
    if (closed_) return;
    // A forked child has the parent's rings: it must not speak for it.
    if (::getpid() == pid_ && writer_ != nullptr && writer_->reserve(0, kBye) != nullptr) {
      writer_->commit();
      ring_peer();
    }
    shut(End::kCancelled, "closed here");
  }

  [[nodiscard]] Statistics statistics() const noexcept override { return facts_; }

 private:
  enum class Published : std::uint8_t { kDone, kLater, kEnded };

  static bool is_eventfd(int fd) noexcept {
    std::array<char, 64> link{};
    std::array<char, 64> path{};
    std::snprintf(path.data(), path.size(), "/proc/self/fd/%d", fd);
    return fd >= 0 && ::readlink(path.data(), link.data(), link.size() - 1) > 0 &&
           std::strcmp(link.data(), "anon_inode:[eventfd]") == 0;
  }

  static void ring_bell(int eventfd) noexcept {
    const std::uint64_t one = 1;
    // A full counter means that it rings already.
    [[maybe_unused]] const ssize_t written = ::write(eventfd, &one, sizeof one);
  }

  void watch(int fd, std::uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  // The bell is the peer's: it may have filled its counter and made it one that waits. Then it needs no ringing.
  void ring_peer() noexcept {
    pollfd bell{peer_wake_.get(), POLLOUT, 0};
    if (::poll(&bell, 1, 0) == 1 && (bell.revents & POLLOUT) != 0) ring_bell(peer_wake_.get());
  }

  void wake_peer() noexcept {
    if (!writer_->must_wake()) return;
    ++facts_.wakeups;
    ring_peer();
  }

  void end(std::uint64_t id, End how) noexcept {
    ++(how == End::kOk ? facts_.ended_ok : facts_.ended_badly);
    try {
      ends_.emplace_back(id, how);
    } catch (...) {
      shut(End::kLocal, "out of memory");
    }
  }

  void report_ends() noexcept {
    for (const auto& [id, how] : ends_) {
      sink_->on_ended(id, how);
      ++reported_;
    }
    ends_.clear();
  }

  void shut(End why, std::string reason) noexcept {
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
    peer_wake_.reset(-1);
    ring_bell(wake_.get());   // whoever sleeps looks again
  }

  void move() noexcept {
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
  [[nodiscard]] bool look_at_descriptors() noexcept {
    std::array<epoll_event, 4> events{};
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
    for (int i = 0; i < count; ++i) {
      if (events[static_cast<std::size_t>(i)].data.fd == socket_.get() && !read_socket()) return true;
    }
    return false;
  }

  // False at the end of the socket.
  [[nodiscard]] bool read_socket() noexcept try {
    for (;;) {
      PacketBody body{};
      std::size_t size = 0;
      std::array<Fd, 2> fds;
      switch (receive_packet(socket_.get(), std::as_writable_bytes(std::span(&body, 1)), size, fds)) {
        case Packet::kNothing: return true;
        case Packet::kEnd: return false;
        case Packet::kGot: break;
      }
      if (size != sizeof body || body.magic != kMagic || body.kind != kSegment || body.number == 0 ||
          peer_segments_.contains(body.number) || peer_segments_.size() >= kMaxPeerSegments) {
        shut(End::kCorrupt, "a packet that is no segment");
        return true;
      }
      std::string error;
      // The connecting end may write to what it is given; the other never.
      auto segment = Segment::map(std::move(fds[0]), body.size_bytes, connecting_, error);
      if (segment == nullptr) {
        shut(End::kCorrupt, error);
        return true;
      }
      peer_segments_.emplace(body.number, std::move(segment));
    }
  } catch (...) {
    shut(End::kLocal, "out of memory");
    return true;
  }

  void drain() noexcept try {
    for (std::size_t i = 0; i < kMaxRecordsPerPoll; ++i) {
      std::uint32_t kind = 0;
      std::span<const std::byte> body;
      switch (reader_->next(kind, body)) {
        case RingReader::Got::kNothing: return;
        case RingReader::Got::kBroken: shut(End::kCorrupt, "a ring position or record size that cannot be"); return;
        case RingReader::Got::kRecord: break;
      }
      bool good = false;
      switch (kind) {
        case kMessage: good = take_message(body); break;
        case kRelease: good = take_releases(body); break;
        case kDrop: good = take_drop(body); break;
        case kBye: shut(End::kPeerLost, "closed by the other end"); return;
        default: break;
      }
      if (closed_) return;
      if (!good) {
        shut(End::kCorrupt, "a record of kind " + std::to_string(kind) + " that cannot be");
        return;
      }
      reader_->done();
    }
  } catch (...) {
    shut(End::kLocal, "out of memory");
  }

  [[nodiscard]] bool take_message(std::span<const std::byte> body) {
    MessageHead head{};
    if (body.size() < sizeof head) return false;
    std::memcpy(&head, body.data(), sizeof head);
    if (head.sequence != last_arrived_ + 1 || head.num_slices > kMaxSlices) return false;   // a replay, or too many
    const std::size_t inline_at = sizeof head + head.num_slices * sizeof(SliceRef);
    if (inline_at > body.size()) return false;
    const std::span<const std::byte> inlined = body.subspan(inline_at);
    std::vector<Buffer> buffers;
    buffers.reserve(head.num_slices);
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < head.num_slices; ++i) {
      SliceRef ref{};
      std::memcpy(&ref, body.data() + sizeof head + i * sizeof ref, sizeof ref);
      if (ref.size_bytes > capabilities_.max_transfer_bytes - total) return false;
      Buffer buffer = ref.segment == 0 ? from_record(ref, inlined) : from_segment(ref, (head.flags & kCopyOut) != 0);
      if (buffer.data == nullptr) return false;
      total += ref.size_bytes;
      buffers.push_back(std::move(buffer));
    }
    if ((head.flags & kHasDigest) != 0) {
      std::uint32_t crc = crc32c(&head.epoch, sizeof head.epoch);
      for (const Buffer& buffer : buffers) crc = crc32c(buffer.data, buffer.size_bytes, crc);
      if (crc != head.digest) return false;
    }
    last_arrived_ = head.sequence;
    ++facts_.arrived;
    ++reported_;
    facts_.bytes_arrived += total;
    sink_->on_arrived(head.id, head.epoch, std::move(buffers));
    return true;
  }

  [[nodiscard]] Buffer from_record(const SliceRef& ref, std::span<const std::byte> inlined) {
    if (ref.offset > inlined.size() || ref.size_bytes > inlined.size() - ref.offset) return {};
    Buffer buffer = land(ref.size_bytes);
    if (buffer.data == nullptr) return {};
    if (ref.size_bytes > 0) std::memcpy(buffer.data, inlined.data() + ref.offset, ref.size_bytes);
    facts_.bytes_copied_in += ref.size_bytes;
    return buffer;
  }

  [[nodiscard]] Buffer from_segment(const SliceRef& ref, bool copy_out) {
    auto found = peer_segments_.find(ref.segment);
    if (found == peer_segments_.end()) {
      // Its packet was sent before this record; it waits in the socket.
      if (!read_socket() || closed_) return {};
      found = peer_segments_.find(ref.segment);
      if (found == peer_segments_.end()) return {};
    }
    const Segment& segment = *found->second;
    if (ref.offset > segment.size_bytes() || ref.size_bytes > segment.size_bytes() - ref.offset ||
        ref.size_bytes == 0) {
      return {};
    }
    std::byte* data = segment.data() + ref.offset;
    auto borrowed = std::make_shared<Borrowed>(found->second, releases_, ref.token);
    if (!copy_out) return {data, ref.size_bytes, !connecting_, std::move(borrowed), true};
    Buffer buffer = land(ref.size_bytes);
    if (buffer.data == nullptr) return {};
    std::memcpy(buffer.data, data, ref.size_bytes);
    facts_.bytes_copied_in += ref.size_bytes;
    return buffer;
  }

  [[nodiscard]] bool take_releases(std::span<const std::byte> body) {
    if (body.size() % sizeof(std::uint64_t) != 0) return false;
    for (std::size_t at = 0; at < body.size(); at += sizeof(std::uint64_t)) {
      std::uint64_t token = 0;
      std::memcpy(&token, body.data() + at, sizeof token);
      const auto index = static_cast<std::size_t>(token & 0xFFFFFFFFU);
      if (index >= slots_.size() || !slots_[index].busy || slots_[index].generation != token >> 32) return false;
      slots_[index].busy = false;
      slots_[index].owner.reset();
      free_slots_.push_back(static_cast<std::uint32_t>(index));
    }
    return true;
  }

  [[nodiscard]] bool take_drop(std::span<const std::byte> body) {
    std::uint32_t number = 0;
    if (body.size() != sizeof number) return false;
    std::memcpy(&number, body.data(), sizeof number);
    if (!peer_segments_.contains(number) && (!read_socket() || closed_)) return false;
    return peer_segments_.erase(number) == 1;
  }

  void send_releases() noexcept {
    std::vector<std::uint64_t> tokens;
    {
      const std::lock_guard hold(releases_->lock);
      tokens.swap(releases_->tokens);
      releases_->any.store(false, std::memory_order_relaxed);
    }
    constexpr std::size_t kBatch = 1024;
    for (std::size_t at = 0; at < tokens.size(); at += kBatch) {
      const std::size_t count = std::min(kBatch, tokens.size() - at);
      std::byte* body = writer_->reserve(count * sizeof(std::uint64_t), kRelease);
      if (body == nullptr) {
        if (writer_->broken()) return shut(End::kCorrupt, "a ring position that cannot be");
        for (; at < tokens.size(); ++at) releases_->add(tokens[at]);   // no room now: later
        return;
      }
      std::memcpy(body, tokens.data() + at, count * sizeof(std::uint64_t));
      writer_->commit();
    }
    // The peer wants its slabs back only if it waits for memory: then it has armed `starved`, or its queue is polled.
    if (peer_is_starved()) wake_peer();
  }

  [[nodiscard]] bool peer_is_starved() noexcept {
    return reader_->header().starved.load(std::memory_order_relaxed) != 0;
  }

  void send_drops() noexcept {
    std::vector<std::uint32_t> numbers;
    {
      const std::lock_guard hold(dropped_->lock);
      if (dropped_->numbers.empty()) return;
      numbers.swap(dropped_->numbers);
    }
    for (const std::uint32_t number : numbers) {
      if (announced_.erase(number) == 0) continue;
      std::byte* body = writer_->reserve(sizeof number, kDrop);
      if (body == nullptr) {
        const std::lock_guard hold(dropped_->lock);
        announced_.insert(number);
        dropped_->numbers.push_back(number);
        continue;
      }
      std::memcpy(body, &number, sizeof number);
      writer_->commit();
    }
  }

  void reap() noexcept {
    if (untaken_.empty()) return;
    if (!writer_->refresh()) return shut(End::kCorrupt, "a ring position that cannot be");
    while (!untaken_.empty() && untaken_.front().position <= writer_->taken()) {
      if (!untaken_.front().ended) end(untaken_.front().id, End::kOk);
      facts_.bytes_open -= untaken_.front().size_bytes;
      untaken_.pop_front();
    }
  }

  void publish_queued() noexcept {
    for (auto& queue : queues_) {
      while (!queue.empty()) {
        if (closed_ || publish(queue.front()) == Published::kLater) return;
        queue.pop_front();
        --num_queued_;
      }
    }
  }

  void expire() noexcept {
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

  // Where the bytes of one large slice are, for the peer.
  struct Placed {
    std::shared_ptr<void> owner;
    std::uint32_t segment = 0;
    std::uint64_t offset = 0;
  };

  [[nodiscard]] bool announce(const PoolSegment& segment) noexcept {
    if (announced_.contains(segment.number)) return true;
    const PacketBody body{kMagic, kLaneVersion, kSegment, segment.number, 0, segment.memory->size_bytes()};
    const std::array fds{segment.memory->fd()};
    if (!send_packet(socket_.get(), std::as_bytes(std::span(&body, 1)), fds)) return false;
    announced_.insert(segment.number);
    return true;
  }

  [[nodiscard]] bool place(const Slice& slice, Placed& placed) noexcept {
    if (const auto segment = pool_->locate(slice.data); segment != nullptr && slice.owner != nullptr) {
      if (!announce(*segment)) return false;
      placed = {slice.owner, segment->number, static_cast<std::uint64_t>(slice.data - segment->memory->data())};
      return true;
    }
    auto slab = pool_->lend(slice.size_bytes);
    if (slab == nullptr || !announce(*slab->segment)) return false;
    std::memcpy(slab->data, slice.data, slice.size_bytes);
    facts_.bytes_copied_out += slice.size_bytes;
    const std::uint64_t offset = slab->offset();
    const std::uint32_t number = slab->segment->number;
    placed = {std::move(slab), number, offset};
    return true;
  }

  [[nodiscard]] std::uint64_t take_slot(std::shared_ptr<void> owner) {
    if (free_slots_.empty()) {
      slots_.emplace_back();
      free_slots_.push_back(static_cast<std::uint32_t>(slots_.size() - 1));
    }
    const std::uint32_t index = free_slots_.back();
    free_slots_.pop_back();
    Slot& slot = slots_[index];
    ++slot.generation;
    slot.busy = true;
    slot.owner = std::move(owner);
    return (std::uint64_t{slot.generation} << 32) | index;
  }

  [[nodiscard]] Published publish(const Pending& pending) noexcept try {
    const std::size_t count = pending.slices.size();
    const std::size_t fixed = sizeof(MessageHead) + count * sizeof(SliceRef);
    std::size_t inline_bytes = 0;
    for (const Slice& slice : pending.slices) {
      if (goes_inline(slice, fixed + inline_bytes)) {
        inline_bytes += aligned(slice.size_bytes);
      }
    }
    // Room in the ring first: slabs are not taken for what cannot be said.
    std::byte* body = writer_->reserve(fixed + inline_bytes, kMessage);
    if (body == nullptr) {
      if (!writer_->broken()) return Published::kLater;
      shut(End::kCorrupt, "a ring position that cannot be");
      return Published::kLater;
    }
    std::vector<Placed> placed(count);
    std::size_t planned = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const Slice& slice = pending.slices[i];
      if (goes_inline(slice, fixed + planned)) {
        planned += aligned(slice.size_bytes);
        continue;
      }
      if (place(slice, placed[i])) continue;
      if (free_slots_.size() < slots_.size()) return Published::kLater;   // the peer has slabs to give back
      end(pending.id, End::kLocal);
      facts_.bytes_open -= pending.size_bytes();
      return Published::kEnded;
    }
    MessageHead head{pending.id, ++last_sequence_, pending.epoch, static_cast<std::uint32_t>(count), 0, 0, 0};
    if (pool_->used_bytes() > pool_->options().limit_bytes / 2) head.flags |= kCopyOut;
    if (pending.digest) {
      head.flags |= kHasDigest;
      head.digest = digest_of(pending.slices, pending.epoch);
    }
    std::memcpy(body, &head, sizeof head);
    std::size_t inline_at = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const Slice& slice = pending.slices[i];
      SliceRef ref{slice.size_bytes, inline_at, 0, 0, 0};
      if (placed[i].owner != nullptr) {
        ref.offset = placed[i].offset;
        ref.segment = placed[i].segment;
        ref.token = take_slot(std::move(placed[i].owner));
        facts_.bytes_shared += slice.size_bytes;
      } else {
        if (slice.size_bytes > 0) std::memcpy(body + fixed + inline_at, slice.data, slice.size_bytes);
        facts_.bytes_copied_out += slice.size_bytes;
        inline_at += aligned(slice.size_bytes);
      }
      std::memcpy(body + sizeof head + i * sizeof ref, &ref, sizeof ref);
      facts_.bytes_sent += slice.size_bytes;
    }
    untaken_.push_back({pending.size_bytes(), writer_->commit(), pending.id, pending.deadline, false});
    wake_peer();
    return Published::kDone;
  } catch (...) {
    end(pending.id, End::kLocal);
    return Published::kEnded;
  }

  // An empty slice always does: there is no slab to name.
  [[nodiscard]] static bool goes_inline(const Slice& slice, std::size_t record_bytes) noexcept {
    return slice.size_bytes == 0 ||
           (slice.size_bytes <= kInlineSliceBytes && record_bytes + slice.size_bytes <= kInlineRecordBytes - 64);
  }

  Fd socket_;
  Fd wake_;
  Fd peer_wake_;
  Fd epoll_;
  const bool connecting_;
  const pid_t pid_ = ::getpid();
  Capabilities capabilities_;
  std::shared_ptr<Segment> out_segment_;
  std::unique_ptr<RingWriter> writer_;
  std::unique_ptr<RingReader> reader_;
  std::shared_ptr<Dropped> dropped_;
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<Releases> releases_ = std::make_shared<Releases>();
  std::map<std::uint32_t, std::shared_ptr<Segment>> peer_segments_;
  std::set<std::uint32_t> announced_;
  std::array<std::deque<Pending>, kNumPriorities> queues_;
  std::size_t num_queued_ = 0;
  std::deque<Untaken> untaken_;
  std::deque<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  std::vector<std::pair<std::uint64_t, End>> ends_;
  Deadline next_deadline_ = kNoDeadline;
  std::uint64_t last_id_ = 0;
  std::uint64_t last_sequence_ = 0;
  std::uint64_t last_arrived_ = 0;
  bool armed_ = true;           // the first poll looks at the descriptors
  bool closed_ = false;
  bool said_closed_ = false;
  End why_ = End::kPending;
  std::string reason_;
  Sink* sink_ = nullptr;
  std::size_t reported_ = 0;
  Statistics facts_;
};

// "@name" is an abstract one: it has no file, and nothing of it is left when its process ends.
struct Address {
  sockaddr_un name{};
  socklen_t size = 0;

  [[nodiscard]] const sockaddr* generic() const noexcept { return reinterpret_cast<const sockaddr*>(&name); }
};

Address address_of(const std::string& path) {
  Address address;
  address.name.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.name.sun_path) throw LaneError("the path of a Unix socket is too long: " + path);
  std::memcpy(address.name.sun_path, path.c_str(), path.size() + 1);
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  if (path.starts_with('@')) {
    address.name.sun_path[0] = '\0';
  } else {
    ++address.size;   // with its end
  }
  return address;
}

class ShmListener final : public Listener {
 public:
  ShmListener(std::string path, const ShmOptions& options) : path_(std::move(path)), options_(options) {
    socket_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const Address address = address_of(path_);
    if (!socket_.valid()) throw LaneError(error_text("making a Unix socket"));
    if (!bind_to(address)) throw LaneError(error_text("binding " + path_));
    // Before listen(): until then nobody can connect.
    if ((!is_abstract() && ::chmod(path_.c_str(), S_IRUSR | S_IWUSR) != 0) || ::listen(socket_.get(), 64) != 0) {
      throw LaneError(error_text("listening at " + path_));
    }
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    watch(socket_.get());
  }

  ~ShmListener() override {
    if (!is_abstract() && ::getpid() == pid_) ::unlink(path_.c_str());   // a forked child leaves it to its parent
  }

  [[nodiscard]] std::string address() const override { return path_; }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    const auto now = Clock::now();
    greeting_.remove_if([now](const Greeting& peer) { return now > peer.until; });
    take_new();
    for (auto at = greeting_.begin(); at != greeting_.end(); ++at) {
      std::unique_ptr<ShmLane>& lane = at->lane;
      try {
        if (lane->receive_hello()) {
          lane->send_hello();
          ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, lane->socket(), nullptr);
          std::unique_ptr<Lane> done = std::move(lane);
          greeting_.erase(at);
          return done;
        }
      } catch (const LaneError&) {
        greeting_.erase(at);
        throw;
      }
    }
    return nullptr;
  }

 private:
  struct Greeting {
    std::unique_ptr<ShmLane> lane;
    Deadline until;
  };

  [[nodiscard]] bool is_abstract() const noexcept { return path_.starts_with('@'); }

  // The file that a killed worker has left is removed, if nobody listens there.
  [[nodiscard]] bool bind_to(const Address& address) {
    if (::bind(socket_.get(), address.generic(), address.size) == 0) return true;
    if (errno != EADDRINUSE || is_abstract()) return false;
    const Fd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (::connect(probe.get(), address.generic(), address.size) == 0 || errno != ECONNREFUSED) {
      errno = EADDRINUSE;
      return false;
    }
    ::unlink(path_.c_str());
    return ::bind(socket_.get(), address.generic(), address.size) == 0;
  }

  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  void take_new() {
    for (;;) {
      Fd fd = acceptor_.accept(socket_.get());
      if (!fd.valid()) return;
      if (greeting_.size() >= kMaxPendingPeers) continue;
      check_peer(fd.get());
      auto lane = std::make_unique<ShmLane>(std::move(fd), false, options_);
      watch(lane->socket());
      greeting_.push_back({std::move(lane), Clock::now() + kHandshakeTime});
    }
  }

  const std::string path_;
  const ShmOptions options_;
  const pid_t pid_ = ::getpid();
  Acceptor acceptor_;
  Fd socket_;
  Fd epoll_;
  std::list<Greeting> greeting_;
};

}  // namespace

Probe probe_shm() {
  std::string error;
  const auto segment = Segment::make(kRingSegmentBytes, Segment::Sharing::kSharedOneWay, false, error);
  if (segment == nullptr) return {false, "no sealed shared memory: " + error};
  const int seals = ::fcntl(segment->fd(), F_GET_SEALS);
  if ((seals & F_SEAL_SHRINK) == 0) return {false, "this kernel does not seal shared memory"};
  return {true, "memfd with seals, between processes of one user on this host"};
}

std::unique_ptr<Listener> listen_shm(const std::string& path, const ShmOptions& options) {
  return std::make_unique<ShmListener>(path, options);
}

std::unique_ptr<Lane> connect_shm(const std::string& path, std::chrono::milliseconds timeout,
                                  const ShmOptions& options) {
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const Address address = address_of(path);
  if (!fd.valid()) throw LaneError(error_text("making a Unix socket"));
  if (::connect(fd.get(), address.generic(), address.size) != 0) {
    throw LaneError(error_text("connecting to " + path));
  }
  check_peer(fd.get());
  auto lane = std::make_unique<ShmLane>(std::move(fd), true, options);
  lane->send_hello();
  const Deadline until = Clock::now() + timeout;
  while (!lane->receive_hello()) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    if (left <= 0) throw LaneError("the other end at " + path + " did not say hello in time");
    pollfd waiting{lane->socket(), POLLIN, 0};
    ::poll(&waiting, 1, static_cast<int>(std::min<long>(left, 1000)));
  }
  return lane;
}

}  // namespace genie
