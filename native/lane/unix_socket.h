// Packets with descriptors over a Unix socket; what listeners of stream and packet sockets share.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>

#include "memory/segment.h"

namespace genie {

enum class Packet { kGot, kNothing, kEnd };

// False where the peer is gone or takes nothing now (errno says which).
[[nodiscard]] bool send_packet(int socket, std::span<const std::byte> body, std::span<const int> fds) noexcept;

// One packet; more descriptors than there is room for are closed, and a cut packet counts as kEnd.
[[nodiscard]] Packet receive_packet(int socket, std::span<std::byte> body, std::size_t& body_bytes,
                                    std::array<Fd, 2>& fds) noexcept;

// Throws LaneError unless the process at the other end runs as our user, or as root.
void check_peer(int socket);

// Accepts for a listener. Where the process has no descriptor left, one that is kept for this takes the connection off
// the queue and closes it: else the listener would stay readable, and its loop would spin.
class Acceptor {
 public:
  Acceptor();
  // An invalid one where nobody has come. Throws LaneError for a connection that was turned away.
  [[nodiscard]] Fd accept(int socket);

 private:
  Fd spare_;
};

[[nodiscard]] std::string error_text(const std::string& what);

}  // namespace genie
