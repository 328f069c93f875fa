// The tcp lane: any two hosts. Scatter-gather from where the slices are, straight into where they stay.
//
// One stream; several were not tried. Not encrypted and without keys: for
// networks that are trusted, or for loopback. Acknowledgements ride on messages, and go alone before the end sleeps.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "lane/lane.h"

namespace genie {

struct TcpOptions {
  std::size_t max_transfer_bytes = std::size_t{16} << 30;   // what a peer may announce
};

[[nodiscard]] Probe probe_tcp();

// `address`: HOST:PORT or [IPV6]:PORT; port 0 lets the system choose. Throws LaneError.
[[nodiscard]] std::unique_ptr<Listener> listen_tcp(const std::string& address, const TcpOptions& options = {});
[[nodiscard]] std::unique_ptr<Lane> connect_tcp(const std::string& address, std::chrono::milliseconds timeout,
                                                const TcpOptions& options = {});

}  // namespace genie
