#include "memory/pool.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace genie {

std::size_t class_of(std::size_t size_bytes) noexcept {
  if (size_bytes <= kMinSlabBytes) return 0;
  // In units of a quarter of the power of two below: 4..7 quarters.
  const auto doubling = static_cast<std::size_t>(std::bit_width((size_bytes - 1) / kMinSlabBytes)) - 1;
  const std::size_t quarter = (kMinSlabBytes << doubling) / 4;
  const std::size_t quarters = (size_bytes + quarter - 1) / quarter;   // 5..8
  return doubling * 4 + quarters - 4;
}

std::size_t class_bytes(std::size_t number) noexcept {
  return ((kMinSlabBytes << (number / 4)) / 4) * (4 + number % 4);
}

Pool::Pool(const PoolOptions& options, std::function<void(std::uint32_t)> on_dropped)
    : options_(options), on_dropped_(std::move(on_dropped)) {
  for (auto& list : free_) list.reserve(16);
}

std::shared_ptr<Pool> Pool::make(const PoolOptions& options, std::function<void(std::uint32_t)> on_dropped) {
  return std::shared_ptr<Pool>(new Pool(options, std::move(on_dropped)));
}

bool Pool::allocate(std::size_t size_bytes, Slab& slab) noexcept try {
  const std::lock_guard hold(lock_);
  if (size_bytes > kMaxSlabBytes) {
    ++facts_.num_refusals;
    refusal_ = std::to_string(size_bytes) + " bytes asked for; a slab has at most " + std::to_string(kMaxSlabBytes);
    return false;
  }
  const std::size_t number = class_of(size_bytes);
  const std::size_t bytes = class_bytes(number);
  auto& list = free_[number];
  if (!list.empty()) {
    slab.data = list.back().data;
    slab.segment = std::move(list.back().segment);
    list.pop_back();
  } else {
    if (open_[number] == nullptr && !grow(number, bytes)) {
      ++facts_.num_refusals;
      return false;
    }
    slab.segment = open_[number];
    slab.data = slab.segment->memory->data() + slab.segment->cut_bytes;
    slab.segment->cut_bytes += bytes;
    if (slab.segment->cut_bytes + bytes > slab.segment->memory->size_bytes()) open_[number] = nullptr;
  }
  slab.size_bytes = bytes;
  slab.asked_bytes = size_bytes;
  ++slab.segment->num_used;
  ++facts_.num_allocations;
  facts_.used_bytes += bytes;
  facts_.asked_bytes += size_bytes;
  facts_.peak_used_bytes = std::max(facts_.peak_used_bytes, facts_.used_bytes);
  peaks_[0] = std::max(peaks_[0], facts_.used_bytes);
  used_bytes_.store(facts_.used_bytes, std::memory_order_relaxed);
  return true;
} catch (...) {
  return false;   // no memory for our own bookkeeping
}

bool Pool::grow(std::size_t number, std::size_t slab_bytes) {
  std::size_t bytes = slab_bytes <= kSharedSegmentBytes / 4 ? kSharedSegmentBytes : slab_bytes;
  if (facts_.reserved_bytes + bytes > options_.limit_bytes) drop_idle(0);
  if (facts_.reserved_bytes + bytes > options_.limit_bytes) bytes = slab_bytes;
  if (facts_.reserved_bytes + bytes > options_.limit_bytes) {
    refusal_ = "the pool is full: " + std::to_string(facts_.used_bytes) + " bytes are handed out and " +
               std::to_string(facts_.reserved_bytes) + " reserved, " + std::to_string(bytes) +
               " more would pass its limit of " + std::to_string(options_.limit_bytes) +
               "; let go of tensors, or raise the limit";
    return false;
  }
  auto segment = std::make_shared<PoolSegment>();
  std::string error;
  segment->memory = Segment::make(bytes, options_.sharing, options_.huge, error);
  if (segment->memory == nullptr) {
    refusal_ = error;
    return false;
  }
  segment->number = next_number_++;
  segment->slab_bytes = slab_bytes;
  segments_.emplace(segment->memory->data(), segment);
  facts_.reserved_bytes += bytes;
  facts_.num_segments = segments_.size();
  facts_.pages = segment->memory->pages();
  open_[number] = std::move(segment);
  return true;
}

void Pool::free(Slab slab) noexcept {
  const std::lock_guard hold(lock_);
  const std::size_t number = class_of(slab.size_bytes);
  --slab.segment->num_used;
  facts_.used_bytes -= slab.size_bytes;
  facts_.asked_bytes -= slab.asked_bytes;
  used_bytes_.store(facts_.used_bytes, std::memory_order_relaxed);
  const bool idle = slab.segment->num_used == 0;
  // Bounded by the slabs that exist; growing the list may fail, and then the slab is lost until its segment goes.
  try {
    free_[number].push_back({slab.data, std::move(slab.segment)});
  } catch (...) {
    return;
  }
  if (idle && facts_.reserved_bytes - facts_.used_bytes > options_.keep_idle_bytes) {
    drop_idle(kept_bytes(std::chrono::steady_clock::now()));
  }
}

std::shared_ptr<Slab> Pool::lend(std::size_t size_bytes) noexcept try {
  auto slab = std::make_unique<Slab>();
  if (!allocate(size_bytes, *slab)) return nullptr;
  return {slab.release(), [pool = shared_from_this()](Slab* lent) {
            pool->free(std::move(*lent));
            delete lent;
          }};
} catch (...) {
  return nullptr;
}

bool Pool::reserve(std::size_t size_bytes, std::size_t count) noexcept try {
  if (size_bytes > kMaxSlabBytes || !has_room_for(class_of(size_bytes), count)) return false;
  std::vector<Slab> taken;
  taken.reserve(count);
  while (taken.size() < count) {
    Slab slab;
    if (!allocate(size_bytes, slab)) break;
    populate(slab.data, slab.size_bytes);
    taken.push_back(std::move(slab));
  }
  const bool all = taken.size() == count;
  for (Slab& slab : taken) free(std::move(slab));
  return all;
} catch (...) {
  return false;
}

// Whether so many free slabs of a class are there, or can be made within what is kept idle.
bool Pool::has_room_for(std::size_t number, std::size_t count) noexcept {
  const std::lock_guard hold(lock_);
  const std::size_t bytes = class_bytes(number);
  std::size_t free = free_[number].size();
  if (const auto& open = open_[number]; open != nullptr) free += (open->memory->size_bytes() - open->cut_bytes) / bytes;
  if (count <= free) return true;
  const std::size_t missing = count - free;
  return missing <= options_.keep_idle_bytes / bytes &&
         facts_.reserved_bytes + missing * bytes <= options_.keep_idle_bytes;
}

std::shared_ptr<PoolSegment> Pool::locate(const std::byte* address) const noexcept {
  const std::lock_guard hold(lock_);
  auto next = segments_.upper_bound(address);
  if (next == segments_.begin()) return nullptr;
  --next;
  return next->second->memory->contains(address) ? next->second : nullptr;
}

void Pool::trim() noexcept {
  const std::lock_guard hold(lock_);
  drop_idle(0);
}

void Pool::tidy(std::chrono::steady_clock::time_point now) noexcept {
  const std::lock_guard hold(lock_);
  drop_idle(kept_bytes(now));
}

// The lock is held.
std::size_t Pool::kept_bytes(std::chrono::steady_clock::time_point now) noexcept {
  if (options_.keep_recent.count() == 0) return options_.keep_idle_bytes;
  if (now - window_ >= options_.keep_recent) {
    peaks_ = {facts_.used_bytes, peaks_[0]};
    window_ = now;
  }
  const std::size_t recent = std::max(peaks_[0], peaks_[1]);
  return std::max(options_.keep_idle_bytes, recent + recent / 4);   // slabs do not fill their segments
}

void Pool::drop_idle(std::size_t keep_bytes) noexcept {
  std::size_t idle_bytes = facts_.reserved_bytes - facts_.used_bytes;
  for (auto at = segments_.begin(); at != segments_.end() && idle_bytes > keep_bytes;) {
    const std::shared_ptr<PoolSegment> segment = at->second;
    if (segment->num_used > 0) {
      ++at;
      continue;
    }
    const std::size_t number = class_of(segment->slab_bytes);
    std::erase_if(free_[number], [&](const Free& slab) { return slab.segment == segment; });
    if (open_[number] == segment) open_[number] = nullptr;
    if (on_dropped_) on_dropped_(segment->number);
    const std::size_t bytes = segment->memory->size_bytes();
    facts_.reserved_bytes -= bytes;
    idle_bytes -= std::min(idle_bytes, bytes);
    at = segments_.erase(at);
  }
  facts_.num_segments = segments_.size();
}

PoolStatistics Pool::statistics() const {
  const std::lock_guard hold(lock_);
  return facts_;
}

std::string Pool::last_refusal() const {
  const std::lock_guard hold(lock_);
  return refusal_;
}

}  // namespace genie
