#include "lane/unix_socket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "lane/lane.h"

namespace genie {

std::string error_text(const std::string& what) { return what + ": " + std::strerror(errno); }

bool send_packet(int socket, std::span<const std::byte> body, std::span<const int> fds) noexcept {
  iovec part{const_cast<std::byte*>(body.data()), body.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(2 * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(head), fds.data(), fds.size_bytes());
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(body.size());
}

Packet receive_packet(int socket, std::span<std::byte> body, std::size_t& body_bytes,
                      std::array<Fd, 2>& fds) noexcept {
  iovec part{body.data(), body.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(2 * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got = 0;
  do {
    got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? Packet::kNothing : Packet::kEnd;
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof fd);
      if (i < fds.size()) {
        fds[i].reset(fd);
      } else {
        ::close(fd);
      }
    }
  }
  if (got == 0 || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) return Packet::kEnd;
  body_bytes = static_cast<std::size_t>(got);
  return Packet::kGot;
}

Acceptor::Acceptor() : spare_(::open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

Fd Acceptor::accept(int socket) {
  Fd fd(::accept4(socket, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (fd.valid() || (errno != EMFILE && errno != ENFILE)) return fd;
  const std::string why = error_text("accepting a connection");
  spare_.reset(-1);
  fd.reset(::accept4(socket, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  fd.reset(-1);
  spare_.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  throw LaneError(why + "; it was turned away (raise `ulimit -n`)");
}

void check_peer(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    throw LaneError(error_text("asking who the other end is"));
  }
  if (peer.uid != ::getuid() && peer.uid != 0) {
    throw LaneError("the other end is a process of user " + std::to_string(peer.uid) + ", not of " +
                    std::to_string(::getuid()));
  }
}

}  // namespace genie
