// A lane that several threads may use: the lock, the waiting, and what has arrived.
//
// Whoever waits moves the lane on himself, so that a small message wakes one thread and not two; a second one who waits
// meanwhile sleeps until the first has something for him. Where a large transfer is left half done because its thread
// has gone on to something else, the process's one progress thread takes over (lane/progress.h).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lane/fork.h"
#include "lane/lane.h"
#include "memory/pool.h"
#include "memory/segment.h"

namespace genie {

struct Message {
  std::uint64_t id = 0;
  std::uint64_t epoch = 0;
  std::vector<Buffer> buffers;
};

struct SendOptions {
  std::uint64_t epoch = 0;
  bool digest = false;
  Priority priority = Priority::kNormal;
  Deadline deadline = kNoDeadline;
  bool watch = false;                  // its end will be asked for
};

class Channel final : public std::enable_shared_from_this<Channel>, private Sink {
 public:
  enum class Got : std::uint8_t { kMessage, kNothing, kClosed };

  explicit Channel(std::unique_ptr<Lane> lane);
  ~Channel() override;
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Posts, and waits for room in the queue if there is none until `until`. The id, or 0: then `posted` says why. More
  // slices than the lane names one by one are sent as a bundle (lane/bundle.h), and arrive as they were.
  [[nodiscard]] std::uint64_t send(std::span<const Slice> slices, const SendOptions& options, Deadline until,
                                   Posted& posted);

  // The next message; what has arrived before the lane closed is still handed out.
  [[nodiscard]] Got receive(Message& message, Deadline until, std::chrono::microseconds spin);
  [[nodiscard]] Got try_receive(Message& message);

  // How a watched transfer ended; kPending where it has not, in time; nothing for one that is not watched. Any number
  // of threads may ask, until one forgets it.
  [[nodiscard]] std::optional<End> wait_ended(std::uint64_t id, Deadline until);
  void forget(std::uint64_t id);
  [[nodiscard]] bool cancel(std::uint64_t id);
  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t id) const;
  // Whether everything that was sent has ended, in time.
  [[nodiscard]] bool quiesce(Deadline until);
  void close();

  // For who has an event loop of his own: sleep on fd() only after arm() has said true, and then try_receive().
  [[nodiscard]] bool arm();
  [[nodiscard]] int fd() const noexcept { return epoll_.get(); }

  // What a lane gives back when it is not used (Lane::tidy).
  void tidy();
  [[nodiscard]] Buffer allocate(std::size_t size_bytes);
  // Have slabs ready (Pool::reserve). False where they cannot be, or where the lane has no pool.
  [[nodiscard]] bool reserve(std::size_t size_bytes, std::size_t count);
  // Of the lane's pool; nothing where it has none.
  [[nodiscard]] std::optional<PoolStatistics> memory() const;
  // Whoever copies payload beside the lane says so, in any thread; `statistics` adds it to the lane's own.
  void copied_out(std::size_t size_bytes) noexcept { copied_out_.fetch_add(size_bytes, std::memory_order_relaxed); }
  void copied_in(std::size_t size_bytes) noexcept { copied_in_.fetch_add(size_bytes, std::memory_order_relaxed); }
  [[nodiscard]] Statistics statistics() const;
  [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> details() const;
  [[nodiscard]] const Capabilities& capabilities() const noexcept { return lane_->capabilities(); }
  [[nodiscard]] bool closed() const;
  [[nodiscard]] std::string close_reason() const;
  [[nodiscard]] End close_end() const;

  // Called by the progress thread. True while it should go on.
  bool assist();
  [[nodiscard]] int lane_fd() const noexcept { return lane_->wait_fd(); }

 private:
  using Lock = std::unique_lock<std::mutex>;

  void on_arrived(std::uint64_t id, std::uint64_t epoch, std::vector<Buffer> buffers) override;
  void on_ended(std::uint64_t id, End end) override;
  void on_closed(End why, std::string_view reason) override;

  std::size_t poll_lane();
  template <typename Ready>
  bool wait(Lock& lock, Ready ready, Deadline until, std::chrono::microseconds spin, bool for_ends);
  void sleep(Lock& lock, Deadline until);
  [[nodiscard]] bool pop(Message& message);
  void leave(Lock& lock);
  // Of a forked child, which must neither speak for its parent nor wait for locks of threads that it does not have.
  [[nodiscard]] bool is_inherited() const noexcept { return generation_ != fork_generation(); }

  const unsigned generation_ = fork_generation();
  const std::unique_ptr<Lane> lane_;
  mutable std::mutex lock_;
  std::condition_variable changed_;
  bool polling_ = false;
  bool asleep_ = false;
  bool assisted_ = false;
  bool was_assisted_ = false;
  std::size_t num_waiting_ = 0;
  std::deque<Message> inbox_;
  std::unordered_map<std::uint64_t, End> watched_;
  std::uint64_t next_id_ = 1;
  std::chrono::microseconds awake_for_{0};   // when it waits next
  std::atomic<std::uint64_t> copied_out_{0};
  std::atomic<std::uint64_t> copied_in_{0};
  bool closed_ = false;
  bool is_broken_ = false;             // by a bundle that cannot be; closed after the poll that found it
  End why_ = End::kPending;
  std::string reason_;
  Fd bell_;                            // rings when the progress thread has put something into the inbox
  bool bell_rung_ = false;
  Fd epoll_;                           // over the bell and the lane's descriptor
};

}  // namespace genie
