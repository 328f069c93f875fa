// Slabs of registered memory, cut from segments and used again: a steady state asks the system for nothing.
//
// Sizes are rounded up to classes, four to a doubling (at most a quarter is lost), from 64 KiB to 2 GiB. Small classes
// share segments, large ones have one each. What is idle stays up to a bound; above it whole segments go back.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory/segment.h"

namespace genie {

inline constexpr std::size_t kMinSlabBytes = std::size_t{64} << 10;
inline constexpr std::size_t kMaxSlabBytes = std::size_t{2} << 30;
inline constexpr std::size_t kSharedSegmentBytes = std::size_t{16} << 20;   // of classes up to a quarter of it

struct PoolOptions {
  std::size_t limit_bytes = std::size_t{4} << 30;      // of segments, used or idle
  std::size_t keep_idle_bytes = std::size_t{512} << 20;
  // What was handed out at one time within so long is kept beside that: new pages cost more than what is written to them.
  std::chrono::seconds keep_recent{0};
  Segment::Sharing sharing = Segment::Sharing::kPrivate;
  bool huge = true;                                    // hugepages where the system has some
};

struct PoolStatistics {
  std::size_t reserved_bytes = 0;      // in segments
  std::size_t used_bytes = 0;          // in slabs that are handed out, as rounded
  std::size_t asked_bytes = 0;         // in slabs that are handed out, as asked: the rest is internal fragmentation
  std::size_t peak_used_bytes = 0;
  std::size_t num_segments = 0;
  std::uint64_t num_allocations = 0;
  std::uint64_t num_refusals = 0;
  Pages pages = Pages::kNormal;        // of the newest segment
};

struct PoolSegment {
  std::shared_ptr<Segment> memory;
  std::uint32_t number = 0;            // never used again for another segment
  std::size_t cut_bytes = 0;           // how much of it has become slabs
  std::size_t num_used = 0;            // slabs handed out
  std::size_t slab_bytes = 0;
};

struct Slab {
  std::byte* data = nullptr;
  std::size_t size_bytes = 0;          // of its class
  std::size_t asked_bytes = 0;
  std::shared_ptr<PoolSegment> segment;

  [[nodiscard]] std::size_t offset() const noexcept {
    return static_cast<std::size_t>(data - segment->memory->data());
  }
};

// Thread-safe. Outlived by its slabs: a segment goes when its last slab has.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // on_dropped is told the number of a segment that goes back, under the pool's lock.
  [[nodiscard]] static std::shared_ptr<Pool> make(const PoolOptions& options,
                                                  std::function<void(std::uint32_t)> on_dropped = {});

  // False where the limit or the system refuses; last_refusal() says why.
  [[nodiscard]] bool allocate(std::size_t size_bytes, Slab& slab) noexcept;
  void free(Slab slab) noexcept;

  // A slab that frees itself when its last owner goes; null as `allocate`.
  [[nodiscard]] std::shared_ptr<Slab> lend(std::size_t size_bytes) noexcept;

  // Have `count` slabs of this size ready, their pages in place, so that the next ones that are asked for cost nothing.
  // False where that would pass what the pool keeps idle, and then it grows by nothing, or the system refuses.
  [[nodiscard]] bool reserve(std::size_t size_bytes, std::size_t count) noexcept;

  // The segment of this pool in which an address lies; null for memory from elsewhere.
  [[nodiscard]] std::shared_ptr<PoolSegment> locate(const std::byte* address) const noexcept;

  // Give back every segment of which nothing is used.
  void trim() noexcept;
  // Give back what nobody has needed for a while. To be called now and then where keep_recent is set.
  void tidy(std::chrono::steady_clock::time_point now) noexcept;

  [[nodiscard]] PoolStatistics statistics() const;
  [[nodiscard]] std::string last_refusal() const;
  [[nodiscard]] const PoolOptions& options() const noexcept { return options_; }
  // Used bytes against the limit, without the lock: for decisions that may be a moment old.
  [[nodiscard]] std::size_t used_bytes() const noexcept { return used_bytes_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::size_t kNumClasses = 15 * 4 + 1;

  struct Free {
    std::byte* data;
    std::shared_ptr<PoolSegment> segment;
  };

  explicit Pool(const PoolOptions& options, std::function<void(std::uint32_t)> on_dropped);
  [[nodiscard]] bool grow(std::size_t number, std::size_t slab_bytes);
  [[nodiscard]] bool has_room_for(std::size_t number, std::size_t count) noexcept;
  void drop_idle(std::size_t keep_bytes) noexcept;
  [[nodiscard]] std::size_t kept_bytes(std::chrono::steady_clock::time_point now) noexcept;

  const PoolOptions options_;
  const std::function<void(std::uint32_t)> on_dropped_;
  mutable std::mutex lock_;
  std::array<std::vector<Free>, kNumClasses> free_;
  std::array<std::shared_ptr<PoolSegment>, kNumClasses> open_;   // where the next new slab of a class is cut
  std::map<const std::byte*, std::shared_ptr<PoolSegment>> segments_;   // by first address
  std::uint32_t next_number_ = 1;
  std::array<std::size_t, 2> peaks_{};                                  // of used bytes: since window_, and in the one before
  std::chrono::steady_clock::time_point window_;
  PoolStatistics facts_;
  std::atomic<std::size_t> used_bytes_{0};
  std::string refusal_;
};

// The class of a size and how large its slabs are; kNumClasses-1 holds kMaxSlabBytes.
[[nodiscard]] std::size_t class_of(std::size_t size_bytes) noexcept;
[[nodiscard]] std::size_t class_bytes(std::size_t number) noexcept;

}  // namespace genie
