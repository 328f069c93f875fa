#include "lane/tcp.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <list>
#include <utility>

#include "lane/landing.h"
#include "lane/tcp_frame.h"
#include "lane/unix_socket.h"

namespace genie {
namespace {

constexpr std::size_t kMaxQueued = 1024;
constexpr std::size_t kStagingBytes = std::size_t{64} << 10;
constexpr std::size_t kMaxParts = 64;                           // of one system call
constexpr std::size_t kDigestStep = std::size_t{256} << 10;     // summed while it is in the cache
constexpr std::size_t kPollBudget = std::size_t{8} << 20;       // bytes read in one poll: others want their turn
constexpr std::size_t kMaxPendingPeers = 64;
constexpr auto kHandshakeTime = std::chrono::seconds(5);

struct Outgoing {
  std::uint64_t id = 0;
  std::uint64_t sequence = 0;         // given when its first byte is about to leave
  std::uint64_t epoch = 0;
  bool digest = false;
  bool bare = false;                  // an ack or a bye: a header alone
  tcp::Kind kind = tcp::Kind::kMessage;
  Deadline deadline = kNoDeadline;
  std::vector<Slice> slices;
  std::vector<std::byte> lead;        // header and sizes
  std::array<std::byte, 4> trailer{};
  std::size_t part = 0;               // 0: lead; 1..n: slices; n+1: trailer
  std::size_t sent = 0;               // of that part
  std::size_t summed = 0;             // of that part, into crc
  std::uint32_t crc = 0;

  [[nodiscard]] std::size_t num_parts() const noexcept { return 1 + slices.size() + (digest ? 1 : 0); }
  [[nodiscard]] std::span<const std::byte> bytes_of(std::size_t which) const noexcept {
    if (which == 0) return lead;
    if (which <= slices.size()) return {slices[which - 1].data, slices[which - 1].size_bytes};
    return trailer;
  }
  [[nodiscard]] bool started() const noexcept { return part > 0 || sent > 0; }
  [[nodiscard]] std::uint64_t moved_bytes() const noexcept {
    std::uint64_t total = part >= 1 && part <= slices.size() ? sent : 0;
    for (std::size_t i = 1; i < part && i <= slices.size(); ++i) total += slices[i - 1].size_bytes;
    return total;
  }
  [[nodiscard]] std::uint64_t size_bytes() const noexcept {
    std::uint64_t total = 0;
    for (const Slice& slice : slices) total += slice.size_bytes;
    return total;
  }
};

struct Unacked {
  std::uint64_t id = 0;
  std::uint64_t sequence = 0;
  Deadline deadline = kNoDeadline;
  bool ended = false;
  std::uint64_t size_bytes = 0;
  std::vector<Slice> slices;          // kept as they are until the peer has them
};

class TcpLane final : public Lane {
 public:
  TcpLane(Fd socket, const TcpOptions& options) : socket_(std::move(socket)), staging_(kStagingBytes) {
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
  ~TcpLane() override { close(); }

  void send_hello() {
    std::array<std::byte, tcp::kHelloBytes> hello{};
    tcp::write_hello(capabilities_.max_transfer_bytes, hello.data());
    if (::send(socket_.get(), hello.data(), hello.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(hello.size())) {
      throw LaneError(error_text("greeting"));
    }
  }

  // False while the peer has not said hello.
  [[nodiscard]] bool receive_hello() {
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

  [[nodiscard]] int socket() const noexcept { return socket_.get(); }

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  [[nodiscard]] Buffer allocate(std::size_t size_bytes) noexcept override { return land(size_bytes); }
  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }

  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override try {
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

  std::size_t poll(Sink& sink) noexcept override {
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

  [[nodiscard]] bool arm(bool) noexcept override {
    if (closed_) return said_closed_;
    if (last_arrived_ > said_acked_) {
      queue_bare(tcp::Kind::kAck);
      send_queued();
      if (closed_) return false;
    }
    return ends_.empty() && !more_;
  }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }
  void wake() noexcept override {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof one);
  }
  [[nodiscard]] Deadline next_timer() const noexcept override { return next_deadline_; }
  [[nodiscard]] bool in_progress() const noexcept override {
    return !closed_ && (num_queued_ > 0 || state_ != State::kHeader || more_);
  }

  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override {
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

  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t id) const noexcept override {
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

  [[nodiscard]] bool quiet() const noexcept override {
    return num_queued_ == 0 && ends_.empty() &&
           std::all_of(unacked_.begin(), unacked_.end(), [](const Unacked& sent) { return sent.ended; });
  }

  void close() noexcept override {
    if (closed_) return;
    if (::getpid() == pid_ && !mid_message()) {
      std::array<std::byte, tcp::kHeaderBytes> bye{};
      tcp::write_header({tcp::Kind::kBye, 0, 0, 0, 0, 0, last_arrived_}, bye.data());
      [[maybe_unused]] const ssize_t sent = ::send(socket_.get(), bye.data(), bye.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    shut(End::kCancelled, "closed here");
  }

  [[nodiscard]] Statistics statistics() const noexcept override { return facts_; }

 private:
  void watch(int operation, int fd, std::uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), operation, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  [[nodiscard]] bool mid_message() const noexcept {
    return std::any_of(queues_.begin(), queues_.end(),
                       [](const auto& queue) { return !queue.empty() && queue.front().started(); });
  }

  void end(std::uint64_t id, End how) noexcept {
    ++(how == End::kOk ? facts_.ended_ok : facts_.ended_badly);
    try {
      ends_.emplace_back(id, how);
    } catch (...) {
      shut(End::kLocal, "out of memory");
    }
  }

  void shut(End why, std::string reason) noexcept {
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

  [[nodiscard]] bool was_cancelled(std::uint64_t id) const noexcept {
    return std::find(cancelled_.begin(), cancelled_.end(), id) != cancelled_.end();
  }

  // ---- sending
  void queue_bare(tcp::Kind kind) noexcept try {
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

  // The one that is on the wire already, else the most urgent.
  [[nodiscard]] std::deque<Outgoing>* choose() noexcept {
    std::deque<Outgoing>* first = nullptr;
    for (auto& queue : queues_) {
      if (queue.empty()) continue;
      if (queue.front().started()) return &queue;
      if (first == nullptr) first = &queue;
    }
    return first;
  }

  void begin(Outgoing& out) {
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

  void send_queued() noexcept try {
    while (num_queued_ > 0) {
      std::deque<Outgoing>* queue = choose();
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
        Unacked sent{out.id, out.sequence, out.deadline, false, 0, std::move(out.slices)};
        for (const Slice& slice : sent.slices) sent.size_bytes += slice.size_bytes;
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
  [[nodiscard]] bool send_some(Outgoing& out) noexcept {
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

  static void sum_up_to(Outgoing& out, std::size_t until) noexcept {
    if (until <= out.summed) return;
    const std::span<const std::byte> bytes = out.bytes_of(out.part);
    out.crc = crc32c(bytes.data() + out.summed, until - out.summed, out.crc);
    out.summed = until;
  }

  static void advance(Outgoing& out, std::size_t sent) noexcept {
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

  void set_blocked(bool blocked) noexcept {
    if (blocked == blocked_ || closed_) return;
    blocked_ = blocked;
    epoll_event event{};
    event.events = EPOLLIN | EPOLLRDHUP | (blocked ? EPOLLOUT : 0U);
    event.data.fd = socket_.get();
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, socket_.get(), &event);
  }

  // ---- receiving
  enum class State : std::uint8_t { kHeader, kSizes, kSlices, kDigest };

  void receive() noexcept try {
    std::size_t budget = kPollBudget;
    more_ = false;
    for (;;) {
      if (!parse()) return;                    // closed
      if (budget == 0) {
        more_ = true;
        return;
      }
      ssize_t got = 0;
      const bool direct = state_ == State::kSlices && staged_from_ == staged_to_ &&
                          slices_[slice_].size_bytes - filled_ >= kStagingBytes / 2;
      if (direct) {
        const std::size_t left = slices_[slice_].size_bytes - filled_;
        got = ::recv(socket_.get(), slices_[slice_].data + filled_, std::min(left, check_ ? kDigestStep : left),
                     MSG_DONTWAIT);
      } else {
        make_room();
        got = ::recv(socket_.get(), staging_.data() + staged_to_, staging_.size() - staged_to_, MSG_DONTWAIT);
      }
      if (got < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) return;
        return shut(End::kPeerLost, error_text("receiving"));
      }
      if (got == 0) return shut(End::kPeerLost, "the other end is gone");
      const auto size = static_cast<std::size_t>(got);
      budget -= std::min(budget, size);
      if (direct) {
        landed(size);
      } else {
        staged_to_ += size;
      }
    }
  } catch (...) {
    shut(End::kLocal, "out of memory");
  }

  void make_room() noexcept {
    if (staged_from_ == staged_to_) {
      staged_from_ = staged_to_ = 0;
    } else if (staged_from_ > 0) {
      std::memmove(staging_.data(), staging_.data() + staged_from_, staged_to_ - staged_from_);
      staged_to_ -= staged_from_;
      staged_from_ = 0;
    }
  }

  void landed(std::size_t size) noexcept {
    if (check_) crc_ = crc32c(slices_[slice_].data + filled_, size, crc_);
    filled_ += size;
  }

  // Takes what is staged apart; false when the lane has been closed.
  [[nodiscard]] bool parse() {
    for (;;) {
      const std::size_t have = staged_to_ - staged_from_;
      const std::byte* at = staging_.data() + staged_from_;
      switch (state_) {
        case State::kHeader: {
          if (have < tcp::kHeaderBytes) return true;
          if (!tcp::read_header(std::span<const std::byte, tcp::kHeaderBytes>(at, tcp::kHeaderBytes), header_)) {
            return corrupt("a header that cannot be");
          }
          staged_from_ += tcp::kHeaderBytes;
          if (!take_acked(header_.acked)) return corrupt("an acknowledgement of what was not sent");
          if (header_.kind == tcp::Kind::kBye) {
            shut(End::kPeerLost, "closed by the other end");
            return false;
          }
          if (header_.kind == tcp::Kind::kAck) break;
          if (header_.sequence != last_arrived_ + 1) return corrupt("a message out of turn");
          state_ = State::kSizes;
          break;
        }
        case State::kSizes: {
          const std::size_t size = std::size_t{header_.num_slices} * 8 + 4;
          if (have < size) return true;     // fits: kMaxSlices * 8 + 4 < kStagingBytes
          if (!open_slices(at)) return false;
          staged_from_ += size;
          state_ = State::kSlices;
          break;
        }
        case State::kSlices: {
          while (slice_ < slices_.size() && filled_ == slices_[slice_].size_bytes) {
            ++slice_;
            filled_ = 0;
          }
          if (slice_ == slices_.size()) {
            state_ = State::kDigest;
            break;
          }
          if (have == 0) return true;
          const std::size_t size = std::min(have, slices_[slice_].size_bytes - filled_);
          std::memcpy(slices_[slice_].data + filled_, at, size);
          facts_.bytes_copied_in += size;
          staged_from_ += size;
          landed(size);
          break;
        }
        case State::kDigest: {
          if (check_) {
            if (have < 4) return true;
            std::uint32_t digest = 0;
            std::memcpy(&digest, at, 4);
            staged_from_ += 4;
            if (digest != crc_) return corrupt("bytes that are not those that were sent");
          }
          arrived();
          break;
        }
      }
    }
  }

  [[nodiscard]] bool corrupt(const char* what) {
    shut(End::kCorrupt, std::string("the other end sent ") + what);
    return false;
  }

  [[nodiscard]] bool open_slices(const std::byte* sizes) {
    std::uint32_t crc = 0;
    std::memcpy(&crc, sizes + std::size_t{header_.num_slices} * 8, 4);
    if (crc != crc32c(sizes, std::size_t{header_.num_slices} * 8)) return corrupt("sizes that cannot be");
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < header_.num_slices; ++i) {
      std::uint64_t size = 0;
      std::memcpy(&size, sizes + i * 8, 8);
      if (size > capabilities_.max_transfer_bytes - total) return corrupt("more than may be announced");
      total += size;
    }
    slices_.clear();
    for (std::size_t i = 0; i < header_.num_slices; ++i) {
      std::uint64_t size = 0;
      std::memcpy(&size, sizes + i * 8, 8);
      Buffer buffer = land(size);
      if (buffer.data == nullptr) {
        shut(End::kLocal, "no memory for " + std::to_string(size) + " bytes");
        return false;
      }
      slices_.push_back(std::move(buffer));
    }
    slice_ = filled_ = 0;
    check_ = (header_.flags & tcp::kHasDigest) != 0;
    crc_ = crc32c(&header_.epoch, sizeof header_.epoch);
    return true;
  }

  void arrived() {
    last_arrived_ = header_.sequence;
    ++facts_.arrived;
    ++reported_;
    for (const Buffer& buffer : slices_) facts_.bytes_arrived += buffer.size_bytes;
    state_ = State::kHeader;
    sink_->on_arrived(header_.id, header_.epoch, std::exchange(slices_, {}));
  }

  [[nodiscard]] bool take_acked(std::uint64_t sequence) noexcept {
    if (sequence > last_sequence_) return false;
    while (!unacked_.empty() && unacked_.front().sequence <= sequence) {
      if (!unacked_.front().ended) end(unacked_.front().id, End::kOk);
      facts_.bytes_open -= unacked_.front().size_bytes;
      unacked_.pop_front();
    }
    return true;
  }

  void expire() noexcept {
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

  Fd socket_;
  Fd wake_;
  Fd epoll_;
  const pid_t pid_ = ::getpid();   // a forked child must not speak for its parent
  Capabilities capabilities_;
  std::uint64_t peer_max_ = 0;
  std::array<std::byte, tcp::kHelloBytes> hello_{};
  std::size_t hello_have_ = 0;

  std::array<std::deque<Outgoing>, kNumPriorities> queues_;
  std::size_t num_queued_ = 0;
  std::deque<Unacked> unacked_;
  std::vector<std::uint64_t> cancelled_;
  bool blocked_ = false;
  std::uint64_t last_id_ = 0;
  std::uint64_t last_sequence_ = 0;   // given out
  std::uint64_t said_acked_ = 0;

  State state_ = State::kHeader;
  tcp::Header header_;
  std::vector<std::byte> staging_;
  std::size_t staged_from_ = 0;
  std::size_t staged_to_ = 0;
  std::vector<Buffer> slices_;
  std::size_t slice_ = 0;
  std::size_t filled_ = 0;
  bool check_ = false;
  bool more_ = false;
  std::uint32_t crc_ = 0;
  std::uint64_t last_arrived_ = 0;    // sequence number

  std::vector<std::pair<std::uint64_t, End>> ends_;
  Deadline next_deadline_ = kNoDeadline;
  bool closed_ = false;
  bool said_closed_ = false;
  End why_ = End::kPending;
  std::string reason_;
  Sink* sink_ = nullptr;
  std::size_t reported_ = 0;
  Statistics facts_;
};

struct AddressList {
  explicit AddressList(const std::string& address, bool passive) {
    const std::size_t colon = address.rfind(':');
    if (colon == std::string::npos) throw LaneError("an address is HOST:PORT, not " + address);
    std::string host = address.substr(0, colon);
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = passive ? AI_PASSIVE : 0;
    const int failed = ::getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &first);
    if (failed != 0) throw LaneError(address + ": " + ::gai_strerror(failed));
  }
  AddressList(const AddressList&) = delete;
  AddressList& operator=(const AddressList&) = delete;
  ~AddressList() { ::freeaddrinfo(first); }

  addrinfo* first = nullptr;
};

class TcpListener final : public Listener {
 public:
  TcpListener(const std::string& address, const TcpOptions& options) : options_(options) {
    const AddressList found(address, true);
    socket_.reset(::socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int one = 1;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (::bind(socket_.get(), found.first->ai_addr, found.first->ai_addrlen) != 0 || ::listen(socket_.get(), 64) != 0) {
      throw LaneError(error_text("listening at " + address));
    }
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    watch(socket_.get());
  }

  [[nodiscard]] std::string address() const override {
    sockaddr_storage name{};
    socklen_t size = sizeof name;
    std::array<char, NI_MAXHOST> host{};
    std::array<char, NI_MAXSERV> port{};
    if (::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&name), &size) != 0 ||
        ::getnameinfo(reinterpret_cast<sockaddr*>(&name), size, host.data(), host.size(), port.data(), port.size(),
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
      throw LaneError(error_text("asking for the own address"));
    }
    const std::string text = host.data();
    return (text.find(':') == std::string::npos ? text : "[" + text + "]") + ":" + port.data();
  }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    const auto now = Clock::now();
    greeting_.remove_if([now](const Greeting& peer) { return now > peer.until; });
    for (;;) {
      Fd fd = acceptor_.accept(socket_.get());
      if (!fd.valid()) break;
      if (greeting_.size() >= kMaxPendingPeers) continue;
      auto lane = std::make_unique<TcpLane>(std::move(fd), options_);
      watch(lane->socket());
      greeting_.push_back({std::move(lane), Clock::now() + kHandshakeTime});
    }
    for (auto at = greeting_.begin(); at != greeting_.end(); ++at) {
      try {
        if (at->lane->receive_hello()) {
          at->lane->send_hello();
          ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->lane->socket(), nullptr);
          std::unique_ptr<Lane> done = std::move(at->lane);
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
    std::unique_ptr<TcpLane> lane;
    Deadline until;
  };

  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  const TcpOptions options_;
  Acceptor acceptor_;
  Fd socket_;
  Fd epoll_;
  std::list<Greeting> greeting_;
};

[[nodiscard]] int milliseconds_until(Deadline until) noexcept {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<long>(left, 0, 60'000));
}

}  // namespace

Probe probe_tcp() { return {true, "sockets of the operating system; not encrypted"}; }

std::unique_ptr<Listener> listen_tcp(const std::string& address, const TcpOptions& options) {
  return std::make_unique<TcpListener>(address, options);
}

std::unique_ptr<Lane> connect_tcp(const std::string& address, std::chrono::milliseconds timeout,
                                  const TcpOptions& options) {
  const AddressList found(address, false);
  const Deadline until = Clock::now() + timeout;
  Fd fd(::socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) throw LaneError(error_text("making a socket"));
  if (::connect(fd.get(), found.first->ai_addr, found.first->ai_addrlen) != 0) {
    if (errno != EINPROGRESS) throw LaneError(error_text("connecting to " + address));
    pollfd waiting{fd.get(), POLLOUT, 0};
    int failed = 0;
    socklen_t size = sizeof failed;
    if (::poll(&waiting, 1, milliseconds_until(until)) <= 0) throw LaneError("connecting to " + address + " takes too long");
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &failed, &size) != 0 || failed != 0) {
      errno = failed;
      throw LaneError(error_text("connecting to " + address));
    }
  }
  auto lane = std::make_unique<TcpLane>(std::move(fd), options);
  lane->send_hello();
  while (!lane->receive_hello()) {
    if (Clock::now() >= until) throw LaneError("the other end at " + address + " did not say hello in time");
    pollfd waiting{lane->socket(), POLLIN, 0};
    ::poll(&waiting, 1, std::min(milliseconds_until(until), 1000));
  }
  return lane;
}

}  // namespace genie
