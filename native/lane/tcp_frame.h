// What the tcp lane puts on the wire. Little-endian; every length is checked before anything is allocated.
//
//     hello    magic u32 | version u16 | flags u16 | max_transfer u64                         both ends, once
//     header   magic u32 | kind u8 | flags u8 | slices u16 | id u64 | sequence u64 | epoch u64 | acked u64
//              | crc32c of what precedes u32
//     message  header | slices x size u64 | crc32c of the sizes u32 | the slices' bytes | digest u32, if flagged
//     ack      header: `acked` is the highest sequence number of which this end has all
//     bye      header
//
// Sequence numbers count a sender's messages in the order of the wire, from 1; ids follow the order of posting, which
// priorities change.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "lane/digest.h"
#include "lane/lane.h"

namespace genie::tcp {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

inline constexpr std::uint32_t kMagic = 0x544C4E47U;   // "GNLT"
inline constexpr std::size_t kHelloBytes = 16;
inline constexpr std::size_t kHeaderBytes = 44;

enum class Kind : std::uint8_t { kMessage = 1, kAck = 2, kBye = 3 };
inline constexpr std::uint8_t kHasDigest = 1;

struct Header {
  Kind kind = Kind::kMessage;
  std::uint8_t flags = 0;
  std::uint16_t num_slices = 0;
  std::uint64_t id = 0;
  std::uint64_t sequence = 0;
  std::uint64_t epoch = 0;
  std::uint64_t acked = 0;
};

inline void write_header(const Header& header, std::byte* out) noexcept {
  std::memcpy(out, &kMagic, 4);
  std::memcpy(out + 4, &header.kind, 1);
  std::memcpy(out + 5, &header.flags, 1);
  std::memcpy(out + 6, &header.num_slices, 2);
  std::memcpy(out + 8, &header.id, 8);
  std::memcpy(out + 16, &header.sequence, 8);
  std::memcpy(out + 24, &header.epoch, 8);
  std::memcpy(out + 32, &header.acked, 8);
  const std::uint32_t crc = crc32c(out, 40);
  std::memcpy(out + 40, &crc, 4);
}

// False for anything but a header that this version writes.
[[nodiscard]] inline bool read_header(std::span<const std::byte, kHeaderBytes> in, Header& header) noexcept {
  std::uint32_t magic = 0;
  std::uint32_t crc = 0;
  std::memcpy(&magic, in.data(), 4);
  std::memcpy(&crc, in.data() + 40, 4);
  if (magic != kMagic || crc != crc32c(in.data(), 40)) return false;
  std::uint8_t kind = 0;
  std::memcpy(&kind, in.data() + 4, 1);
  std::memcpy(&header.flags, in.data() + 5, 1);
  std::memcpy(&header.num_slices, in.data() + 6, 2);
  std::memcpy(&header.id, in.data() + 8, 8);
  std::memcpy(&header.sequence, in.data() + 16, 8);
  std::memcpy(&header.epoch, in.data() + 24, 8);
  std::memcpy(&header.acked, in.data() + 32, 8);
  if (kind < 1 || kind > 3 || (header.flags & ~kHasDigest) != 0 || header.num_slices > kMaxSlices) return false;
  header.kind = static_cast<Kind>(kind);
  return header.kind == Kind::kMessage || (header.num_slices == 0 && header.flags == 0);
}

inline void write_hello(std::uint64_t max_transfer, std::byte* out) noexcept {
  const std::uint16_t version = kLaneVersion;
  const std::uint16_t flags = 0;
  std::memcpy(out, &kMagic, 4);
  std::memcpy(out + 4, &version, 2);
  std::memcpy(out + 6, &flags, 2);
  std::memcpy(out + 8, &max_transfer, 8);
}

}  // namespace genie::tcp
