// CRC32C (Castagnoli): the digest of transfers and of frames on the wire.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace genie {

// Goes on from `crc` (0 at the start); crc32c(b, crc32c(a)) is that of a followed by b. "123456789" gives 0xE3069283.
[[nodiscard]] std::uint32_t crc32c(const void* data, std::size_t size_bytes, std::uint32_t crc = 0) noexcept;

// For tests: by each way that this processor has.
[[nodiscard]] std::vector<std::uint32_t> crc32c_in_every_way(const void* data, std::size_t size_bytes,
                                                             std::uint32_t crc = 0);

}  // namespace genie
