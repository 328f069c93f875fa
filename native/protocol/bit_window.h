// A bit for each of kWindowChunks chunks from a moving base on; a ring, so that moving it costs what it moves by.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "protocol/frame.h"

namespace genie::protocol {

class BitWindow {
 public:
  [[nodiscard]] bool test(std::uint32_t chunk) const noexcept { return (word(chunk) >> (chunk % 64) & 1) != 0; }
  void set(std::uint32_t chunk) noexcept { word(chunk) |= std::uint64_t{1} << (chunk % 64); }
  void clear(std::uint32_t chunk) noexcept { word(chunk) &= ~(std::uint64_t{1} << (chunk % 64)); }
  void clear_all() noexcept { words_.fill(0); }

  // The 64 bits from `chunk` on. Bits past the window are those of chunks a window earlier: the caller masks them.
  [[nodiscard]] std::uint64_t from(std::uint32_t chunk) const noexcept {
    const unsigned shift = chunk % 64;
    const std::uint64_t low = word(chunk) >> shift;
    return shift == 0 ? low : low | word(chunk + 64) << (64 - shift);
  }

 private:
  [[nodiscard]] const std::uint64_t& word(std::uint32_t chunk) const noexcept {
    return words_[chunk / 64 % kSackWords];
  }
  [[nodiscard]] std::uint64_t& word(std::uint32_t chunk) noexcept { return words_[chunk / 64 % kSackWords]; }

  std::array<std::uint64_t, kSackWords> words_{};
};

}  // namespace genie::protocol
