// One end of a shm lane: its state, and what is done with it. shm_lane.cc defines set-up, contract and end, shm_send.cc and
// shm_receive.cc the rest; how two ends meet stands in shm.cc.
#pragma once

#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lane/bulk.h"
#include "lane/lane.h"
#include "lane/ring.h"
#include "lane/shm.h"
#include "lane/shm_wire.h"
#include "lane/unix_socket.h"
#include "memory/pool.h"
#include "memory/segment.h"

namespace genie::shm {

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
  bool bulk = false;
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
  bool bulk = false;
  bool ended = false;
};

struct Slot {
  std::uint32_t generation = 0;
  bool busy = false;
  std::shared_ptr<void> owner;
};

class ShmLane final : public Lane {
 public:
  ShmLane(Fd socket, bool connecting, const ShmOptions& options);
  ~ShmLane() override { close(); }

  // Set-up. Both ends send one hello with their ring and a rope to their bell, and read the other's.
  void send_hello();
  [[nodiscard]] bool receive_hello();   // false while the peer has not said hello
  [[nodiscard]] int socket() const noexcept { return socket_.get(); }

  // The contract: lane/lane.h.
  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  [[nodiscard]] Buffer allocate(std::size_t size_bytes) noexcept override;
  [[nodiscard]] Pool* pool() const noexcept override { return pool_.get(); }
  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }
  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override;
  std::size_t poll(Sink& sink) noexcept override;
  void tidy() noexcept override { pool_->tidy(Clock::now()); }   // the peer is told with the next poll
  [[nodiscard]] bool arm(bool for_ends) noexcept override;
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }
  void wake() noexcept override;
  [[nodiscard]] Deadline next_timer() const noexcept override { return next_deadline_; }
  [[nodiscard]] bool in_progress() const noexcept override { return !closed_ && num_queued_ > 0; }
  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override;
  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t id) const noexcept override;
  [[nodiscard]] bool quiet() const noexcept override;
  void close() noexcept override;
  [[nodiscard]] Statistics statistics() const noexcept override { return facts_; }

 private:
  enum class Published : std::uint8_t { kDone, kLater, kEnded };

  static bool is_socket(int fd) noexcept;
  void watch(int fd, std::uint32_t events);
  void ring_peer() noexcept;
  void wake_peer() noexcept;
  void end(std::uint64_t id, End how) noexcept;
  void report_ends() noexcept;
  void shut(End why, std::string reason) noexcept;
  void move() noexcept;
  void expire() noexcept;
  [[nodiscard]] bool look_at_descriptors() noexcept;

  // What comes (shm_receive.cc).
  [[nodiscard]] bool read_socket() noexcept;
  void drain() noexcept;
  [[nodiscard]] bool take_message(std::span<const std::byte> body);
  [[nodiscard]] Buffer from_record(const SliceRef& ref, std::span<const std::byte> inlined);
  [[nodiscard]] Buffer from_segment(const SliceRef& ref, bool copy_out);
  [[nodiscard]] bool take_releases(std::span<const std::byte> body);
  [[nodiscard]] bool take_drop(std::span<const std::byte> body);

  // What goes (shm_send.cc).
  [[nodiscard]] bool peer_is_starved() noexcept {
    return reader_->header().starved.load(std::memory_order_relaxed) != 0;
  }
  void send_releases() noexcept;
  void send_drops() noexcept;
  void reap() noexcept;
  void publish_queued() noexcept;

  // Where the bytes of one large slice are, for the peer.
  struct Placed {
    std::shared_ptr<void> owner;
    std::uint32_t segment = 0;
    std::uint64_t offset = 0;
  };

  [[nodiscard]] bool announce(const PoolSegment& segment) noexcept;
  [[nodiscard]] bool place(const Slice& slice, Placed& placed) noexcept;
  [[nodiscard]] std::uint64_t take_slot(std::shared_ptr<void> owner);
  [[nodiscard]] Published publish(const Pending& pending) noexcept;
  [[nodiscard]] static bool goes_inline(const Slice& slice, std::size_t record_bytes) noexcept;

  Fd socket_;
  Fd wake_;        // an eventfd, of this process alone
  Fd bell_;        // a socket: the peer has the other end of it
  Fd bell_rope_;   // that end, until the hello has taken it there
  Fd peer_bell_;
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
  BulkWindow bulk_;
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

}  // namespace genie::shm
