// How two ends find each other. An address says all that the other end has to know, and how to prove that it was told:
//
//     memif|SOCKET                 a Unix socket, over which the listener says which memif it has made for who connects,
//                                  and over which the drivers of the two are joined then (memif_control.h)
//     KIND|MAC|TOKEN               the port's address and a secret that the hello must name
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <thread>

#include "dpdk/eal.h"
#include "dpdk/endpoint.h"
#include "dpdk/lane.h"
#include "lane/fork.h"
#include "lane/unix_socket.h"

namespace genie::dpdk {
namespace {

using protocol::Nanoseconds;
using protocol::Role;

constexpr std::size_t kMaxPending = 64;       // sessions that were begun and not accepted yet
constexpr std::size_t kMaxMemifName = 100;    // sun_path, less what we append
constexpr std::size_t kMaxGreeting = 4;       // each has a port already
constexpr std::size_t kMaxGreetingBytes = 256;
constexpr auto kGreetingTime = std::chrono::seconds(2);

template <typename T>
T random_number() {
  T value{};
  if (::getrandom(&value, sizeof value, 0) != sizeof value) throw LaneError("the system has no random numbers");
  return value;
}

protocol::Config config_for(const Port& port, std::uint64_t token, std::optional<bool> digest) {
  protocol::Config config;
  constexpr auto kHead = static_cast<std::uint32_t>(protocol::kHeaderBytes + protocol::kDigestBytes);
  const std::uint32_t frame = port.max_frame_bytes() - kHead;
  config.max_payload_bytes = std::min<std::uint32_t>(frame / 64 * 64, 0xFFC0);
  config.off_host = port.kind() != PortKind::kMemif;
  config.digest = digest.value_or(config.off_host);
  // What a port's rings hold, with room for what goes the other way.
  config.credit_bytes = std::max<std::uint32_t>(384 * config.max_payload_bytes, protocol::kCreditUnitBytes);
  config.ack_every_chunks = 16;
  config.token = token;
  return config;
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016lx", value);
  return text;
}

// Takes lanes as they begin; memif's, over the reception's own ports, the others' over the one port.
class Reception final : public Hub::Greeter {
 public:
  Reception(std::shared_ptr<Hub> hub, int fd, std::optional<bool> digest)
      : hub_(std::move(hub)), token_(random_number<std::uint64_t>()), fd_(fd), digest_(digest) {
    const auto lock = hub_->lock();
    hub_->listen(token_, *this);
  }
  ~Reception() override {
    if (generation_ != fork_generation()) {
      keep_for_ever(hub_);
      return;
    }
    std::list<std::unique_ptr<DpdkLane>> gone;
    {
      const auto lock = hub_->lock();
      hub_->unlisten(*this);
      gone.swap(pending_);
    }
  }

  Hub::Client* greet(const Mac& from, std::uint64_t session) noexcept override try {
    if (pending_.size() >= kMaxPending) return nullptr;
    auto lane = std::make_unique<DpdkLane>(hub_, config_for(hub_->port(), token_, digest_), Role::kWaits, session,
                                           random_number<std::uint32_t>());
    lane->attach(from);
    pending_.push_back(std::move(lane));
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof one);
    return pending_.back().get();
  } catch (...) {
    return nullptr;
  }

  std::unique_ptr<Lane> take() {
    const auto lock = hub_->lock();
    if (pending_.empty()) return nullptr;
    std::unique_ptr<Lane> lane = std::move(pending_.front());
    pending_.pop_front();
    return lane;
  }

  [[nodiscard]] std::uint64_t token() const noexcept { return token_; }
  [[nodiscard]] Hub& hub() noexcept { return *hub_; }

 private:
  const unsigned generation_ = fork_generation();
  const std::shared_ptr<Hub> hub_;
  const std::uint64_t token_;
  const int fd_;                                  // rung when a lane has begun
  const std::optional<bool> digest_;
  std::list<std::unique_ptr<DpdkLane>> pending_;  // under the hub's lock
};

class PortListener final : public Listener {
 public:
  PortListener(const PortSpec& spec, std::optional<bool> digest)
      : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), reception_(Hub::open(spec), fd_.get(), digest) {}

  [[nodiscard]] std::string address() const override {
    auto& port = const_cast<Reception&>(reception_).hub().port();
    return std::string(name_of(port.kind())) + "|" + to_string(port.mac()) + "|" + hex(reception_.token());
  }
  [[nodiscard]] int wait_fd() const noexcept override { return fd_.get(); }
  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    std::uint64_t rings = 0;
    [[maybe_unused]] const ssize_t got = ::read(fd_.get(), &rings, sizeof rings);
    std::unique_ptr<Lane> lane = reception_.take();
    // Others may have come with the same ring.
    const std::uint64_t one = 1;
    if (lane != nullptr) [[maybe_unused]] const ssize_t written = ::write(fd_.get(), &one, sizeof one);
    return lane;
  }

 private:
  Fd fd_;
  Reception reception_;
};

sockaddr_un unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= kMaxMemifName) throw LaneError("the path of a memif socket is too long: " + path);
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

void check_same_user(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != ::geteuid()) {
    throw LaneError("memif joins processes of one user, and the other end is of another");
  }
}

class MemifListener final : public Listener {
 public:
  MemifListener(const std::string& directory, std::optional<bool> digest)
      : path_(directory + "/dpdk-" + std::to_string(::getpid()) + "-" + std::to_string(counter_++)), digest_(digest) {
    struct stat facts{};
    if (::stat(directory.c_str(), &facts) != 0 || (facts.st_mode & 077) != 0 || facts.st_uid != ::geteuid()) {
      throw LaneError("memif has no checks against its peer: " + directory + " must be a directory of yours with mode 0700");
    }
    socket_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const sockaddr_un address = unix_address(path_);
    if (!socket_.valid() || ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        ::listen(socket_.get(), 16) != 0) {
      throw LaneError(error_text("listening at " + path_));
    }
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    watch(socket_.get());
  }
  ~MemifListener() override {
    if (generation_ != fork_generation()) return;
    ::unlink(path_.c_str());
  }

  [[nodiscard]] std::string address() const override { return "memif|" + path_; }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    greeting_.remove_if([now = Clock::now()](const Greeting& peer) { return now > peer.until; });
    take_new();
    for (auto at = greeting_.begin(); at != greeting_.end(); ++at) {
      Mac from{};
      const ssize_t got = ::recv(at->peer.get(), from.data(), from.size(), MSG_DONTWAIT);
      if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
      std::unique_ptr<DpdkLane> lane = std::move(at->lane);
      Fd peer = std::move(at->peer);
      greeting_.erase(at);
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.get(), nullptr);
      if (got != static_cast<ssize_t>(from.size())) throw LaneError("the other end hung up");
      const auto lock = lane->hub().lock();
      lane->attach(from);
      lane->hub().join(std::move(peer));
      return lane;
    }
    return nullptr;
  }

 private:
  // Who was told of a memif and has not said yet which address its own port has.
  struct Greeting {
    Fd peer;
    std::unique_ptr<DpdkLane> lane;
    Deadline until;
  };

  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  void take_new() {
    Fd peer = acceptor_.accept(socket_.get());
    if (!peer.valid()) return;
    if (greeting_.size() >= kMaxGreeting) throw LaneError("too many begin a memif lane at once");
    check_same_user(peer.get());
    // A memif joins two ends: each lane has one of its own, whose session both know.
    const std::string path = path_ + "." + std::to_string(served_++);
    const auto session = random_number<std::uint64_t>();
    auto hub = Hub::open({.kind = PortKind::kMemif, .where = path, .memif_server = true, .max_frame_bytes = 0});
    auto lane = std::make_unique<DpdkLane>(hub, config_for(hub->port(), session, digest_), Role::kWaits, session,
                                           random_number<std::uint32_t>());
    const std::string told = path + "|" + to_string(hub->port().mac()) + "|" + hex(session);
    if (::send(peer.get(), told.data(), told.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(told.size())) {
      throw LaneError("the other end hung up");
    }
    watch(peer.get());
    greeting_.push_back({std::move(peer), std::move(lane), Clock::now() + kGreetingTime});
  }

  static inline std::atomic<unsigned> counter_{0};
  const unsigned generation_ = fork_generation();
  const std::string path_;
  const std::optional<bool> digest_;
  unsigned served_ = 0;
  Acceptor acceptor_;
  Fd socket_, epoll_;
  std::list<Greeting> greeting_;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char c : text) {
    if (c == '|') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

Mac parse_mac(const std::string& text) {
  Mac mac{};
  if (std::sscanf(text.c_str(), "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4], &mac[5]) != 6) {
    throw LaneError("no Ethernet address: " + text);
  }
  return mac;
}

std::uint64_t parse_hex(const std::string& text) {
  if (text.size() != 16 || text.find_first_not_of("0123456789abcdef") != std::string::npos) {
    throw LaneError("no token: " + text);
  }
  return std::stoull(text, nullptr, 16);
}

std::unique_ptr<Lane> wait_until_established(std::unique_ptr<DpdkLane> lane, const Mac& peer, Deadline until) {
  {
    const auto lock = lane->hub().lock();
    lane->attach(peer);
  }
  while (Clock::now() < until) {
    {
      const auto lock = lane->hub().lock();
      lane->hub().pump();
      if (lane->session_.is_established()) return lane;
      if (lane->session_.is_closed()) break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  const bool up = lane->hub().port().is_up();
  throw LaneError(std::string("the other end does not answer on this ") + name_of(lane->hub().port().kind()) + " port" +
                  (up ? "" : ", whose link is down"));
}

std::unique_ptr<Lane> connect_memif(const std::string& path, Deadline until, std::optional<bool> digest) {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  const sockaddr_un address = unix_address(path);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    throw LaneError(error_text("connecting to " + path));
  }
  check_same_user(socket.get());
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
  const timeval patience{std::max<long>(1, left / 1000), 0};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  std::array<char, kMaxGreetingBytes> told;
  const ssize_t size = ::recv(socket.get(), told.data(), told.size(), 0);
  if (size <= 0) throw LaneError("the listener at " + path + " says nothing");
  const auto parts = split({told.data(), static_cast<std::size_t>(size)});
  if (parts.size() != 3) throw LaneError("the listener at " + path + " is none of ours");
  auto hub = Hub::open({.kind = PortKind::kMemif, .where = parts[0] + ".c", .memif_server = false, .max_frame_bytes = 0});
  const Mac& own = hub->port().mac();
  if (::send(socket.get(), own.data(), own.size(), MSG_NOSIGNAL) != 6) throw LaneError("the listener hung up");
  const std::uint64_t session = parse_hex(parts[2]);
  auto lane = std::make_unique<DpdkLane>(hub, config_for(hub->port(), session, digest), Role::kConnects, session,
                                         random_number<std::uint32_t>());
  {
    const auto lock = hub->lock();
    hub->join(std::move(socket));
  }
  return wait_until_established(std::move(lane), parse_mac(parts[1]), until);
}

}  // namespace

PortSpec parse_port(const std::string& name) {
  const std::size_t colon = name.find(':');
  const std::string kind = name.substr(0, colon);
  PortSpec spec;
  spec.where = colon == std::string::npos ? "" : name.substr(colon + 1);
  if (kind == "memif" && spec.where.empty()) {
    spec.kind = PortKind::kMemif;
  } else if (kind == "af_packet" && !spec.where.empty()) {
    spec.kind = PortKind::kAfPacket;
  } else if (kind == "af_xdp" && !spec.where.empty()) {
    spec.kind = PortKind::kAfXdp;
  } else if (kind == "pci" && !spec.where.empty()) {
    spec.kind = PortKind::kPci;
  } else {
    throw LaneError("a port is memif, af_packet:INTERFACE, af_xdp:INTERFACE or pci:ADDRESS, not '" + name + "'");
  }
  return spec;
}

std::unique_ptr<Listener> listen_dpdk(const std::string& port, const std::string& directory,
                                      std::optional<bool> digest) try {
  const PortSpec spec = parse_port(port);
  if (spec.kind == PortKind::kMemif) return std::make_unique<MemifListener>(directory, digest);
  return std::make_unique<PortListener>(spec, digest);
} catch (const DpdkError& error) {
  throw LaneError(error.what());
}

std::unique_ptr<Lane> connect_dpdk(const std::string& port, const std::string& address,
                                   std::chrono::milliseconds timeout, std::optional<bool> digest) try {
  const PortSpec spec = parse_port(port);
  const auto parts = split(address);
  if (parts[0] != name_of(spec.kind)) {
    throw LaneError("the other end has a port of the kind " + parts[0] + ", this one is " + port);
  }
  const Deadline until = Clock::now() + timeout;
  if (spec.kind == PortKind::kMemif && parts.size() == 2) return connect_memif(parts[1], until, digest);
  if (parts.size() != 3) throw LaneError("no address of a dpdk lane: " + address);
  auto hub = Hub::open(spec);
  auto lane = std::make_unique<DpdkLane>(hub, config_for(hub->port(), parse_hex(parts[2]), digest), Role::kConnects,
                                         random_number<std::uint64_t>(), random_number<std::uint32_t>());
  return wait_until_established(std::move(lane), parse_mac(parts[1]), until);
} catch (const DpdkError& error) {
  throw LaneError(error.what());
}

}  // namespace genie::dpdk
