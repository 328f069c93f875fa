#include "lane/bundle.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "lane/landing.h"

namespace genie {
namespace {

constexpr std::size_t kAlignment = 64;

// The table: u64 slices in a group, then the u64 size of each slice.
constexpr std::size_t kEntryBytes = sizeof(std::uint64_t);

[[nodiscard]] constexpr std::size_t aligned(std::size_t size) noexcept {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

[[nodiscard]] Slice whole(Buffer buffer) noexcept { return {buffer.data, buffer.size_bytes, std::move(buffer.owner)}; }

}  // namespace

std::vector<Slice> bundle(std::span<const Slice> slices, std::size_t max_slices,
                          const std::function<Buffer(std::size_t)>& allocate) noexcept try {
  if (slices.size() > kMaxBundled || max_slices < 2) return {};
  const std::size_t in_group = (slices.size() + max_slices - 2) / (max_slices - 1);
  const Buffer table = land((1 + slices.size()) * kEntryBytes);
  if (table.data == nullptr) return {};
  const auto put = [&](std::size_t entry, std::uint64_t value) {
    std::memcpy(table.data + entry * kEntryBytes, &value, kEntryBytes);
  };
  put(0, in_group);
  std::vector<Slice> bundled{whole(table)};
  for (std::size_t first = 0; first < slices.size(); first += in_group) {
    const auto group = slices.subspan(first, std::min(in_group, slices.size() - first));
    std::size_t size = 0;
    for (const Slice& slice : group) size += aligned(slice.size_bytes);
    Buffer memory = allocate(size);
    if (memory.data == nullptr) memory = land(size);
    if (memory.data == nullptr) return {};
    std::size_t at = 0;
    for (std::size_t i = 0; i < group.size(); ++i) {
      put(1 + first + i, group[i].size_bytes);
      if (group[i].size_bytes > 0) std::memcpy(memory.data + at, group[i].data, group[i].size_bytes);
      at += aligned(group[i].size_bytes);
    }
    bundled.push_back({memory.data, size, std::move(memory.owner)});
  }
  return bundled;
} catch (...) {
  return {};
}

bool unbundle(std::vector<Buffer>& buffers) noexcept try {
  if (buffers.empty() || buffers[0].size_bytes < kEntryBytes || buffers[0].size_bytes % kEntryBytes != 0) return false;
  // A private copy: the table may lie in pages that the peer can still write to.
  std::vector<std::uint64_t> table(buffers[0].size_bytes / kEntryBytes);
  std::memcpy(table.data(), buffers[0].data, buffers[0].size_bytes);
  const std::uint64_t in_group = table[0];
  const std::size_t count = table.size() - 1;
  if (count > kMaxBundled || in_group == 0 || (count + in_group - 1) / in_group != buffers.size() - 1) return false;
  std::vector<Buffer> slices;
  slices.reserve(count);
  std::size_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Buffer& group = buffers[1 + i / in_group];
    if (i % in_group == 0) at = 0;
    const std::uint64_t size = table[1 + i];
    if (size > group.size_bytes - at || aligned(size) > group.size_bytes - at) return false;
    slices.push_back({group.data + at, size, group.read_only, group.owner, group.foreign});
    at += aligned(size);
  }
  buffers = std::move(slices);
  return true;
} catch (...) {
  return false;
}

}  // namespace genie
