#include "lane/shm_lane.h"

#include <algorithm>
#include <cstring>

#include "lane/digest.h"

namespace genie::shm {
namespace {

constexpr std::size_t kInlineSliceBytes = 16U << 10;     // a copy in and out costs less than a slab's bookkeeping
constexpr std::size_t kInlineRecordBytes = 64U << 10;    // at most, with everything that is inside a record

constexpr std::size_t kCopiedWhileWaking = 256U << 10;

[[nodiscard]] constexpr std::size_t aligned(std::size_t size) noexcept { return (size + 15) & ~std::size_t{15}; }

[[nodiscard]] std::uint32_t digest_of(std::span<const Slice> slices, std::uint64_t epoch) noexcept {
  std::uint32_t crc = crc32c(&epoch, sizeof epoch);
  for (const Slice& slice : slices) crc = crc32c(slice.data, slice.size_bytes, crc);
  return crc;
}

}  // namespace

void ShmLane::send_releases() noexcept {
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

void ShmLane::send_drops() noexcept {
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

void ShmLane::reap() noexcept {
  if (untaken_.empty()) return;
  if (!writer_->refresh()) return shut(End::kCorrupt, "a ring position that cannot be");
  while (!untaken_.empty() && untaken_.front().position <= writer_->taken()) {
    if (!untaken_.front().ended) end(untaken_.front().id, End::kOk);
    facts_.bytes_open -= untaken_.front().size_bytes;
    if (untaken_.front().bulk) bulk_.taken(untaken_.front().size_bytes);
    untaken_.pop_front();
  }
}

void ShmLane::publish_queued() noexcept {
  for (auto& queue : queues_) {
    while (!queue.empty()) {
      if (closed_ || publish(queue.front()) == Published::kLater) return;
      queue.pop_front();
      --num_queued_;
    }
  }
}

bool ShmLane::announce(const PoolSegment& segment) noexcept {
  if (announced_.contains(segment.number)) return true;
  const PacketBody body{kMagic, kLaneVersion, kSegment, segment.number, 0, segment.memory->size_bytes()};
  const std::array fds{segment.memory->fd()};
  if (!send_packet(socket_.get(), std::as_bytes(std::span(&body, 1)), fds)) return false;
  announced_.insert(segment.number);
  return true;
}

bool ShmLane::place(const Slice& slice, Placed& placed) noexcept {
  if (const auto segment = pool_->locate(slice.data); segment != nullptr && slice.owner != nullptr) {
    if (!announce(*segment)) return false;
    placed = {slice.owner, segment->number, static_cast<std::uint64_t>(slice.data - segment->memory->data())};
    return true;
  }
  auto slab = pool_->lend(slice.size_bytes);
  if (slab == nullptr || !announce(*slab->segment)) return false;
  // Who sleeps takes as long to wake as this copy does: both at once. It then stays awake for a moment (Channel::wait).
  if (slice.size_bytes >= kCopiedWhileWaking) wake_peer();
  std::memcpy(slab->data, slice.data, slice.size_bytes);
  facts_.bytes_copied_out += slice.size_bytes;
  const std::uint64_t offset = slab->offset();
  const std::uint32_t number = slab->segment->number;
  placed = {std::move(slab), number, offset};
  return true;
}

std::uint64_t ShmLane::take_slot(std::shared_ptr<void> owner) {
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

ShmLane::Published ShmLane::publish(const Pending& pending) noexcept try {
  if (pending.bulk && !bulk_.has_room(pending.size_bytes())) return Published::kLater;
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
  untaken_.push_back({pending.size_bytes(), writer_->commit(), pending.id, pending.deadline, pending.bulk, false});
  if (pending.bulk) bulk_.left(pending.size_bytes());
  wake_peer();
  return Published::kDone;
} catch (...) {
  end(pending.id, End::kLocal);
  return Published::kEnded;
}

// An empty slice always does: there is no slab to name.
bool ShmLane::goes_inline(const Slice& slice, std::size_t record_bytes) noexcept {
  return slice.size_bytes == 0 ||
         (slice.size_bytes <= kInlineSliceBytes && record_bytes + slice.size_bytes <= kInlineRecordBytes - 64);
}

}  // namespace genie::shm
