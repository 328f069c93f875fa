#include "dpdk/memif_control.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "dpdk/eal.h"
#include "lane/unix_socket.h"

namespace genie::dpdk {
namespace {

// memif 2.0. A message is 128 bytes, packed, its type first. The client makes the memory and the rings in it.
enum Type : std::uint16_t { kAck = 1, kHello, kInit, kAddRegion, kAddRing, kConnect, kConnected, kDisconnect };
constexpr std::size_t kRegionIndexAt = 2, kRegionSizeAt = 4;
constexpr std::size_t kRingIndexAt = 4, kRingRegionAt = 6, kRingOffsetAt = 8, kRingLog2At = 12;
constexpr std::uint64_t kRingHeadBytes = 128, kDescriptorBytes = 16;
constexpr std::uint8_t kMaxLog2Ring = 9;                             // what port.cc asks the driver for
constexpr std::uint64_t kMaxRegionBytes = std::uint64_t{128} << 20;  // two rings of the largest frames

constexpr protocol::Nanoseconds kLookConnecting = 50 * protocol::kMicrosecond;
constexpr protocol::Nanoseconds kLookConnected = 5 * protocol::kMillisecond;   // only an end can come

template <typename T>
T read_at(std::span<const std::byte> message, std::size_t at) noexcept {
  T value{};
  std::memcpy(&value, message.data() + at, sizeof value);
  return value;
}

Fd packet_socket() { return Fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) throw DpdkError("the path of a memif socket is too long: " + path);
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

}  // namespace

MemifControl::MemifControl(bool server, std::string path) : server_(server), path_(std::move(path)) {
  if (server_) return;
  const sockaddr_un address = address_of(path_);
  listening_ = packet_socket();
  if (!listening_.valid() || ::bind(listening_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listening_.get(), 1) != 0) {
    throw DpdkError(error_text("listening for memif's driver at " + path_));
  }
}

MemifControl::~MemifControl() { ::unlink(path_.c_str()); }

void MemifControl::take_driver() {
  if (server_) {
    const sockaddr_un address = address_of(path_);
    driver_ = packet_socket();
    if (!driver_.valid() || ::connect(driver_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      throw DpdkError(error_text("connecting to memif's driver at " + path_));
    }
  } else {
    driver_.reset(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    ucred who{};
    socklen_t size = sizeof who;
    if (!driver_.valid() || ::getsockopt(driver_.get(), SOL_SOCKET, SO_PEERCRED, &who, &size) != 0 || who.pid != ::getpid()) {
      throw DpdkError("another process is at " + path_ + ", where memif's driver should be");
    }
    listening_.reset(-1);
  }
  ::unlink(path_.c_str());   // nobody else comes to the driver
}

bool MemifControl::pass(protocol::Nanoseconds now) noexcept {
  if (is_lost_ || !peer_.valid() || now < next_look_) return !is_lost_;
  next_look_ = now + (is_connected_ ? kLookConnected : kLookConnecting);
  is_lost_ = !pass(driver_.get(), peer_.get(), false) || !pass(peer_.get(), driver_.get(), true);
  return !is_lost_;
}

bool MemifControl::pass(int from, int to, bool from_peer) noexcept {
  // Once connected, drivers have no more to say but goodbye; what else a peer says is not listened to.
  if (is_connected_ && !from_peer) return true;
  for (;;) {
    std::array<std::byte, kMessageBytes> message;
    Fds fds;
    std::size_t size = 0;
    const Packet packet = receive_packet(from, message, size, fds);
    if (packet != Packet::kGot) return packet == Packet::kNothing;
    if (size != message.size() || (from_peer && (is_connected_ || !may_say(message, fds)))) return false;
    std::array<int, 2> raw{};
    std::size_t count = 0;
    for (const Fd& fd : fds) {
      if (fd.valid()) raw[count++] = fd.get();
    }
    const auto type = read_at<std::uint16_t>(message, 0);
    if (type == kDisconnect) return false;
    if (!send_packet(to, message, std::span(raw).first(count))) return false;
    if (type == kConnected) {
      is_connected_ = true;
      return true;
    }
  }
}

// What may reach the driver, which trusts what it is told of memory and rings.
bool MemifControl::may_say(std::span<const std::byte, kMessageBytes> message, const Fds& fds) noexcept {
  const auto type = read_at<std::uint16_t>(message, 0);
  if (!server_) return type == kAck || type == kHello || type == kConnected;
  switch (type) {
    case kAck:
    case kInit:
    case kConnect: return true;
    case kAddRegion: return may_add_region(message, fds[0]);
    case kAddRing: {
      const auto log2 = read_at<std::uint8_t>(message, kRingLog2At);
      if (log2 > kMaxLog2Ring || !fds[0].valid()) return false;
      const std::uint64_t end = read_at<std::uint32_t>(message, kRingOffsetAt) + kRingHeadBytes + (kDescriptorBytes << log2);
      return read_at<std::uint16_t>(message, kRingIndexAt) == 0 && read_at<std::uint16_t>(message, kRingRegionAt) == 0 &&
             end <= region_bytes_;
    }
    default: return false;
  }
}

// One region that is there as a whole, and stays: else the first touch of a ring would be a SIGBUS.
bool MemifControl::may_add_region(std::span<const std::byte, kMessageBytes> message, const Fd& memory) noexcept {
  const auto size = read_at<std::uint64_t>(message, kRegionSizeAt);
  struct stat facts{};
  if (region_bytes_ != 0 || read_at<std::uint16_t>(message, kRegionIndexAt) != 0 || size == 0 || size > kMaxRegionBytes ||
      !memory.valid() || ::fstat(memory.get(), &facts) != 0) {
    return false;
  }
  const int seals = ::fcntl(memory.get(), F_GET_SEALS);
  if (facts.st_size < static_cast<off_t>(size) || seals < 0 || (seals & F_SEAL_SHRINK) == 0) return false;
  region_bytes_ = size;
  return true;
}

}  // namespace genie::dpdk
