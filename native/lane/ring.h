// A ring of records in memory that two processes share: one writes, one reads, neither trusts the other.
//
// Both sides keep their own position privately and only publish it; the other's is read from shared memory and checked
// each time. Who sleeps says so and looks once more; who writes publishes and then looks whether somebody sleeps: with
// sequentially consistent operations on both sides no wake-up is lost. A record is copied out before anything in it is looked at, so a peer cannot change it under the check.
//
//     record   u32 size of the body | u32 kind | body | padding to 8 bytes
//     a size of kSkip: nothing more before the end of the ring, go on at its start
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "memory/segment.h"

namespace genie {

inline constexpr std::size_t kRingBytes = std::size_t{512} << 10;
inline constexpr std::size_t kMaxRecordBytes = std::size_t{192} << 10;
static_assert(2 * (kMaxRecordBytes + 8) <= kRingBytes);   // wherever the ring's end is, an empty one has room

struct RingHeader {
  alignas(64) std::atomic<std::uint64_t> tail;       // bytes written, ever
  alignas(64) std::atomic<std::uint64_t> head;       // bytes read, ever
  alignas(64) std::atomic<std::uint32_t> sleeping;   // the reader waits for records
  std::atomic<std::uint32_t> starved;                // the writer waits for room, or to see records taken
};
static_assert(sizeof(RingHeader) == 192 && std::atomic<std::uint64_t>::is_always_lock_free);

inline constexpr std::size_t kRingSegmentBytes = 4096 + kRingBytes;

class Ring {
 public:
  explicit Ring(std::shared_ptr<Segment> segment)
      : segment_(std::move(segment)),
        header_(reinterpret_cast<RingHeader*>(segment_->data())),
        bytes_(segment_->data() + 4096) {}

  [[nodiscard]] RingHeader& header() noexcept { return *header_; }

 protected:
  [[nodiscard]] static constexpr std::size_t padded(std::size_t size) noexcept { return (size + 7) & ~std::size_t{7}; }

  std::shared_ptr<Segment> segment_;
  RingHeader* header_;
  std::byte* bytes_;
};

class RingWriter : public Ring {
 public:
  using Ring::Ring;

  // Room for a body of this size; null where there is none now. Nothing is visible before commit().
  [[nodiscard]] std::byte* reserve(std::size_t body_bytes, std::uint32_t kind) noexcept {
    const std::size_t size = 8 + padded(body_bytes);
    const std::size_t at = tail_ % kRingBytes;
    const std::size_t to_end = kRingBytes - at;
    const std::size_t needed = size <= to_end ? size : to_end + size;
    if (tail_ + needed - head_ > kRingBytes) {
      if (!refresh() || tail_ + needed - head_ > kRingBytes) return nullptr;
    }
    std::size_t start = at;
    if (size > to_end) {
      put(at, kSkip, 0);
      start = 0;
    }
    put(start, static_cast<std::uint32_t>(body_bytes), kind);
    reserved_ = needed;
    return bytes_ + start + 8;
  }

  // Publishes what was reserved; returns the position after it.
  std::uint64_t commit() noexcept {
    tail_ += reserved_;
    header_->tail.store(tail_, std::memory_order_seq_cst);
    return tail_;
  }

  // Whether the reader sleeps; it is told so only once.
  [[nodiscard]] bool must_wake() noexcept {
    return header_->sleeping.load(std::memory_order_seq_cst) != 0 && header_->sleeping.exchange(0) != 0;
  }

  // How far the reader is. False: it says something that cannot be.
  [[nodiscard]] bool refresh() noexcept {
    const std::uint64_t head = header_->head.load(std::memory_order_seq_cst);
    if (head < head_ || head > tail_) {
      broken_ = true;
      return false;
    }
    head_ = head;
    return true;
  }
  [[nodiscard]] std::uint64_t taken() const noexcept { return head_; }
  [[nodiscard]] bool broken() const noexcept { return broken_; }

  static constexpr std::uint32_t kSkip = 0xFFFFFFFFU;

 private:
  void put(std::size_t at, std::uint32_t size, std::uint32_t kind) noexcept {
    std::memcpy(bytes_ + at, &size, 4);
    std::memcpy(bytes_ + at + 4, &kind, 4);
  }

  std::uint64_t tail_ = 0;
  std::uint64_t head_ = 0;
  std::size_t reserved_ = 0;
  bool broken_ = false;
};

class RingReader : public Ring {
 public:
  enum class Got : std::uint8_t { kRecord, kNothing, kBroken };

  explicit RingReader(std::shared_ptr<Segment> segment) : Ring(std::move(segment)), copy_(kMaxRecordBytes) {}

  // The next record, in private memory that is good until the next call; it counts as taken only after done().
  [[nodiscard]] Got next(std::uint32_t& kind, std::span<const std::byte>& body) noexcept {
    const std::uint64_t tail = header_->tail.load(std::memory_order_acquire);
    for (;;) {
      const std::uint64_t have = tail - head_;
      if (have == 0) return Got::kNothing;
      if (tail < head_ || have > kRingBytes || tail % 8 != 0) return Got::kBroken;
      const std::size_t at = head_ % kRingBytes;
      std::uint32_t size = 0;
      std::memcpy(&size, bytes_ + at, 4);
      std::memcpy(&kind, bytes_ + at + 4, 4);
      if (size == RingWriter::kSkip) {
        const std::size_t to_end = kRingBytes - at;
        if (to_end > have || at == 0) return Got::kBroken;
        head_ += to_end;
        continue;
      }
      if (size > kMaxRecordBytes || 8 + padded(size) > have || at + 8 + padded(size) > kRingBytes) return Got::kBroken;
      std::memcpy(copy_.data(), bytes_ + at + 8, size);
      body = {copy_.data(), size};
      taken_ = 8 + padded(size);
      return Got::kRecord;
    }
  }

  void done() noexcept {
    head_ += taken_;
    taken_ = 0;
    header_->head.store(head_, std::memory_order_seq_cst);
  }

  [[nodiscard]] bool writer_waits() noexcept {
    return header_->starved.load(std::memory_order_seq_cst) != 0 && header_->starved.exchange(0) != 0;
  }

  // Says that the reader sleeps; false if there is a record after all.
  [[nodiscard]] bool arm() noexcept {
    header_->sleeping.store(1, std::memory_order_seq_cst);
    if (header_->tail.load(std::memory_order_seq_cst) == head_) return true;
    header_->sleeping.store(0, std::memory_order_relaxed);
    return false;
  }

 private:
  std::vector<std::byte> copy_;
  std::uint64_t head_ = 0;
  std::size_t taken_ = 0;
};

}  // namespace genie
