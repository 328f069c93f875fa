#include "lane/progress.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <map>
#include <mutex>
#include <pthread.h>
#include <thread>

namespace genie {
namespace {

class ProgressThread {
 public:
  // Never destroyed: the thread runs until the process ends. A forked child has none, and makes its own.
  static ProgressThread& instance() {
    static std::mutex lock;
    static ProgressThread* thread = nullptr;
    const std::lock_guard hold(lock);
    if (thread == nullptr || thread->pid_ != ::getpid()) thread = new ProgressThread();
    return *thread;
  }

  void add(const std::shared_ptr<Channel>& channel) {
    const std::lock_guard hold(lock_);
    const int fd = channel->lane_fd();
    channels_[fd] = channel;
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0 && errno == EEXIST) {
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
    }
  }

  void remove(int fd) {
    const std::lock_guard hold(lock_);
    if (channels_.contains(fd)) forget(fd);
  }

 private:
  ProgressThread() : epoll_(::epoll_create1(EPOLL_CLOEXEC)), pid_(::getpid()) {
    // Signals belong to Python's main thread.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([this] { run(); }).detach();
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void run() {
    ::prctl(PR_SET_NAME, "genie-lanes");
    for (;;) {
      std::array<epoll_event, 16> events{};
      const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
      for (int i = 0; i < count; ++i) serve(events[static_cast<std::size_t>(i)].data.fd);
    }
  }

  void serve(int fd) {
    std::shared_ptr<Channel> channel;
    {
      const std::lock_guard hold(lock_);
      const auto at = channels_.find(fd);
      if (at == channels_.end()) return;         // its channel is gone, perhaps its descriptor another's
      channel = at->second.lock();
      if (channel == nullptr) return forget(fd);   // it is going, and waits for the lock before it closes
    }
    if (channel->assist()) return;
    {
      const std::lock_guard hold(lock_);
      forget(fd);
    }
    // A thread may have left something half done in between, and believes it to be looked after.
    if (channel->assist()) add(channel);
  }

  void forget(int fd) {
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    channels_.erase(fd);
  }

  Fd epoll_;
  const pid_t pid_;
  std::mutex lock_;
  std::map<int, std::weak_ptr<Channel>> channels_;
};

}  // namespace

void assist(const std::shared_ptr<Channel>& channel) { ProgressThread::instance().add(channel); }

void no_longer_assist(int lane_fd) { ProgressThread::instance().remove(lane_fd); }

}  // namespace genie
