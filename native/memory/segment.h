// A run of pages: anonymous, or a sealed memfd that can be passed to another process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace genie {

enum class Pages : std::uint8_t { kNormal, kHuge, kTransparentHuge };

[[nodiscard]] constexpr const char* name_of(Pages pages) noexcept {
  switch (pages) {
    case Pages::kNormal: return "normal pages";
    case Pages::kHuge: return "hugepages";
    case Pages::kTransparentHuge: return "transparent hugepages";
  }
  return "unknown";
}

// Owns a descriptor; -1 is none.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) noexcept : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(-1); }

  [[nodiscard]] int get() const noexcept { return fd_; }
  [[nodiscard]] bool valid() const noexcept { return fd_ >= 0; }
  [[nodiscard]] int release() noexcept {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset(int fd) noexcept;

 private:
  int fd_ = -1;
};

// Told of every run of pages that this process maps from now on, so that devices can be made to know them.
struct SegmentHooks {
  bool (*mapped)(std::byte* data, std::size_t size_bytes, bool writable) noexcept = nullptr;   // true: it is registered
  void (*unmapping)(std::byte* data) noexcept = nullptr;                                       // of what is registered
};

// Set once, before there are segments; later calls change nothing. Returns whether these are the ones that count.
bool set_segment_hooks(const SegmentHooks& hooks) noexcept;

class Segment {
 public:
  enum class Sharing : std::uint8_t {
    kPrivate,        // anonymous
    kShared,         // a memfd; the peer may map it writable
    kSharedOneWay,   // a memfd that nobody else can map writable, from the first moment on
  };

  // Null where the system gives none; `error` then says why. Hugepages are tried first where `size_bytes` is a
  // multiple of theirs and `huge` asks for them.
  [[nodiscard]] static std::shared_ptr<Segment> make(std::size_t size_bytes, Sharing sharing, bool huge,
                                                     std::string& error);
  // A segment that a peer made. Its true size must be `size_bytes` and it must be sealed against shrinking, one of
  // hugepages against holes too, or a peer could take pages away under us. Null where that does not hold.
  [[nodiscard]] static std::shared_ptr<Segment> map(Fd fd, std::size_t size_bytes, bool writable, std::string& error);

  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_bytes_; }
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }
  [[nodiscard]] Pages pages() const noexcept { return pages_; }
  [[nodiscard]] bool contains(const std::byte* address) const noexcept {
    return address >= data_ && address < data_ + size_bytes_;
  }

 private:
  Segment() = default;
  void tell_hooks(bool writable) noexcept;

  std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
  Fd fd_;
  bool is_counted_ = false;      // among the segments of peers
  bool is_registered_ = false;   // by a hook
  Pages pages_ = Pages::kNormal;
};

// Have the pages of a run of memory put in place now, where the kernel can be asked to; what is in them stays.
void populate(std::byte* data, std::size_t size_bytes) noexcept;

[[nodiscard]] std::size_t hugepage_bytes() noexcept;   // 0 where the kernel has none

// Whether an address lies in a mapping of this process that must not be written to (a peer's pages).
[[nodiscard]] bool in_foreign_pages(const void* address) noexcept;

}  // namespace genie
