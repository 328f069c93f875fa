// The control channel of a memif, which the driver must not have with another process.
//
// memif's driver answers its control socket in EAL's interrupt thread, and unmaps its rings there as soon as the other
// end of that socket closes or says goodbye: under a burst that another thread has begun. So the driver's socket ends in
// this process, here. What the two drivers say to each other until they are connected is passed on over a socket between
// the processes; a death or a goodbye is not. The rings stay mapped until Port::close(), which nobody bursts beside.
//
//     driver <-socket-> MemifControl <-socket between the processes-> MemifControl <-socket-> driver
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "memory/segment.h"
#include "protocol/types.h"

namespace genie::dpdk {

class MemifControl {
 public:
  // `path`: of the driver's socket, which a server's driver listens on when its port is made and a client's connects to
  // when its port starts: so this comes before the port. Throws DpdkError.
  MemifControl(bool server, std::string path);
  ~MemifControl();
  MemifControl(const MemifControl&) = delete;
  MemifControl& operator=(const MemifControl&) = delete;

  // After the port has started. Throws DpdkError.
  void take_driver();
  // Over which socket (SOCK_SEQPACKET) the other process is reached.
  void join(Fd peer) noexcept { peer_ = std::move(peer); }
  // Passes on what has come. False once the other process has ended, or has said what it may not.
  [[nodiscard]] bool pass(protocol::Nanoseconds now) noexcept;

 private:
  static constexpr std::size_t kMessageBytes = 128;
  using Fds = std::array<Fd, 2>;

  [[nodiscard]] bool pass(int from, int to, bool from_peer) noexcept;
  [[nodiscard]] bool may_say(std::span<const std::byte, kMessageBytes> message, const Fds& fds) noexcept;
  [[nodiscard]] bool may_add_region(std::span<const std::byte, kMessageBytes> message, const Fd& memory) noexcept;

  const bool server_;
  const std::string path_;
  Fd listening_, driver_, peer_;
  std::uint64_t region_bytes_ = 0;
  bool is_connected_ = false;
  bool is_lost_ = false;
  protocol::Nanoseconds next_look_ = 0;
};

}  // namespace genie::dpdk
