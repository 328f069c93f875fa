// The shm lane: two processes of one user on one host, payload in pages that both see.
//
// The ends meet at a Unix socket (SOCK_SEQPACKET), look at each other's user, and pass memfds and sockets to ring over it. What
// travels afterwards are records in two rings (lane/ring.h): small slices inside them, large ones by naming a slab in a
// segment of the sender's pool. The receiver reads the slab where it is and sends it back by its token.
//
//     connecting end   its segments can be mapped by nobody for writing (F_SEAL_FUTURE_WRITE)
//     accepting end    hands its slabs over: the receiver may write to what arrived
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "lane/lane.h"
#include "memory/pool.h"

namespace genie {

struct ShmOptions {
  PoolOptions pool{.keep_idle_bytes = std::size_t{128} << 20, .keep_recent = std::chrono::seconds(10)};   // `sharing` is set by which end this is
  std::size_t max_transfer_bytes = std::size_t{64} << 30;
};

[[nodiscard]] Probe probe_shm();

// `path`: of a Unix socket; the directory it is in decides who can reach it. Throws LaneError.
[[nodiscard]] std::unique_ptr<Listener> listen_shm(const std::string& path, const ShmOptions& options = {});
[[nodiscard]] std::unique_ptr<Lane> connect_shm(const std::string& path, std::chrono::milliseconds timeout,
                                                const ShmOptions& options = {});

}  // namespace genie
