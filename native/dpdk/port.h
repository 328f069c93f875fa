// An Ethernet port of DPDK: one queue each way, frames of our own EtherType.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "dpdk/memif_control.h"
#include "protocol/types.h"

struct rte_mbuf;
struct rte_mempool;

namespace genie::dpdk {

using Mac = std::array<std::uint8_t, 6>;
[[nodiscard]] std::string to_string(const Mac& mac);

enum class PortKind { kMemif, kAfPacket, kAfXdp, kPci };
[[nodiscard]] const char* name_of(PortKind kind) noexcept;

struct PortSpec {
  PortKind kind = PortKind::kMemif;
  std::string where;                    // memif: path of its driver's socket; af_packet, af_xdp: interface; pci: address
  bool memif_server = false;
  std::uint32_t max_frame_bytes = 0;    // 0: what the kind and the MTU of the interface allow
};

struct PortStats {
  std::uint64_t frames_in = 0, frames_out = 0;
  std::uint64_t foreign_frames = 0;        // of other EtherTypes: the kernel's own traffic
  std::uint64_t not_taken = 0;             // frames that the driver had no room for: they are sent later
  std::uint64_t no_buffer = 0;             // frames for which there was no mbuf: the same
  std::uint64_t linearised = 0, gathered = 0;
};

class Port {
 public:
  // Throws DpdkError.
  explicit Port(const PortSpec& spec);
  ~Port();
  Port(const Port&) = delete;
  Port& operator=(const Port&) = delete;

  [[nodiscard]] PortKind kind() const noexcept { return kind_; }
  [[nodiscard]] const Mac& mac() const noexcept { return mac_; }
  // Of a protocol frame, Ethernet header not counted.
  [[nodiscard]] std::uint32_t max_frame_bytes() const noexcept { return max_frame_bytes_; }
  [[nodiscard]] bool is_up() const noexcept;
  // memif alone: the socket to the process at the other end. False from has_peer() once that has ended; as long as frames
  // that it had sent still come, it is good to take them.
  void join(Fd peer) noexcept { control_->join(std::move(peer)); }
  [[nodiscard]] bool has_peer(protocol::Nanoseconds now) noexcept { return control_ == nullptr || control_->pass(now); }
  // No other function may be called after this one.
  void close() noexcept;

  // Queues a frame, of which there may be kBurst. False where there is no buffer for it.
  [[nodiscard]] bool send(const Mac& to, const protocol::OutgoingFrame& frame) noexcept;
  // Hands what is queued to the driver; returns how many of them, from the first on, it has taken. The others are
  // forgotten. No driver reads the source of any frame afterwards.
  std::size_t flush() noexcept;

  // Calls take(from, bytes) for each frame of ours that has come; returns how many came of any kind.
  template <typename Take>
  std::size_t receive(Take&& take) noexcept {
    std::array<rte_mbuf*, kBurst> frames;
    const std::size_t count = receive_burst(frames);
    for (std::size_t i = 0; i < count; ++i) {
      Mac from;
      const std::span<const std::byte> bytes = open(frames[i], from);
      if (!bytes.empty()) take(from, bytes);
    }
    release(std::span{frames}.first(count));
    return count;
  }

  [[nodiscard]] const PortStats& stats() const noexcept { return stats_; }

  static constexpr std::size_t kBurst = 32;
  static constexpr std::size_t kEthernetBytes = 14;
  static constexpr std::uint16_t kEtherType = 0x88B5;  // IEEE 802: for local experiments

 private:
  void create_pools(const std::string& name);
  void start();
  void remove() noexcept;
  [[nodiscard]] rte_mbuf* gather(const Mac& to, const protocol::OutgoingFrame& frame) noexcept;
  [[nodiscard]] rte_mbuf* linearise(const Mac& to, const protocol::OutgoingFrame& frame) noexcept;
  void write_ethernet(std::byte* at, const Mac& to) const noexcept;
  [[nodiscard]] std::size_t receive_burst(std::span<rte_mbuf*> frames) noexcept;
  [[nodiscard]] std::span<const std::byte> open(rte_mbuf* frame, Mac& from) noexcept;
  void release(std::span<rte_mbuf*> frames) noexcept;

  PortKind kind_;
  std::unique_ptr<MemifControl> control_;   // memif
  std::string device_;
  std::uint16_t id_ = 0;
  Mac mac_{};
  std::uint32_t max_frame_bytes_ = 0;
  bool gathers_ = false;
  rte_mempool* pool_ = nullptr;    // whole frames
  rte_mempool* heads_ = nullptr;   // heads, and what external buffers hang on
  std::array<rte_mbuf*, kBurst> pending_{};
  std::size_t num_pending_ = 0;
  PortStats stats_;
};

}  // namespace genie::dpdk
