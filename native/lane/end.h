// How a transfer can end. Every transfer that was accepted ends exactly once, in one of these ways.
#pragma once

#include <cstdint>

namespace genie {

enum class End : std::uint8_t {
  kPending = 0,    // not ended yet
  kOk = 1,         // the peer has all of it and reads the sender's memory no more
  kTimeout = 2,    // the deadline passed
  kPeerLost = 3,   // the other side is gone
  kCorrupt = 4,    // the bytes that came are not those that were sent, or the peer broke the protocol
  kCancelled = 5,  // cancel() or close() came first
  kLocal = 6,      // this side could not go on: no memory, no descriptor, no device
};

[[nodiscard]] constexpr const char* name_of(End end) noexcept {
  switch (end) {
    case End::kPending: return "PENDING";
    case End::kOk: return "OK";
    case End::kTimeout: return "TIMEOUT";
    case End::kPeerLost: return "PEER_LOST";
    case End::kCorrupt: return "CORRUPT";
    case End::kCancelled: return "CANCELLED";
    case End::kLocal: return "LOCAL";
  }
  return "UNKNOWN";
}

}  // namespace genie
