#include "memory/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace genie {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
#ifndef F_SEAL_FUTURE_WRITE
constexpr int F_SEAL_FUTURE_WRITE = 0x0010;
#endif

// The kernel gives a process 65530 mappings; without one, malloc fails as well.
constexpr int kMaxForeignSegments = 24576;
std::atomic<int> num_foreign{0};

// Read-only mappings of this process, by their first address.
struct ForeignPages {
  std::shared_mutex lock;
  std::map<std::uintptr_t, std::size_t> by_start;
};

ForeignPages& foreign_pages() {
  static auto* pages = new ForeignPages();   // never destroyed: tensors may outlive static destruction
  return *pages;
}

std::atomic<const SegmentHooks*> hooks_of_all{nullptr};

std::uintptr_t number_of(const void* address) noexcept { return reinterpret_cast<std::uintptr_t>(address); }

std::string said_by_system(const char* what) {
  return std::string(what) + ": " + std::strerror(errno);
}

}  // namespace

void Fd::reset(int fd) noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

void populate(std::byte* data, std::size_t size_bytes) noexcept {
#ifndef MADV_POPULATE_WRITE
  constexpr int MADV_POPULATE_WRITE = 23;   // since Linux 5.14; an older kernel refuses, and the pages come when touched
#endif
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = number_of(data) & ~(page - 1);
  [[maybe_unused]] const int done =
      ::madvise(reinterpret_cast<void*>(begin), number_of(data) + size_bytes - begin, MADV_POPULATE_WRITE);
}

std::size_t hugepage_bytes() noexcept {
  static const std::size_t size = [] {
    std::ifstream meminfo("/proc/meminfo");
    std::string line;
    while (std::getline(meminfo, line)) {
      unsigned long kib = 0;
      if (std::sscanf(line.c_str(), "Hugepagesize: %lu kB", &kib) == 1) return static_cast<std::size_t>(kib) * 1024;
    }
    return std::size_t{0};
  }();
  return size;
}

std::shared_ptr<Segment> Segment::make(std::size_t size_bytes, Sharing sharing, bool huge, std::string& error) {
  const std::size_t huge_bytes = hugepage_bytes();
  const bool can_be_huge = huge && huge_bytes > 0 && size_bytes % huge_bytes == 0;
  std::shared_ptr<Segment> segment(new Segment());
  segment->size_bytes_ = size_bytes;
  for (const bool try_huge : {can_be_huge, false}) {
    void* mapped = MAP_FAILED;
    if (sharing == Sharing::kPrivate) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (try_huge ? MAP_HUGETLB : 0);
      mapped = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    } else {
      Fd fd(::memfd_create("genie-lane", MFD_CLOEXEC | MFD_ALLOW_SEALING | (try_huge ? MFD_HUGETLB : 0U)));
      if (fd.valid() && ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) == 0) {
        // MAP_POPULATE with hugepages: where the pool of pages is short, this fails here and not as a SIGBUS later.
        mapped = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (try_huge ? MAP_POPULATE : 0),
                        fd.get(), 0);
        int seals = kSizeSeals;
        if (sharing == Sharing::kSharedOneWay) seals |= F_SEAL_FUTURE_WRITE;
        if (mapped != MAP_FAILED && ::fcntl(fd.get(), F_ADD_SEALS, seals) != 0) {
          error = said_by_system("sealing shared memory");
          ::munmap(mapped, size_bytes);
          mapped = MAP_FAILED;
        }
        segment->fd_ = std::move(fd);
      }
    }
    if (mapped != MAP_FAILED) {
      segment->data_ = static_cast<std::byte*>(mapped);
      segment->pages_ = try_huge ? Pages::kHuge : Pages::kNormal;
      if (!try_huge && sharing == Sharing::kPrivate && huge_bytes > 0 && size_bytes >= huge_bytes &&
          ::madvise(mapped, size_bytes, MADV_HUGEPAGE) == 0) {
        segment->pages_ = Pages::kTransparentHuge;
      }
      segment->tell_hooks(true);
      return segment;
    }
    if (!can_be_huge) break;
  }
  if (error.empty()) error = said_by_system("mapping memory");
  segment->size_bytes_ = 0;
  return nullptr;
}

std::shared_ptr<Segment> Segment::map(Fd fd, std::size_t size_bytes, bool writable, std::string& error) {
  struct stat facts{};
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSizeSeals) != kSizeSeals) {
    error = "the peer's segment is not a memfd that is sealed against a change of its size";
    return nullptr;
  }
  if (::fstat(fd.get(), &facts) != 0 || facts.st_size < 0 || static_cast<std::size_t>(facts.st_size) != size_bytes ||
      size_bytes == 0) {
    error = "the peer's segment has " + std::to_string(facts.st_size) + " bytes, " + std::to_string(size_bytes) +
            " were announced";
    return nullptr;
  }
  if (static_cast<std::size_t>(facts.st_blksize) == hugepage_bytes() && (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) == 0) {
    error = "the peer's segment is of hugepages that could be taken away under us";
    return nullptr;
  }
  std::shared_ptr<Segment> segment(new Segment());
  segment->is_counted_ = true;
  if (num_foreign.fetch_add(1) >= kMaxForeignSegments) {
    error = "this process maps " + std::to_string(kMaxForeignSegments) + " segments of its peers already";
    return nullptr;
  }
  void* mapped = ::mmap(nullptr, size_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) {
    error = said_by_system("mapping the peer's segment");
    return nullptr;
  }
  segment->data_ = static_cast<std::byte*>(mapped);
  segment->size_bytes_ = size_bytes;   // the descriptor is closed: the mapping keeps the pages
  if (!writable) {
    ForeignPages& pages = foreign_pages();
    const std::unique_lock hold(pages.lock);
    pages.by_start[number_of(mapped)] = size_bytes;
  }
  segment->tell_hooks(writable);
  return segment;
}

bool set_segment_hooks(const SegmentHooks& hooks) noexcept {
  static const SegmentHooks kept = hooks;
  const SegmentHooks* expected = nullptr;
  return hooks_of_all.compare_exchange_strong(expected, &kept);
}

void Segment::tell_hooks(bool writable) noexcept {
  const SegmentHooks* hooks = hooks_of_all.load();
  if (hooks != nullptr) is_registered_ = hooks->mapped(data_, size_bytes_, writable);
}

Segment::~Segment() {
  if (is_counted_) num_foreign.fetch_sub(1);
  if (data_ == nullptr) return;
  if (is_registered_) hooks_of_all.load()->unmapping(data_);
  {
    ForeignPages& pages = foreign_pages();
    const std::unique_lock hold(pages.lock);
    pages.by_start.erase(number_of(data_));
  }
  ::munmap(data_, size_bytes_);
}

bool in_foreign_pages(const void* address) noexcept {
  ForeignPages& pages = foreign_pages();
  const std::shared_lock hold(pages.lock);
  auto next = pages.by_start.upper_bound(number_of(address));
  if (next == pages.by_start.begin()) return false;
  --next;
  return number_of(address) - next->first < next->second;
}

}  // namespace genie
