// What stands on the wire. Little-endian; a frame is
//
//     header (48 bytes) | digest (4, where kFlagDigest) | payload (payload_bytes) | SACK trailer (where kFlagSack)
//
// and may be followed by padding, which Ethernet adds to short frames. hdr_len counts header and digest. The header has
// a CRC32C of its own; the digest is a CRC32C of payload and trailer, bound to the place where they belong: session,
// transfer, chunk and the epoch of the ticket. Parsing copies nothing but the header and trusts no length.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace genie::protocol {

static_assert(std::endian::native == std::endian::little, "the wire format is written as the host has it");

inline constexpr std::uint16_t kMagic = 0x6E47;
inline constexpr std::uint8_t kVersion = 1;
inline constexpr std::size_t kHeaderBytes = 48;
inline constexpr std::size_t kDigestBytes = 4;
inline constexpr std::uint32_t kCreditUnitBytes = 4096;  // of Header::credit

enum class FrameType : std::uint8_t {
  kHello = 1,     // who I am and what I take                  payload: Hello
  kHelloAck = 2,  // the same, and that I have heard yours     payload: Hello
  kOpen = 3,      // I have a transfer for you                 payload: Ticket
  kData = 4,      // a chunk of it
  kAck = 5,       // what I have of it; also: I take it        trailer: Sack
  kCancel = 6,    // forget that transfer
  kReset = 7,     // that transfer, or session, is not here    payload: Reset
  kPing = 8,      // are you there?
  kPong = 9,
  kBye = 10,      // this session is over
};
inline constexpr std::uint8_t kLastFrameType = 10;

enum Flag : std::uint16_t {
  kFlagDigest = 1,
  kFlagSack = 2,
  kFlagAckNow = 4,  // answer at once: the sender has nothing more to send
};
inline constexpr std::uint16_t kAllFlags = kFlagDigest | kFlagSack | kFlagAckNow;
inline constexpr unsigned kTryShift = 8;  // the upper byte of the flags counts, modulo 256, how often a chunk was sent

struct Header {
  std::uint16_t magic = kMagic;
  std::uint8_t version = kVersion;
  std::uint8_t type = 0;
  std::uint16_t flags = 0;
  std::uint16_t header_bytes = kHeaderBytes;
  std::uint64_t session = 0;
  std::uint32_t incarnation = 0;  // of who sends the frame
  std::uint32_t transfer = 0;
  std::uint32_t chunk = 0;
  std::uint32_t total = 0;   // chunks of the transfer
  std::uint64_t offset = 0;  // of the payload in the transfer
  std::uint16_t payload_bytes = 0;
  std::uint16_t credit = 0;  // what the sender of this frame takes in flight, in units of kCreditUnitBytes
  std::uint32_t crc = 0;     // of the 44 bytes before it
};
static_assert(sizeof(Header) == kHeaderBytes && offsetof(Header, crc) == kHeaderBytes - 4);
static_assert(offsetof(Header, session) == 8 && offsetof(Header, offset) == 32);

enum class ParseStatus : std::uint8_t {
  kOk,
  kTooShort,
  kBadMagic,
  kBadVersion,
  kBadHeaderCrc,
  kBadType,
  kBadFlags,
  kBadLength,
  kBadContent,
};

struct ParsedFrame {
  Header header;
  std::uint32_t digest = 0;              // where kFlagDigest
  std::span<const std::byte> payload;    // payload_bytes of them
  std::span<const std::byte> trailer;    // where kFlagSack: whole, of a length that it states
  std::span<const std::byte> digested;   // payload and trailer, which the digest covers
};

// Writes header and CRC. `out` has kHeaderBytes.
void write_header(Header header, std::span<std::byte, kHeaderBytes> out) noexcept;

[[nodiscard]] ParseStatus parse_frame(std::span<const std::byte> bytes, ParsedFrame& frame) noexcept;

// The digest of what a frame carries; `epoch` is that of the transfer's ticket, 0 in frames that are not kData.
class Digest {
 public:
  Digest(const Header& header, std::uint64_t epoch) noexcept;
  void feed(std::span<const std::byte> data) noexcept;
  [[nodiscard]] std::uint32_t value() const noexcept { return crc_; }

 private:
  std::uint32_t crc_;
};

// What a receiver has: everything below `cumulative`, and of what follows the chunks whose bits are set (bit i is chunk
// cumulative + i, so that bit 0 never is).
inline constexpr std::size_t kWindowChunks = 1024;
inline constexpr std::size_t kSackWords = kWindowChunks / 64;
inline constexpr std::size_t kSackHeadBytes = 24;
inline constexpr std::size_t kMaxSackBytes = kSackHeadBytes + kSackWords * 8;

struct Sack {
  std::uint32_t transfer = 0;
  std::uint32_t cumulative = 0;
  std::uint32_t trigger = 0;           // the chunk that came last
  std::uint32_t trigger_delay_ns = 0;  // from its coming to this SACK
  std::uint8_t trigger_try = 0;        // which sending of it that was
  bool duplicate = false;              // that chunk had come before
  std::size_t words = 0;               // of the bitmap, without trailing empty ones
  std::array<std::uint64_t, kSackWords> bitmap{};
};

// Returns the bytes written. `out` has kMaxSackBytes.
std::size_t write_sack(const Sack& sack, std::span<std::byte> out) noexcept;
[[nodiscard]] ParseStatus parse_sack(std::span<const std::byte> bytes, Sack& sack) noexcept;

// What the control plane or a kOpen frame says of a transfer.
inline constexpr std::size_t kTicketBytes = 40;

struct Ticket {
  std::uint64_t size_bytes = 0;
  std::uint32_t chunk_bytes = 0;  // of every chunk but the last
  std::uint32_t after = 0;        // the transfer of this priority that was offered before it; 0: none
  std::uint64_t epoch = 0;        // of the handle behind it
  std::uint64_t tag = 0;          // what the application calls it
  std::uint8_t priority = 0;      // 0 goes first; below 128
  bool digest = false;            // chunks have one; without, they must not

  [[nodiscard]] std::uint32_t num_chunks() const noexcept {
    return chunk_bytes == 0 ? 0 : static_cast<std::uint32_t>((size_bytes + chunk_bytes - 1) / chunk_bytes);
  }
  // The bytes of one chunk, which is below num_chunks().
  [[nodiscard]] std::uint32_t bytes_of(std::uint32_t chunk) const noexcept {
    const std::uint64_t left = size_bytes - std::uint64_t{chunk} * chunk_bytes;
    return left < chunk_bytes ? static_cast<std::uint32_t>(left) : chunk_bytes;
  }
};

struct TicketLimits {
  std::uint64_t max_bytes;
  std::uint32_t max_chunk_bytes;
};

void write_ticket(const Ticket& ticket, std::span<std::byte, kTicketBytes> out) noexcept;
// kBadContent where its numbers contradict each other or the limits.
[[nodiscard]] ParseStatus parse_ticket(std::span<const std::byte> bytes, const TicketLimits& limits,
                    Ticket& ticket) noexcept;

inline constexpr std::size_t kHelloBytes = 24;

struct Hello {
  std::uint32_t max_payload_bytes = 0;
  std::uint32_t heard_incarnation = 0;  // in kHelloAck: of who is answered
  std::uint64_t token = 0;              // what the control plane gave to whom it told of this end
  bool digest = true;                   // I want one on every chunk
};

void write_hello(const Hello& hello, std::span<std::byte, kHelloBytes> out) noexcept;
[[nodiscard]] ParseStatus parse_hello(std::span<const std::byte> bytes, Hello& hello) noexcept;

enum class ResetReason : std::uint16_t {
  kNoSession = 1,
  kUnknownTransfer = 2,  // never heard of it, or so long ago that it is forgotten
  kRefused = 3,
  kCancelled = 4,
  kTimeout = 5,
  kCorrupt = 6,
};
inline constexpr std::uint16_t kLastResetReason = 6;
inline constexpr std::size_t kResetBytes = 8;

struct Reset {
  ResetReason reason = ResetReason::kNoSession;
  std::uint32_t heard_incarnation = 0;  // of who is reset: a forger who has not seen a frame does not know it
};

void write_reset(const Reset& reset, std::span<std::byte, kResetBytes> out) noexcept;
[[nodiscard]] ParseStatus parse_reset(std::span<const std::byte> bytes, Reset& reset) noexcept;

}  // namespace genie::protocol
