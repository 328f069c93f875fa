// Where payload lands that does not stay in the peer's pages: pooled memory that becomes the tensor's own.
#pragma once

#include <cstddef>

#include "lane/lane.h"
#include "memory/pool.h"

namespace genie {

// Private memory, aligned to 64 bytes; from kMinSlabBytes on out of a pool of this process, so that large buffers are
// not mapped and faulted in for every transfer. An empty buffer where there is no memory.
[[nodiscard]] Buffer land(std::size_t size_bytes) noexcept;

// Lands through another module from here on: genie_dynamo._dpdk through _native, so that a process has one such pool,
// with one limit, one set of numbers, and page-locked where _native was told to (pin_segments). In a capsule's memory.
struct LandingWay {
  Buffer (*land)(std::size_t size_bytes) noexcept;
};
void land_through(const LandingWay& way) noexcept;

// That pool's numbers.
[[nodiscard]] PoolStatistics landing_statistics();

}  // namespace genie
