// The contract of a lane: a payload channel between two ends, in the order in which it is used.
//
//     probe -> listen / connect -> allocate or register memory -> post, poll ... -> quiesce -> close
//
// A transfer is a list of slices. The receiver gets as many buffers, of the same sizes, in one piece: all of a
// transfer arrives, once, or nothing of it. Transfers of one priority arrive in the order in which they were posted.
//
// Set-up may throw LaneError. Nothing of the data path throws: it returns a status or reports an End.
// A lane is used by one thread at a time; Channel (lane/channel.h) adds the lock and the waiting. Only two things may
// happen in any thread: the last owner of a Buffer lets go of it, and wake() is called.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lane/end.h"

namespace genie {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;
inline constexpr Deadline kNoDeadline = Deadline::max();

// Spoken by both ends; a peer with another version is refused when it connects.
inline constexpr std::uint16_t kLaneVersion = 2;

// What Python finds in the extension, and extensions in each other: raised with every change of the bindings or of this
// file, so that one that was built from older sources is not taken for the present one.
inline constexpr int kApiVersion = 3;

// Limits on what a peer may announce. A lane may have lower ones (capabilities), none has higher ones.
inline constexpr std::size_t kMaxSlices = 4096;
inline constexpr std::size_t kMaxTransferBytes = std::size_t{1} << 40;

class Pool;

class LaneError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What kind of lane this is and what it can do.
struct Capabilities {
  std::string_view name;               // "inproc", "shm", "tcp", "dpdk", ...
  std::uint16_t version = kLaneVersion;
  bool zero_copy_receive = false;      // arrived buffers are the sender's pages, read-only
  bool off_host = false;               // the ends may be on different hosts: digests are on by default
  bool hardware_verified = true;       // false: written after the manual, never run on the device it is for
  std::size_t max_slices = kMaxSlices;
  std::size_t max_transfer_bytes = kMaxTransferBytes;
};

// Whether a kind of lane can be used on this machine, and why not.
struct Probe {
  bool usable = false;
  std::string reason;
};

// Memory that somebody owns. The last copy that goes lets the owner have it back (or unmaps it, or frees it).
struct Buffer {
  std::byte* data = nullptr;
  std::size_t size_bytes = 0;
  bool read_only = false;              // writing to it faults
  std::shared_ptr<void> owner;
  bool foreign = false;                // the peer's pages: it cannot use them again before the last owner goes
};

// One gathered piece of a transfer. `owner` keeps the memory as it is until the transfer has ended.
struct Slice {
  const std::byte* data = nullptr;
  std::size_t size_bytes = 0;
  std::shared_ptr<void> owner;
};

enum class Priority : std::uint8_t { kUrgent = 0, kNormal = 1, kBulk = 2 };
inline constexpr std::size_t kNumPriorities = 3;

struct Transfer {
  std::uint64_t id = 0;                // chosen by the sender, rising: a lane never delivers an id twice
  std::span<const Slice> slices;
  std::uint64_t epoch = 0;             // goes into the digest, so that a stale payload is not taken for a new one
  bool digest = false;                 // the receiver checks CRC32C over all bytes and the epoch
  Priority priority = Priority::kNormal;
  Deadline deadline = kNoDeadline;
};

enum class Posted : std::uint8_t {
  kAccepted,   // it will end, and the sink will be told how
  kBusy,       // the queue is full: poll, then post again
  kRefused,    // beyond the limits of the capabilities, or an id that is not above the last one
  kClosed,
};

// What poll() found. Called inside poll(), by the thread that polls.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void on_arrived(std::uint64_t id, std::uint64_t epoch, std::vector<Buffer> buffers) = 0;
  virtual void on_ended(std::uint64_t id, End end) = 0;
  // The lane is of no use from here on; transfers that had not ended were reported before.
  virtual void on_closed(End why, std::string_view reason) = 0;
};

struct Statistics {
  std::uint64_t posted = 0, ended_ok = 0, ended_badly = 0, arrived = 0;
  std::uint64_t bytes_sent = 0, bytes_arrived = 0;   // payload: the sum of slice sizes
  std::uint64_t bytes_copied_out = 0;                // by the sender's processor, inside the lane and its channel
  std::uint64_t bytes_copied_in = 0;                 // by the receiver's processor, inside the lane and its channel
  std::uint64_t bytes_shared = 0;                    // sent by naming pages that both ends see
  std::uint64_t bytes_open = 0;                      // posted and not ended: what a peer that does not read piles up
  std::uint64_t wakeups = 0;                         // of a sleeping peer
};

class Lane {
 public:
  virtual ~Lane() = default;
  Lane() = default;
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  [[nodiscard]] virtual const Capabilities& capabilities() const noexcept = 0;

  // Memory that this lane sends from without a copy (registered, shared, pinned). An empty buffer: none is left, or
  // the lane has no such memory; then any memory will do.
  [[nodiscard]] virtual Buffer allocate(std::size_t size_bytes) noexcept = 0;

  // Where `allocate` takes its memory from; null where that is no pool of this lane's own.
  [[nodiscard]] virtual Pool* pool() const noexcept { return nullptr; }

  // Make memory that lives elsewhere known to the device; lanes that need no registration return true.
  [[nodiscard]] virtual bool register_memory(std::span<std::byte> region) noexcept = 0;

  [[nodiscard]] virtual Posted post(const Transfer& transfer) noexcept = 0;

  // Move what can be moved now and report what happened; never sleeps. Returns how many things were reported.
  virtual std::size_t poll(Sink& sink) noexcept = 0;

  // Before sleeping on wait_fd(): false if there is something to poll for already. An end of a transfer wakes the
  // sleeper only where `for_ends` asks for it: who waits for an answer is not to be woken twice.
  [[nodiscard]] virtual bool arm(bool for_ends) noexcept = 0;
  // Readable, once armed, when poll() has something to do.
  [[nodiscard]] virtual int wait_fd() const noexcept = 0;
  // Make wait_fd() readable now. In any thread.
  virtual void wake() noexcept = 0;
  // When poll() must be called at the latest though nothing comes (deadlines, retransmissions).
  [[nodiscard]] virtual Deadline next_timer() const noexcept { return kNoDeadline; }

  // Give back memory that nothing has needed for a while. Called every few seconds by who keeps house.
  virtual void tidy() noexcept {}

  // Whether polling from another thread would move something on: half a message in or out, a queue that is not empty.
  [[nodiscard]] virtual bool in_progress() const noexcept { return false; }

  // How many bytes of a transfer have left this side, while it is open; 0 for one that is not, or where
  // the lane does not know.
  [[nodiscard]] virtual std::uint64_t bytes_moved([[maybe_unused]] std::uint64_t id) const noexcept { return 0; }

  // Ends a transfer in CANCELLED unless it has ended; what the peer has of it by then it may still get.
  [[nodiscard]] virtual bool cancel(std::uint64_t id) noexcept = 0;
  // Whether everything that was posted has ended. Poll until then, or close.
  [[nodiscard]] virtual bool quiet() const noexcept = 0;
  // Ends every open transfer in CANCELLED, tells the peer, lets go of descriptors. The next poll reports on_closed.
  virtual void close() noexcept = 0;

  [[nodiscard]] virtual Statistics statistics() const noexcept = 0;
  // What this kind of lane counts beside that: (name, value).
  [[nodiscard]] virtual std::vector<std::pair<std::string, std::uint64_t>> details() const { return {}; }
};

// Where the other ends come from.
class Listener {
 public:
  virtual ~Listener() = default;
  Listener() = default;
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  [[nodiscard]] virtual std::string address() const = 0;    // for the peer's connect
  [[nodiscard]] virtual int wait_fd() const noexcept = 0;   // readable when accept() has something to do
  // The next end that has come; null where none has. Throws LaneError for one that was refused, with the reason.
  [[nodiscard]] virtual std::unique_ptr<Lane> accept() = 0;
};

}  // namespace genie
