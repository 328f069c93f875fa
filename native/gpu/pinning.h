// Lane memory that a CUDA device knows: every segment is page-locked when it is mapped and let go before it is unmapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace genie::gpu {

// From here on, in this process, for good. False, and why, where there is no driver. Segments from before stay as they are.
[[nodiscard]] bool pin_segments(std::string& why);

struct PinStatistics {
  std::uint64_t pinned_bytes = 0;      // now
  std::uint64_t num_pinned = 0;        // segments, ever
  std::uint64_t num_refused = 0;       // by the driver: they are used all the same, a copy slower
};

[[nodiscard]] PinStatistics pin_statistics() noexcept;

}  // namespace genie::gpu
