#include "dpdk/port.h"

#include <rte_dev.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "dpdk/eal.h"

namespace genie::dpdk {
namespace {

constexpr std::uint32_t kMemifFrameBytes = 16384 - 64;
constexpr std::uint32_t kAfPacketFrameSize = 16384, kAfPacketBlockSize = 65536, kAfPacketFrames = 512;
constexpr std::uint32_t kMaxAfXdpMtu = 3542;          // one page less headroom: larger frames do not come through
// What a page holds beside headroom (256 + 64), the mbuf's and the pool's headers, and the tail room that newer kernels
// keep: on 6.18, frames of 3202 bytes with their Ethernet header come through, those of 3394 vanish without a word.
constexpr std::uint32_t kMaxAfXdpFrameBytes = 3200;
constexpr std::uint32_t kGatherFromBytes = 1024;      // below, copying costs less than a second mbuf
constexpr std::uint32_t kMaxExternalBytes = 0xFFFF;   // rte_pktmbuf_attach_extbuf() counts in 16 bits
constexpr std::uint16_t kDescriptors = 512;
constexpr unsigned kPoolFrames = 1536;
constexpr unsigned kAfXdpPoolFrames = 4096;           // it takes 2048 to itself, for what may come
constexpr unsigned kPoolHeads = 1024, kPoolCache = 64;

std::atomic<unsigned> next_number{0};

std::uint32_t mtu_of(const std::string& interface) {
  // Of this thread's network namespace; /sys shows that of whoever mounted it.
  const int socket = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  ifreq request{};
  interface.copy(request.ifr_name, sizeof request.ifr_name - 1);
  const bool found = socket >= 0 && interface.size() < sizeof request.ifr_name && ::ioctl(socket, SIOCGIFMTU, &request) == 0;
  if (socket >= 0) ::close(socket);
  if (!found) throw DpdkError("there is no network interface '" + interface + "' here");
  return static_cast<std::uint32_t>(request.ifr_mtu);
}

// memif's driver answers its control channel in EAL's interrupt thread, and may be about to free what a close frees too
// (one that comes while the ends are being joined): there, one comes after the other.
void close_in_interrupt_thread(std::uint16_t id) noexcept {
  const auto close = [](void* which) {
    rte_eth_dev_stop(*static_cast<std::uint16_t*>(which));
    rte_eth_dev_close(*static_cast<std::uint16_t*>(which));
  };
  if (!in_interrupt_thread(close, &id)) close(&id);
}

void let_go(void*, void*) {}  // the memory belongs to the transfer; see NOTES.md

}  // namespace

std::string to_string(const Mac& mac) {
  char text[18];
  std::snprintf(text, sizeof text, "%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
  return text;
}

const char* name_of(PortKind kind) noexcept {
  switch (kind) {
    case PortKind::kMemif: return "memif";
    case PortKind::kAfPacket: return "af_packet";
    case PortKind::kAfXdp: return "af_xdp";
    case PortKind::kPci: return "pci";
  }
  return "?";
}

Port::Port(const PortSpec& spec) : kind_(spec.kind) {
  const std::string number = std::to_string(next_number++);
  std::string arguments;
  std::uint32_t most = 0;
  switch (kind_) {
    case PortKind::kMemif: {
      most = kMemifFrameBytes;
      control_ = std::make_unique<MemifControl>(spec.memif_server, spec.where);
      device_ = "net_memif" + number;
      const std::uint32_t wanted = spec.max_frame_bytes == 0 ? most : spec.max_frame_bytes;
      if (wanted > 60000) throw DpdkError("memif frames are at most 60000 bytes, not " + std::to_string(wanted));
      most = std::max(most, wanted);
      // A buffer holds the largest frame: with chained ones of mixed sizes, 22.11 corrupts when its ring wraps.
      const std::uint32_t buffer = (std::max(most, wanted) + 64 + 1023) / 1024 * 1024;
      arguments = std::string("role=") + (spec.memif_server ? "server" : "client") + ",socket=" + spec.where +
                  ",socket-abstract=no,id=0,rsize=9,bsize=" + std::to_string(buffer);
      break;
    }
    case PortKind::kAfPacket:
      most = std::min(mtu_of(spec.where), kAfPacketFrameSize - 512);
      device_ = "net_af_packet" + number;
      arguments = "iface=" + spec.where + ",qpairs=1,blocksz=" + std::to_string(kAfPacketBlockSize) +
                  ",framesz=" + std::to_string(kAfPacketFrameSize) + ",framecnt=" + std::to_string(kAfPacketFrames);
      break;
    case PortKind::kAfXdp:
      most = mtu_of(spec.where);
      if (most > kMaxAfXdpMtu) {
        throw DpdkError("af_xdp frames fit a page: the MTU of '" + spec.where + "' is " + std::to_string(most) +
                        ", at most " + std::to_string(kMaxAfXdpMtu) + " (ip link set " + spec.where + " mtu 3498)");
      }
      most = std::min(most, kMaxAfXdpFrameBytes);
      device_ = "net_af_xdp" + number;
      arguments = "iface=" + spec.where + ",start_queue=0,queue_count=1";
      break;
    case PortKind::kPci:
      device_ = spec.where;
      break;
  }
  if (kind_ != PortKind::kPci && rte_eal_hotplug_add("vdev", device_.c_str(), arguments.c_str()) != 0) {
    throw DpdkError(std::string("no ") + name_of(kind_) + " port on '" + spec.where + "': " + rte_strerror(rte_errno));
  }
  try {
    if (rte_eth_dev_get_port_by_name(device_.c_str(), &id_) != 0) {
      throw DpdkError("DPDK has no port '" + device_ + "' (is a driver bound to it? dpdk-devbind.py -s)");
    }
    if (kind_ == PortKind::kPci) {
      std::uint16_t mtu = 0;
      if (rte_eth_dev_get_mtu(id_, &mtu) != 0) mtu = 1500;
      most = mtu;
    }
    max_frame_bytes_ = spec.max_frame_bytes == 0 ? most : std::min(most, spec.max_frame_bytes);
    // Both copy on transmit. af_xdp sends only the first segment of a chain and says nothing; a NIC would read
    // memory that is not mapped for it.
    gathers_ = kind_ == PortKind::kMemif || kind_ == PortKind::kAfPacket;
    create_pools(number);
    start();
    if (control_ != nullptr) control_->take_driver();
  } catch (...) {
    remove();
    throw;
  }
}

void Port::create_pools(const std::string& name) {
  std::uint32_t room = max_frame_bytes_ + 128;
  if (kind_ == PortKind::kAfXdp) room = 3584;                        // frames stand in the pool itself, each in one page
  if (kind_ == PortKind::kAfPacket) room = kAfPacketFrameSize + 128; // it wants room for its largest frame
  const unsigned frames = kind_ == PortKind::kAfXdp ? kAfXdpPoolFrames : kPoolFrames;
  pool_ = rte_pktmbuf_pool_create(("genie_frames" + name).c_str(), frames, kPoolCache, 0,
                                  static_cast<std::uint16_t>(RTE_PKTMBUF_HEADROOM + room), SOCKET_ID_ANY);
  heads_ = rte_pktmbuf_pool_create(("genie_heads" + name).c_str(), kPoolHeads, kPoolCache, 0,
                                   RTE_PKTMBUF_HEADROOM + 256, SOCKET_ID_ANY);
  if (pool_ == nullptr || heads_ == nullptr) {
    throw DpdkError("no memory for the packets of a port: " + std::to_string(frames) + " of " + std::to_string(room) +
                    " bytes (" + rte_strerror(rte_errno) + "); start DPDK with more, memory_mb");
  }
}

void Port::start() {
  rte_eth_conf config{};
  rte_eth_dev_info info{};
  int status = rte_eth_dev_info_get(id_, &info);
  if (status == 0) status = rte_eth_dev_configure(id_, 1, 1, &config);
  if (status == 0) status = rte_eth_rx_queue_setup(id_, 0, kDescriptors, SOCKET_ID_ANY, nullptr, pool_);
  if (status == 0) status = rte_eth_tx_queue_setup(id_, 0, kDescriptors, SOCKET_ID_ANY, nullptr);
  if (status == 0) status = rte_eth_dev_start(id_);
  if (status != 0) throw DpdkError("port " + device_ + " does not start: " + rte_strerror(-status));
  rte_ether_addr address{};
  if (rte_eth_macaddr_get(id_, &address) != 0) throw DpdkError("port " + device_ + " has no address");
  std::copy(std::begin(address.addr_bytes), std::end(address.addr_bytes), mac_.begin());
}

Port::~Port() { close(); }

void Port::close() noexcept {
  if (pool_ == nullptr && heads_ == nullptr) return;
  flush();
  remove();
}

void Port::remove() noexcept {
  std::uint16_t id = 0;
  if (rte_eth_dev_get_port_by_name(device_.c_str(), &id) == 0) {
    if (kind_ == PortKind::kMemif) {
      close_in_interrupt_thread(id);
    } else {
      rte_eth_dev_stop(id);
      rte_eth_dev_close(id);
    }
    if (kind_ != PortKind::kPci) rte_eal_hotplug_remove("vdev", device_.c_str());
  }
  rte_mempool_free(pool_);
  rte_mempool_free(heads_);
  pool_ = heads_ = nullptr;
}

bool Port::is_up() const noexcept {
  rte_eth_link link{};
  return rte_eth_link_get_nowait(id_, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}

void Port::write_ethernet(std::byte* at, const Mac& to) const noexcept {
  std::memcpy(at, to.data(), 6);
  std::memcpy(at + 6, mac_.data(), 6);
  at[12] = static_cast<std::byte>(kEtherType >> 8);
  at[13] = static_cast<std::byte>(kEtherType & 0xFF);
}

bool Port::send(const Mac& to, const protocol::OutgoingFrame& frame) noexcept {
  rte_mbuf* mbuf = nullptr;
  if (gathers_ && frame.payload_bytes >= kGatherFromBytes) mbuf = gather(to, frame);
  if (mbuf == nullptr) mbuf = linearise(to, frame);
  if (mbuf == nullptr) {
    ++stats_.no_buffer;
    return false;
  }
  pending_[num_pending_++] = mbuf;
  return true;
}

// The head in an mbuf of its own, the payload as an external buffer behind it. Null where it is not in one piece.
rte_mbuf* Port::gather(const Mac& to, const protocol::OutgoingFrame& frame) noexcept {
  std::byte* payload = nullptr;
  std::size_t pieces = 0;
  frame.source->each(frame.source_offset, frame.payload_bytes, [&](const std::byte* data, std::size_t) {
    payload = const_cast<std::byte*>(data);  // drivers that gather only read it
    ++pieces;
  });
  if (pieces != 1 || frame.payload_bytes > kMaxExternalBytes) return nullptr;
  rte_mbuf* both[2];
  if (rte_pktmbuf_alloc_bulk(heads_, both, 2) != 0) return nullptr;
  rte_mbuf* head = both[0];
  rte_mbuf* tail = both[1];
  auto* at = reinterpret_cast<std::byte*>(rte_pktmbuf_append(head, static_cast<std::uint16_t>(kEthernetBytes + frame.head_bytes)));
  if (at == nullptr) {
    rte_pktmbuf_free_bulk(both, 2);
    return nullptr;
  }
  write_ethernet(at, to);
  std::memcpy(at + kEthernetBytes, frame.head.data(), frame.head_bytes);
  // Its own buffer, which is not used while another one is attached, holds the count of owners.
  auto* shared = new (rte_mbuf_to_baddr(tail)) rte_mbuf_ext_shared_info{};
  shared->free_cb = let_go;
  rte_mbuf_ext_refcnt_set(shared, 1);
  rte_pktmbuf_attach_extbuf(tail, payload, RTE_BAD_IOVA, static_cast<std::uint16_t>(frame.payload_bytes), shared);
  tail->data_off = 0;
  tail->data_len = static_cast<std::uint16_t>(frame.payload_bytes);
  tail->pkt_len = frame.payload_bytes;
  if (rte_pktmbuf_chain(head, tail) != 0) {
    rte_pktmbuf_free(head);
    rte_pktmbuf_free(tail);
    return nullptr;
  }
  ++stats_.gathered;
  return head;
}

rte_mbuf* Port::linearise(const Mac& to, const protocol::OutgoingFrame& frame) noexcept {
  rte_mbuf* mbuf = rte_pktmbuf_alloc(pool_);
  if (mbuf == nullptr) return nullptr;
  const std::size_t size = kEthernetBytes + frame.size_bytes();
  auto* at = size > 0xFFFF ? nullptr
                           : reinterpret_cast<std::byte*>(rte_pktmbuf_append(mbuf, static_cast<std::uint16_t>(size)));
  if (at == nullptr) {
    rte_pktmbuf_free(mbuf);
    return nullptr;
  }
  write_ethernet(at, to);
  frame.copy_to(at + kEthernetBytes);
  ++stats_.linearised;
  return mbuf;
}

std::size_t Port::flush() noexcept {
  if (num_pending_ == 0) return 0;
  const auto count = static_cast<std::uint16_t>(num_pending_);
  std::uint16_t sent = rte_eth_tx_burst(id_, 0, pending_.data(), count);
  // A ring that is full may only need its other end to be looked at.
  for (int tries = 0; sent < count && tries < 4; ++tries) {
    sent = static_cast<std::uint16_t>(sent + rte_eth_tx_burst(id_, 0, pending_.data() + sent, static_cast<std::uint16_t>(count - sent)));
  }
  for (std::uint16_t i = sent; i < count; ++i) rte_pktmbuf_free(pending_[i]);
  stats_.frames_out += sent;
  stats_.not_taken += count - sent;
  num_pending_ = 0;
  return sent;
}

std::size_t Port::receive_burst(std::span<rte_mbuf*> frames) noexcept {
  return rte_eth_rx_burst(id_, 0, frames.data(), static_cast<std::uint16_t>(frames.size()));
}

std::span<const std::byte> Port::open(rte_mbuf* frame, Mac& from) noexcept {
  ++stats_.frames_in;
  const auto* bytes = rte_pktmbuf_mtod(frame, const std::byte*);
  const bool ours = frame->nb_segs == 1 && frame->data_len > kEthernetBytes &&
                    bytes[12] == static_cast<std::byte>(kEtherType >> 8) &&
                    bytes[13] == static_cast<std::byte>(kEtherType & 0xFF) && std::memcmp(bytes, mac_.data(), 6) == 0;
  if (!ours) {
    ++stats_.foreign_frames;
    return {};
  }
  std::memcpy(from.data(), bytes + 6, 6);
  return {bytes + kEthernetBytes, frame->data_len - kEthernetBytes};
}

void Port::release(std::span<rte_mbuf*> frames) noexcept {
  rte_pktmbuf_free_bulk(frames.data(), static_cast<unsigned>(frames.size()));
}

}  // namespace genie::dpdk
