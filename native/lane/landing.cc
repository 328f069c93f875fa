#include "lane/landing.h"

#include <unistd.h>

#include <atomic>
#include <new>

namespace genie {
namespace {

constexpr std::size_t kAlignment = 64;

Pool& landing_pool() {
  static const auto* pool = [] {
    PoolOptions options;
    const long pages = ::sysconf(_SC_PHYS_PAGES);
    const long page_bytes = ::sysconf(_SC_PAGESIZE);
    if (pages > 0 && page_bytes > 0) {
      options.limit_bytes = static_cast<std::size_t>(pages) * static_cast<std::size_t>(page_bytes) / 2;
    }
    options.huge = false;   // reserved hugepages are for lanes; these are made transparent ones where possible
    return new std::shared_ptr<Pool>(Pool::make(options));   // never destroyed: tensors may outlive static destruction
  }();
  return **pool;
}

std::atomic<const LandingWay*> through{nullptr};

}  // namespace

void land_through(const LandingWay& way) noexcept { through = &way; }

Buffer land(std::size_t size_bytes) noexcept {
  if (const LandingWay* way = through) return way->land(size_bytes);
  if (size_bytes >= kMinSlabBytes) {
    if (auto slab = landing_pool().lend(size_bytes)) {
      std::byte* data = slab->data;
      return {data, size_bytes, false, std::move(slab)};
    }
  }
  auto* data = static_cast<std::byte*>(
      ::operator new(size_bytes == 0 ? 1 : size_bytes, std::align_val_t{kAlignment}, std::nothrow));
  if (data == nullptr) return {};
  try {
    return {data, size_bytes, false,
            std::shared_ptr<void>(data, [](void* memory) { ::operator delete(memory, std::align_val_t{kAlignment}); })};
  } catch (...) {
    return {};   // shared_ptr has freed it
  }
}

PoolStatistics landing_statistics() { return landing_pool().statistics(); }

}  // namespace genie
