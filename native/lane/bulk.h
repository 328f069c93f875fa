// How much bulk is on its way at once.
#pragma once

#include <cstddef>

namespace genie {

// Of transfers of Priority::kBulk, so many bytes may have left and not been taken by the peer, or one transfer: what is
// posted later and is more urgent waits for no more than that. The rest waits in the lane's own queue.
inline constexpr std::size_t kBulkWindowBytes = std::size_t{4} << 20;

class BulkWindow {
 public:
  [[nodiscard]] bool has_room(std::size_t size_bytes) const noexcept {
    return open_bytes_ == 0 || open_bytes_ + size_bytes <= kBulkWindowBytes;
  }
  void left(std::size_t size_bytes) noexcept { open_bytes_ += size_bytes; }
  void taken(std::size_t size_bytes) noexcept { open_bytes_ -= size_bytes; }

 private:
  std::size_t open_bytes_ = 0;
};

}  // namespace genie
