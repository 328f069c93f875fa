#include "gpu/pinning.h"

#include <map>
#include <mutex>

#include "gpu/driver.h"
#include "memory/segment.h"

namespace genie::gpu {
namespace {

struct Pinned {
  std::mutex lock;
  std::map<std::byte*, std::size_t> sizes;
  PinStatistics facts;
};

Pinned& pinned() {
  static auto* all = new Pinned();   // never destroyed: segments may outlive static destruction
  return *all;
}

const Driver* driver_in_use() {
  std::string why;
  return Driver::get(why);
}

bool on_mapped(std::byte* data, std::size_t size_bytes, bool writable) noexcept {
  const bool done = driver_in_use()->pin(data, size_bytes, writable);
  Pinned& all = pinned();
  const std::lock_guard hold(all.lock);
  if (!done) {
    ++all.facts.num_refused;
    return false;
  }
  all.sizes[data] = size_bytes;
  all.facts.pinned_bytes += size_bytes;
  ++all.facts.num_pinned;
  return true;
}

void on_unmapping(std::byte* data) noexcept {
  driver_in_use()->unpin(data);
  Pinned& all = pinned();
  const std::lock_guard hold(all.lock);
  const auto at = all.sizes.find(data);
  all.facts.pinned_bytes -= at->second;
  all.sizes.erase(at);
}

}  // namespace

bool pin_segments(std::string& why) {
  if (Driver::get(why) == nullptr) return false;
  set_segment_hooks({on_mapped, on_unmapping});
  return true;
}

PinStatistics pin_statistics() noexcept {
  Pinned& all = pinned();
  const std::lock_guard hold(all.lock);
  return all.facts;
}

}  // namespace genie::gpu
