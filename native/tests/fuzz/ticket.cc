// Bytes to the ticket parser; what it takes is inside the limits, and what would have been written.
#include <cstdint>
#include <cstring>
#include <span>

#include "protocol/frame.h"

using namespace genie::protocol;

namespace {

void parse(std::span<const std::byte> bytes) {
  constexpr TicketLimits kLimits{.max_bytes = 1ull << 40, .max_chunk_bytes = 65000};
  Ticket ticket;
  if (parse_ticket(bytes, kLimits, ticket) != ParseStatus::kOk) return;
  if (ticket.size_bytes > kLimits.max_bytes || ticket.chunk_bytes > kLimits.max_chunk_bytes) __builtin_trap();
  const std::uint32_t chunks = ticket.num_chunks();
  if (chunks > 0 && std::uint64_t{chunks - 1} * ticket.chunk_bytes + ticket.bytes_of(chunks - 1) != ticket.size_bytes) {
    __builtin_trap();
  }
  std::array<std::byte, kTicketBytes> again;
  write_ticket(ticket, again);
  if (std::memcmp(again.data(), bytes.data(), bytes.size()) != 0) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span{data, size});
  parse(bytes);
  // And as a ticket of the right kind and length, with any numbers.
  std::array<std::byte, kTicketBytes> ticket;
  write_ticket({}, ticket);
  if (size > 0) std::memcpy(ticket.data() + 3, data, size < kTicketBytes - 3 ? size : kTicketBytes - 3);
  parse(ticket);
  return 0;
}
