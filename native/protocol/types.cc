#include "protocol/types.h"

#include <cstring>

namespace genie::protocol {

void OutgoingFrame::copy_to(std::byte* out) const noexcept {
  std::memcpy(out, head.data(), head_bytes);
  if (source == nullptr) return;
  out += head_bytes;
  source->each(source_offset, payload_bytes, [&out](const std::byte* data, std::size_t bytes) {
    std::memcpy(out, data, bytes);
    out += bytes;
  });
}

}  // namespace genie::protocol
