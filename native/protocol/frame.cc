#include "protocol/frame.h"

#include <cstring>

#include "lane/digest.h"

namespace genie::protocol {
namespace {

template <typename T>
void store(std::span<std::byte> out, std::size_t at, T value) noexcept {
  std::memcpy(out.data() + at, &value, sizeof value);
}

template <typename T>
[[nodiscard]] T load(std::span<const std::byte> in, std::size_t at) noexcept {
  T value;
  std::memcpy(&value, in.data() + at, sizeof value);
  return value;
}

constexpr std::uint16_t kTicketMagic = 0x4B54;
constexpr std::uint8_t kTicketDigest = 0x80;
constexpr std::uint16_t kSackDuplicate = 1;
constexpr std::uint16_t kHelloDigest = 1;
constexpr std::uint64_t kMaxChunks = 0xFFFFFFFF;

}  // namespace

void write_header(Header header, std::span<std::byte, kHeaderBytes> out) noexcept {
  std::memcpy(out.data(), &header, kHeaderBytes);
  store(out, offsetof(Header, crc), crc32c(out.data(), kHeaderBytes - 4));
}

ParseStatus parse_frame(std::span<const std::byte> bytes, ParsedFrame& frame) noexcept {
  if (bytes.size() < kHeaderBytes) return ParseStatus::kTooShort;
  Header& header = frame.header;
  std::memcpy(&header, bytes.data(), kHeaderBytes);
  if (header.magic != kMagic) return ParseStatus::kBadMagic;
  if (header.crc != crc32c(bytes.data(), kHeaderBytes - 4)) return ParseStatus::kBadHeaderCrc;
  if (header.version != kVersion) return ParseStatus::kBadVersion;
  if (header.type == 0 || header.type > kLastFrameType) return ParseStatus::kBadType;
  if ((header.flags & ~kAllFlags & 0xFF) != 0) return ParseStatus::kBadFlags;
  const bool has_digest = (header.flags & kFlagDigest) != 0;
  // Only chunks may go without: between two processes of one host nothing corrupts them.
  if (!has_digest && header.type != static_cast<std::uint8_t>(FrameType::kData)) return ParseStatus::kBadFlags;
  if (header.header_bytes != kHeaderBytes + (has_digest ? kDigestBytes : 0)) return ParseStatus::kBadLength;
  if (bytes.size() < std::size_t{header.header_bytes} + header.payload_bytes) return ParseStatus::kBadLength;
  frame.digest = has_digest ? load<std::uint32_t>(bytes, kHeaderBytes) : 0;
  frame.payload = bytes.subspan(header.header_bytes, header.payload_bytes);
  std::size_t trailer_bytes = 0;
  if ((header.flags & kFlagSack) != 0) {
    const auto rest = bytes.subspan(std::size_t{header.header_bytes} + header.payload_bytes);
    if (rest.size() < kSackHeadBytes) return ParseStatus::kBadLength;
    trailer_bytes = kSackHeadBytes + std::size_t{load<std::uint16_t>(rest, 16)} * 8;
    if (trailer_bytes > kMaxSackBytes || rest.size() < trailer_bytes) return ParseStatus::kBadLength;
    frame.trailer = rest.first(trailer_bytes);
  } else {
    frame.trailer = {};
  }
  frame.digested = bytes.subspan(header.header_bytes, header.payload_bytes + trailer_bytes);
  return ParseStatus::kOk;
}

Digest::Digest(const Header& header, std::uint64_t epoch) noexcept {
  std::array<std::byte, 32> place;
  store(std::span{place}, 0, header.session);
  store(std::span{place}, 8, header.transfer);
  store(std::span{place}, 12, header.chunk);
  store(std::span{place}, 16, epoch);
  store(std::span{place}, 24, std::uint64_t{header.type});
  crc_ = crc32c(place.data(), place.size());
}

void Digest::feed(std::span<const std::byte> data) noexcept { crc_ = crc32c(data.data(), data.size(), crc_); }

std::size_t write_sack(const Sack& sack, std::span<std::byte> out) noexcept {
  store(out, 0, sack.transfer);
  store(out, 4, sack.cumulative);
  store(out, 8, sack.trigger);
  store(out, 12, sack.trigger_delay_ns);
  store(out, 16, static_cast<std::uint16_t>(sack.words));
  store(out, 18, static_cast<std::uint16_t>(sack.duplicate ? kSackDuplicate : 0));
  store(out, 20, std::uint32_t{sack.trigger_try});
  std::memcpy(out.data() + kSackHeadBytes, sack.bitmap.data(), sack.words * 8);
  return kSackHeadBytes + sack.words * 8;
}

ParseStatus parse_sack(std::span<const std::byte> bytes, Sack& sack) noexcept {
  if (bytes.size() < kSackHeadBytes) return ParseStatus::kTooShort;
  const std::size_t words = load<std::uint16_t>(bytes, 16);
  if (words > kSackWords || bytes.size() != kSackHeadBytes + words * 8) return ParseStatus::kBadLength;
  const auto flags = load<std::uint16_t>(bytes, 18);
  if ((flags & ~kSackDuplicate) != 0 || load<std::uint32_t>(bytes, 20) > 0xFF) return ParseStatus::kBadFlags;
  sack.transfer = load<std::uint32_t>(bytes, 0);
  sack.cumulative = load<std::uint32_t>(bytes, 4);
  sack.trigger = load<std::uint32_t>(bytes, 8);
  sack.trigger_delay_ns = load<std::uint32_t>(bytes, 12);
  sack.duplicate = (flags & kSackDuplicate) != 0;
  sack.trigger_try = static_cast<std::uint8_t>(load<std::uint32_t>(bytes, 20));
  sack.words = words;
  sack.bitmap.fill(0);
  std::memcpy(sack.bitmap.data(), bytes.data() + kSackHeadBytes, words * 8);
  // One way to say a thing: bit 0 would be part of `cumulative`, an empty last word would not have been sent.
  if (words > 0 && ((sack.bitmap[0] & 1) != 0 || sack.bitmap[words - 1] == 0)) return ParseStatus::kBadContent;
  return ParseStatus::kOk;
}

void write_ticket(const Ticket& ticket, std::span<std::byte, kTicketBytes> out) noexcept {
  store(out, 0, kTicketMagic);
  store(out, 2, kVersion);
  store(out, 3, static_cast<std::uint8_t>((ticket.priority & ~kTicketDigest) | (ticket.digest ? kTicketDigest : 0)));
  store(out, 4, ticket.chunk_bytes);
  store(out, 8, ticket.size_bytes);
  store(out, 16, ticket.num_chunks());
  store(out, 20, ticket.after);
  store(out, 24, ticket.epoch);
  store(out, 32, ticket.tag);
}

ParseStatus parse_ticket(std::span<const std::byte> bytes, const TicketLimits& limits, Ticket& ticket) noexcept {
  if (bytes.size() != kTicketBytes) return ParseStatus::kBadLength;
  if (load<std::uint16_t>(bytes, 0) != kTicketMagic) return ParseStatus::kBadMagic;
  if (load<std::uint8_t>(bytes, 2) != kVersion) return ParseStatus::kBadVersion;
  const auto priority = load<std::uint8_t>(bytes, 3);
  ticket.priority = priority & static_cast<std::uint8_t>(~kTicketDigest);
  ticket.digest = (priority & kTicketDigest) != 0;
  ticket.chunk_bytes = load<std::uint32_t>(bytes, 4);
  ticket.size_bytes = load<std::uint64_t>(bytes, 8);
  ticket.after = load<std::uint32_t>(bytes, 20);
  ticket.epoch = load<std::uint64_t>(bytes, 24);
  ticket.tag = load<std::uint64_t>(bytes, 32);
  if (ticket.chunk_bytes == 0 || ticket.chunk_bytes > limits.max_chunk_bytes) return ParseStatus::kBadContent;
  if (ticket.size_bytes > limits.max_bytes) return ParseStatus::kBadContent;
  if ((ticket.size_bytes + ticket.chunk_bytes - 1) / ticket.chunk_bytes > kMaxChunks) return ParseStatus::kBadContent;
  if (load<std::uint32_t>(bytes, 16) != ticket.num_chunks()) return ParseStatus::kBadContent;
  return ParseStatus::kOk;
}

void write_hello(const Hello& hello, std::span<std::byte, kHelloBytes> out) noexcept {
  store(out, 0, hello.max_payload_bytes);
  store(out, 4, hello.heard_incarnation);
  store(out, 8, static_cast<std::uint16_t>(hello.digest ? kHelloDigest : 0));
  store(out, 10, std::uint16_t{0});
  store(out, 12, std::uint32_t{0});
  store(out, 16, hello.token);
}

ParseStatus parse_hello(std::span<const std::byte> bytes, Hello& hello) noexcept {
  if (bytes.size() != kHelloBytes) return ParseStatus::kBadLength;
  hello.max_payload_bytes = load<std::uint32_t>(bytes, 0);
  hello.heard_incarnation = load<std::uint32_t>(bytes, 4);
  const auto flags = load<std::uint16_t>(bytes, 8);
  if ((flags & ~kHelloDigest) != 0) return ParseStatus::kBadFlags;
  hello.token = load<std::uint64_t>(bytes, 16);
  hello.digest = (flags & kHelloDigest) != 0;
  if (hello.max_payload_bytes == 0 || hello.max_payload_bytes > 0xFFFF) return ParseStatus::kBadContent;
  return ParseStatus::kOk;
}

void write_reset(const Reset& reset, std::span<std::byte, kResetBytes> out) noexcept {
  store(out, 0, static_cast<std::uint16_t>(reset.reason));
  store(out, 2, std::uint16_t{0});
  store(out, 4, reset.heard_incarnation);
}

ParseStatus parse_reset(std::span<const std::byte> bytes, Reset& reset) noexcept {
  if (bytes.size() != kResetBytes) return ParseStatus::kBadLength;
  const auto reason = load<std::uint16_t>(bytes, 0);
  if (reason == 0 || reason > kLastResetReason) return ParseStatus::kBadContent;
  reset.reason = static_cast<ResetReason>(reason);
  reset.heard_incarnation = load<std::uint32_t>(bytes, 4);
  return ParseStatus::kOk;
}

}  // namespace genie::protocol
