#include "lane/shm.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <list>
#include <utility>

#include "lane/shm_lane.h"
#include "lane/unix_socket.h"

namespace genie {
namespace {

constexpr std::size_t kMaxPendingPeers = 64;
constexpr auto kHandshakeTime = std::chrono::seconds(5);

// "@name" is an abstract one: it has no file, and nothing of it is left when its process ends.
struct Address {
  sockaddr_un name{};
  socklen_t size = 0;

  [[nodiscard]] const sockaddr* generic() const noexcept { return reinterpret_cast<const sockaddr*>(&name); }
};

Address address_of(const std::string& path) {
  Address address;
  address.name.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.name.sun_path) throw LaneError("the path of a Unix socket is too long: " + path);
  std::memcpy(address.name.sun_path, path.c_str(), path.size() + 1);
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  if (path.starts_with('@')) {
    address.name.sun_path[0] = '\0';
  } else {
    ++address.size;   // with its end
  }
  return address;
}

class ShmListener final : public Listener {
 public:
  ShmListener(std::string path, const ShmOptions& options) : path_(std::move(path)), options_(options) {
    socket_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const Address address = address_of(path_);
    if (!socket_.valid()) throw LaneError(error_text("making a Unix socket"));
    if (!bind_to(address)) throw LaneError(error_text("binding " + path_));
    // Before listen(): until then nobody can connect.
    if ((!is_abstract() && ::chmod(path_.c_str(), S_IRUSR | S_IWUSR) != 0) || ::listen(socket_.get(), 64) != 0) {
      throw LaneError(error_text("listening at " + path_));
    }
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    watch(socket_.get());
  }

  ~ShmListener() override {
    if (!is_abstract() && ::getpid() == pid_) ::unlink(path_.c_str());   // a forked child leaves it to its parent
  }

  [[nodiscard]] std::string address() const override { return path_; }
  [[nodiscard]] int wait_fd() const noexcept override { return epoll_.get(); }

  [[nodiscard]] std::unique_ptr<Lane> accept() override {
    const auto now = Clock::now();
    greeting_.remove_if([now](const Greeting& peer) { return now > peer.until; });
    take_new();
    for (auto at = greeting_.begin(); at != greeting_.end(); ++at) {
      std::unique_ptr<shm::ShmLane>& lane = at->lane;
      try {
        if (lane->receive_hello()) {
          lane->send_hello();
          ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, lane->socket(), nullptr);
          std::unique_ptr<Lane> done = std::move(lane);
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
    std::unique_ptr<shm::ShmLane> lane;
    Deadline until;
  };

  [[nodiscard]] bool is_abstract() const noexcept { return path_.starts_with('@'); }

  // The file that a killed worker has left is removed, if nobody listens there.
  [[nodiscard]] bool bind_to(const Address& address) {
    if (::bind(socket_.get(), address.generic(), address.size) == 0) return true;
    if (errno != EADDRINUSE || is_abstract()) return false;
    const Fd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (::connect(probe.get(), address.generic(), address.size) == 0 || errno != ECONNREFUSED) {
      errno = EADDRINUSE;
      return false;
    }
    ::unlink(path_.c_str());
    return ::bind(socket_.get(), address.generic(), address.size) == 0;
  }

  void watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a descriptor"));
  }

  void take_new() {
    for (;;) {
      Fd fd = acceptor_.accept(socket_.get());
      if (!fd.valid()) return;
      if (greeting_.size() >= kMaxPendingPeers) continue;
      check_peer(fd.get());
      auto lane = std::make_unique<shm::ShmLane>(std::move(fd), false, options_);
      watch(lane->socket());
      greeting_.push_back({std::move(lane), Clock::now() + kHandshakeTime});
    }
  }

  const std::string path_;
  const ShmOptions options_;
  const pid_t pid_ = ::getpid();
  Acceptor acceptor_;
  Fd socket_;
  Fd epoll_;
  std::list<Greeting> greeting_;
};

}  // namespace

Probe probe_shm() {
  std::string error;
  const auto segment = Segment::make(kRingSegmentBytes, Segment::Sharing::kSharedOneWay, false, error);
  if (segment == nullptr) return {false, "no sealed shared memory: " + error};
  const int seals = ::fcntl(segment->fd(), F_GET_SEALS);
  if ((seals & F_SEAL_SHRINK) == 0) return {false, "this kernel does not seal shared memory"};
  return {true, "memfd with seals, between processes of one user on this host"};
}

std::unique_ptr<Listener> listen_shm(const std::string& path, const ShmOptions& options) {
  return std::make_unique<ShmListener>(path, options);
}

std::unique_ptr<Lane> connect_shm(const std::string& path, std::chrono::milliseconds timeout,
                                  const ShmOptions& options) {
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const Address address = address_of(path);
  if (!fd.valid()) throw LaneError(error_text("making a Unix socket"));
  if (::connect(fd.get(), address.generic(), address.size) != 0) {
    throw LaneError(error_text("connecting to " + path));
  }
  check_peer(fd.get());
  auto lane = std::make_unique<shm::ShmLane>(std::move(fd), true, options);
  lane->send_hello();
  const Deadline until = Clock::now() + timeout;
  while (!lane->receive_hello()) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    if (left <= 0) throw LaneError("the other end at " + path + " did not say hello in time");
    pollfd waiting{lane->socket(), POLLIN, 0};
    ::poll(&waiting, 1, static_cast<int>(std::min<long>(left, 1000)));
  }
  return lane;
}

}  // namespace genie
