#include "lane/tcp.h"

#include <netdb.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <list>
#include <utility>

#include "lane/tcp_lane.h"
#include "lane/unix_socket.h"

namespace genie {
namespace {

constexpr std::size_t kMaxPendingPeers = 64;
constexpr auto kHandshakeTime = std::chrono::seconds(5);

struct AddressList {
  explicit AddressList(const std::string& address, bool passive) {
    const std::size_t colon = address.rfind(':');
    if (colon == std::string::npos) throw LaneError("an address is HOST:PORT, not " + address);
    std::string host = address.substr(0, colon);
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = passive ? AI_PASSIVE : 0;
    const int failed = ::getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &first);
    if (failed != 0) throw LaneError(address + ": " + ::gai_strerror(failed));
  }
  AddressList(const AddressList&) = delete;
  AddressList& operator=(const AddressList&) = delete;
  ~AddressList() { ::freeaddrinfo(first); }

  addrinfo* first = nullptr;
};

class TcpListener final : public Listener {
 public:
  TcpListener(const std::string& address, const TcpOptions& options) : options_(options) {
    const AddressList found(address, true);
    socket_.reset(::socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int one = 1;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (::bind(socket_.get(), found.first->ai_addr, found.first->ai_addrlen) != 0 || ::listen(socket_.get(), 64) != 0) {
      throw LaneError(error_text("listening at " + address));
    }
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    watch(socket_.get());
  }

  [[nodiscard]] std::string address() const override {
    sockaddr_storage name{};
    socklen_t size = sizeof name;
    std::array<char, NI_MAXHOST> host{};
    std::array<char, NI_MAXSERV> port{};
    if (::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&name), &size) != 0 ||
        ::getnameinfo(reinterpret_cast<sockaddr*>(&name), size, host.data(), host.size(), port.data(), port.size(),
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
      throw LaneError(error_text("asking for the own address"));
    }
    const std::string text = host.data();
    return (text.find(':') == std::string::npos ? text : "[" + text + "]") + ":" + port.data();
  }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    const auto now = Clock::now();
    greeting_.remove_if([now](const Greeting& peer) { return now > peer.until; });
    for (;;) {
      Fd fd = acceptor_.accept(socket_.get());
      if (!fd.valid()) break;
      if (greeting_.size() >= kMaxPendingPeers) continue;
      auto lane = std::make_unique<tcp::TcpLane>(std::move(fd), options_);
      watch(lane->socket());
      greeting_.push_back({std::move(lane), Clock::now() + kHandshakeTime});
    }
    for (auto at = greeting_.begin(); at != greeting_.end(); ++at) {
      try {
        if (at->lane->receive_hello()) {
          at->lane->send_hello();
          ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->lane->socket(), nullptr);
          std::unique_ptr<Lane> done = std::move(at->lane);
          greeting_.erase(at);
          return done;
        }
      } catch (const LaneError&) {
        greeting_.erase(at);
        throw;
      }
    }
    return nullptr;
  }

 private:
  struct Greeting {
    std::unique_ptr<tcp::TcpLane> lane;
    Deadline until;
  };

  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  const TcpOptions options_;
  Acceptor acceptor_;
  Fd socket_;
  Fd epoll_;
  std::list<Greeting> greeting_;
};

[[nodiscard]] int milliseconds_until(Deadline until) noexcept {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<long>(left, 0, 60'000));
}

}  // namespace

Probe probe_tcp() { return {true, "sockets of the operating system; not encrypted"}; }

std::unique_ptr<Listener> listen_tcp(const std::string& address, const TcpOptions& options) {
  return std::make_unique<TcpListener>(address, options);
}

std::unique_ptr<Lane> connect_tcp(const std::string& address, std::chrono::milliseconds timeout,
                                  const TcpOptions& options) {
  const AddressList found(address, false);
  const Deadline until = Clock::now() + timeout;
  Fd fd(::socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) throw LaneError(error_text("making a socket"));
  if (::connect(fd.get(), found.first->ai_addr, found.first->ai_addrlen) != 0) {
    if (errno != EINPROGRESS) throw LaneError(error_text("connecting to " + address));
    pollfd waiting{fd.get(), POLLOUT, 0};
    int failed = 0;
    socklen_t size = sizeof failed;
    if (::poll(&waiting, 1, milliseconds_until(until)) <= 0) throw LaneError("connecting to " + address + " takes too long");
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &failed, &size) != 0 || failed != 0) {
      errno = failed;
      throw LaneError(error_text("connecting to " + address));
    }
  }
  auto lane = std::make_unique<tcp::TcpLane>(std::move(fd), options);
  lane->send_hello();
  while (!lane->receive_hello()) {
    if (Clock::now() >= until) throw LaneError("the other end at " + address + " did not say hello in time");
    pollfd waiting{lane->socket(), POLLIN, 0};
    ::poll(&waiting, 1, std::min(milliseconds_until(until), 1000));
  }
  return lane;
}

}  // namespace genie
