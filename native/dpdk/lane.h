// The dpdk lane: the message protocol (protocol/) over a port of DPDK, behind the contract of lane/lane.h.
//
// Ports are named "memif", "af_packet:INTERFACE", "af_xdp:INTERFACE" and "pci:ADDRESS". Both ends use the same kind. memif joins
// two processes of one user on one host, and has no checks against a hostile peer: who connects is asked for its user
// id by the kernel. The others reach every host of an Ethernet segment; who connects must know the token in the
// listener's address, which the control plane tells it.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "dpdk/port.h"
#include "lane/lane.h"

namespace genie::dpdk {

// Throws LaneError where `name` names no port.
[[nodiscard]] PortSpec parse_port(const std::string& name);

// `directory`: where memif's sockets go; only the user may enter it.
// `digest`: on every chunk that comes here, whatever a transfer asks for; by default where the port leaves the host.
[[nodiscard]] std::unique_ptr<Listener> listen_dpdk(const std::string& port, const std::string& directory,
                                                    std::optional<bool> digest = {});
// `port`: of this end; `address`: what the listener said. Throws LaneError.
[[nodiscard]] std::unique_ptr<Lane> connect_dpdk(const std::string& port, const std::string& address,
                                                 std::chrono::milliseconds timeout,
                                                 std::optional<bool> digest = {});

}  // namespace genie::dpdk
