// A message of more slices than a lane names one by one: neighbours are copied together, behind a table of their sizes.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "lane/lane.h"

namespace genie {

// A message with more slices than this is refused, also in a bundle.
inline constexpr std::size_t kMaxBundled = std::size_t{1} << 20;

// The table and the groups, at most `max_slices` slices; empty where there is no memory for it. `allocate` gives the
// memory of a group: where it is the lane's own, nothing is copied again.
[[nodiscard]] std::vector<Slice> bundle(std::span<const Slice> slices, std::size_t max_slices,
                                        const std::function<Buffer(std::size_t)>& allocate) noexcept;

// The slices of a bundle that arrived, as parts of its buffers. False where it is none: nothing in it is believed.
[[nodiscard]] bool unbundle(std::vector<Buffer>& buffers) noexcept;

}  // namespace genie
