// The bytes that one kind of message has every time, and the holes for what it does not.
//
// What the bytes mean is the business of who made them (genie_dynamo/core/stencil.py): here they are copied and compared.
// A call whose messages look like the last one's then needs no encoder and no decoder.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace genie {

class Stencil {
 public:
  enum class Kind : std::uint8_t {
    kNumber,   // 8 bytes, big-endian, unsigned
    kReal,     // 8 bytes, big-endian, IEEE 754
    kMemory,   // any number of bytes
  };
  struct Hole {
    std::size_t offset = 0;
    std::size_t size_bytes = 0;
    Kind kind = Kind::kMemory;
  };

  // Holes in the order of their offsets; between two is a byte at least. Throws std::invalid_argument.
  Stencil(std::span<const std::byte> bytes, std::vector<Hole> holes)
      : bytes_(bytes.begin(), bytes.end()), holes_(std::move(holes)) {
    std::size_t end = 0;
    for (const Hole& hole : holes_) {
      const bool fits = hole.offset >= end && hole.offset <= bytes_.size() &&
                        hole.size_bytes <= bytes_.size() - hole.offset;
      if (!fits || (hole.kind != Kind::kMemory && hole.size_bytes != sizeof(std::uint64_t))) {
        throw std::invalid_argument("a hole lies beyond the bytes, within another, or is no number of 8 bytes");
      }
      end = hole.offset + hole.size_bytes;
    }
  }

  [[nodiscard]] const std::vector<Hole>& holes() const noexcept { return holes_; }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }

  // The sizes of all holes of memory.
  [[nodiscard]] std::size_t memory_bytes() const noexcept {
    std::size_t size = 0;
    for (const Hole& hole : holes_) size += hole.kind == Kind::kMemory ? hole.size_bytes : 0;
    return size;
  }

  // Whether a message is this one, whatever is in its holes.
  [[nodiscard]] bool matches(std::span<const std::byte> message) const noexcept {
    if (message.size() != bytes_.size()) return false;
    std::size_t at = 0;
    for (const Hole& hole : holes_) {
      if (std::memcmp(bytes_.data() + at, message.data() + at, hole.offset - at) != 0) return false;
      at = hole.offset + hole.size_bytes;
    }
    return std::memcmp(bytes_.data() + at, message.data() + at, bytes_.size() - at) == 0;
  }

  static void put_number(std::byte* to, std::uint64_t value) noexcept {
    if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap64(value);
    std::memcpy(to, &value, sizeof value);
  }
  [[nodiscard]] static std::uint64_t number_at(const std::byte* from) noexcept {
    std::uint64_t value = 0;
    std::memcpy(&value, from, sizeof value);
    return std::endian::native == std::endian::little ? __builtin_bswap64(value) : value;
  }
  static void put_real(std::byte* to, double value) noexcept { put_number(to, std::bit_cast<std::uint64_t>(value)); }
  [[nodiscard]] static double real_at(const std::byte* from) noexcept { return std::bit_cast<double>(number_at(from)); }

 private:
  std::vector<std::byte> bytes_;
  std::vector<Hole> holes_;
};

}  // namespace genie
