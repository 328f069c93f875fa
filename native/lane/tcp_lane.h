// One end of a tcp lane: its state, and what is done with it. tcp_lane.cc defines set-up, contract and end, tcp_send.cc and
// tcp_receive.cc the rest; how two ends meet stands in tcp.cc.
#pragma once

#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lane/bulk.h"
#include "lane/landing.h"
#include "lane/lane.h"
#include "lane/tcp.h"
#include "lane/tcp_frame.h"
#include "lane/unix_socket.h"

namespace genie::tcp {

inline constexpr std::size_t kStagingBytes = std::size_t{64} << 10;
inline constexpr std::size_t kDigestStep = std::size_t{256} << 10;     // summed while it is in the cache

struct Outgoing {
  std::uint64_t id = 0;
  std::uint64_t sequence = 0;         // given when its first byte is about to leave
  std::uint64_t epoch = 0;
  bool digest = false;
  bool bare = false;                  // an ack or a bye: a header alone
  bool bulk = false;
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
  bool bulk = false;
  bool ended = false;
  std::uint64_t size_bytes = 0;
  std::vector<Slice> slices;          // kept as they are until the peer has them
};

class TcpLane final : public Lane {
 public:
  TcpLane(Fd socket, const TcpOptions& options);
  ~TcpLane() override { close(); }

  // Set-up. Both ends send one hello and read the other's.
  void send_hello();
  [[nodiscard]] bool receive_hello();   // false while the peer has not said hello
  [[nodiscard]] int socket() const noexcept { return socket_.get(); }

  // The contract: lane/lane.h.
  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  [[nodiscard]] Buffer allocate(std::size_t size_bytes) noexcept override { return land(size_bytes); }
  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }
  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override;
  std::size_t poll(Sink& sink) noexcept override;
  [[nodiscard]] bool arm(bool) noexcept override;
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }
  void wake() noexcept override;
  [[nodiscard]] Deadline next_timer() const noexcept override { return next_deadline_; }
  [[nodiscard]] bool in_progress() const noexcept override {
    return !closed_ && (num_queued_ > 0 || state_ != State::kHeader || more_);
  }

  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override;
  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t id) const noexcept override;
  [[nodiscard]] bool quiet() const noexcept override;
  void close() noexcept override;
  [[nodiscard]] Statistics statistics() const noexcept override { return facts_; }

 private:
  void watch(int operation, int fd, std::uint32_t events);
  [[nodiscard]] bool mid_message() const noexcept;
  void end(std::uint64_t id, End how) noexcept;
  void shut(End why, std::string reason) noexcept;
  void expire() noexcept;
  [[nodiscard]] bool was_cancelled(std::uint64_t id) const noexcept;

  // What goes (tcp_send.cc).
  void queue_bare(tcp::Kind kind) noexcept;
  [[nodiscard]] std::deque<Outgoing>* choose() noexcept;
  void begin(Outgoing& out);
  void send_queued() noexcept;
  [[nodiscard]] bool send_some(Outgoing& out) noexcept;
  static void sum_up_to(Outgoing& out, std::size_t until) noexcept;
  static void advance(Outgoing& out, std::size_t sent) noexcept;
  void set_blocked(bool blocked) noexcept;
  [[nodiscard]] bool take_acked(std::uint64_t sequence) noexcept;

  // What comes (tcp_receive.cc).
  enum class State : std::uint8_t { kHeader, kSizes, kSlices, kDigest };

  void receive() noexcept;
  void make_room() noexcept;
  void landed(std::size_t size) noexcept;
  [[nodiscard]] bool parse();
  [[nodiscard]] bool corrupt(const char* what);
  [[nodiscard]] bool open_slices(const std::byte* sizes);
  void arrived();

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
  BulkWindow bulk_;
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

}  // namespace genie::tcp
