// What a user of the protocol gives and gets. Times are nanoseconds of a clock that the caller owns and passes in: the
// protocol reads none, so that a simulator can run it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lane/end.h"
#include "protocol/frame.h"

namespace genie::protocol {

using Nanoseconds = std::uint64_t;
inline constexpr Nanoseconds kMicrosecond = 1'000, kMillisecond = 1'000'000, kSecond = 1'000'000'000;
inline constexpr Nanoseconds kNever = ~Nanoseconds{0};

using TransferId = std::uint32_t;  // of one direction of one session; from 1, used once

enum class Direction : std::uint8_t { kOutgoing, kIncoming };

enum class EventKind : std::uint8_t {
  kEstablished,  // the session
  kClosed,       // the session; `end` says why
  kOffered,      // an incoming transfer: accept() or refuse() it
  kEnded,        // a transfer; its memory is not touched any more
};

struct Event {
  EventKind kind = EventKind::kClosed;
  Direction direction = Direction::kOutgoing;
  TransferId transfer = 0;
  End end = End::kOk;
  Ticket ticket{};
};

struct Config {
  std::uint32_t max_payload_bytes = 8192;      // of a frame that this end takes
  std::uint32_t credit_bytes = 4u << 20;       // that may be in flight towards this end
  std::uint32_t max_transfers = 64;            // at once, in each direction; more are not accepted yet
  std::uint64_t max_transfer_bytes = 2ull << 30;
  bool digest = true;                          // on every chunk of every transfer, where either end wants it
  std::uint64_t token = 0;                     // told to the other end in the hello
  bool off_host = true;                        // others share the way: pace, and give way to their delay
  Nanoseconds connect_timeout_ns = 5 * kSecond;
  Nanoseconds peer_timeout_ns = 2 * kSecond;   // silence after which the other end is lost
  Nanoseconds ping_interval_ns = 250 * kMillisecond;
  Nanoseconds idle_timeout_ns = 5 * kSecond;   // an accepted transfer of which nothing comes ends in kTimeout
  Nanoseconds rto_min_ns = kMillisecond;
  Nanoseconds rto_max_ns = 200 * kMillisecond;
  std::uint32_t max_retries = 32;              // of one frame
  std::uint32_t max_corrupt_in_a_row = 32;
  std::uint32_t ack_every_chunks = 8;
  Nanoseconds ack_delay_ns = 20 * kMicrosecond;
  Nanoseconds target_queueing_ns = 100 * kMicrosecond;  // delay above the least that was seen; off-host only
};

struct Stats {
  std::uint64_t frames_in = 0, frames_out = 0;
  std::uint64_t payload_bytes_in = 0;    // of chunks that were new
  std::uint64_t payload_bytes_out = 0;   // of first transmissions
  std::uint64_t chunks_sent_again = 0;
  std::uint64_t timeouts = 0;            // retransmission timers that ran out
  std::uint64_t duplicates = 0;          // chunks that had come before
  std::uint64_t bad_frames = 0;          // that do not parse
  std::uint64_t bad_digests = 0;
  std::uint64_t bad_tickets = 0;         // frames that contradict the ticket of their transfer, or the protocol
  std::uint64_t stale_frames = 0;        // of another incarnation
  std::uint64_t resets_out = 0;
  Nanoseconds smoothed_rtt_ns = 0;
  std::uint64_t window_bytes = 0;        // what may be in flight now
};

// Memory that is sent from, or landed in, in order. It belongs to the caller and must stay until the transfer's
// kEnded event; what is sent from must not change until then.
struct ConstPiece {
  const std::byte* data;
  std::uint64_t size_bytes;
};
struct Piece {
  std::byte* data;
  std::uint64_t size_bytes;
};

// Several pieces as one range of bytes.
template <typename P>
class Gathered {
 public:
  Gathered() = default;
  explicit Gathered(std::vector<P> pieces) : pieces_(std::move(pieces)) {
    starts_.reserve(pieces_.size());
    for (const P& piece : pieces_) {
      starts_.push_back(size_bytes_);
      size_bytes_ += piece.size_bytes;
    }
  }
  [[nodiscard]] std::uint64_t size_bytes() const noexcept { return size_bytes_; }

  // Calls visit(pointer, bytes) for each stretch of [offset, offset + bytes), which lies inside.
  template <typename Visit>
  void each(std::uint64_t offset, std::uint64_t bytes, Visit&& visit) const {
    std::size_t at = 0;
    for (std::size_t high = pieces_.size(); high - at > 1;) {
      const std::size_t middle = (at + high) / 2;
      (starts_[middle] <= offset ? at : high) = middle;
    }
    for (; bytes > 0; ++at) {
      const std::uint64_t inside = offset - starts_[at];
      const std::uint64_t here = pieces_[at].size_bytes - inside;
      const std::uint64_t taken = here < bytes ? here : bytes;
      if (taken > 0) visit(pieces_[at].data + inside, static_cast<std::size_t>(taken));
      offset += taken;
      bytes -= taken;
    }
  }

 private:
  std::vector<P> pieces_;
  std::vector<std::uint64_t> starts_;
  std::uint64_t size_bytes_ = 0;
};
using Source = Gathered<ConstPiece>;
using Sink = Gathered<Piece>;

inline constexpr std::size_t kMaxHeadBytes = kHeaderBytes + kDigestBytes + kMaxSackBytes;

// A frame to be sent: `head`, then payload_bytes of `source` from source_offset on. The source stays until the
// transfer has ended, which can be before a driver lets go of the frame: see native/protocol/NOTES.md.
struct OutgoingFrame {
  std::array<std::byte, kMaxHeadBytes> head;
  std::uint32_t head_bytes = 0;
  const Source* source = nullptr;  // null where nothing follows the head
  std::uint64_t source_offset = 0;
  std::uint32_t payload_bytes = 0;
  std::uint64_t transmission = 0;  // which sending of a chunk this is, for Session::take_back(); 0: of no chunk

  [[nodiscard]] std::size_t size_bytes() const noexcept { return std::size_t{head_bytes} + payload_bytes; }
  // Writes all of it to `out`, which has size_bytes().
  void copy_to(std::byte* out) const noexcept;
};

}  // namespace genie::protocol
