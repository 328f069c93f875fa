#include "lane/channel.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "lane/bundle.h"
#include "lane/progress.h"
#include "lane/unix_socket.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genie {
namespace {

// In the epoch of a message whose slices are bundled.
constexpr std::uint64_t kBundled = std::uint64_t{1} << 63;
// Who is woken and finds nothing was rung for by an end that copies what it is about to send (shm_send.cc).
constexpr auto kRungEarly = std::chrono::microseconds(100);
// After a copy of so many bytes into the lane, its sender waits awake for an answer for as long as it may have taken.
constexpr std::size_t kCopiedBytes = 256U << 10;
constexpr std::size_t kBytesPerMicrosecond = 20'000;
constexpr auto kLongestWait = std::chrono::microseconds(200);
constexpr auto kToldWhy = std::chrono::milliseconds(100);   // who polls in another thread is told first

void breathe() noexcept {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

Channel::Channel(std::unique_ptr<Lane> lane)
    : lane_(std::move(lane)),
      bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  for (const int fd : {bell_.get(), lane_->wait_fd()}) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw LaneError(error_text("watching a lane"));
  }
}

Channel::~Channel() {
  if (was_assisted_ && !is_inherited()) no_longer_assist(lane_fd());   // before that descriptor is closed
  lane_->close();
}

void Channel::on_arrived(std::uint64_t id, std::uint64_t epoch, std::vector<Buffer> buffers) {
  if ((epoch & kBundled) != 0) {
    epoch &= ~kBundled;
    if (is_broken_ || !unbundle(buffers)) {
      is_broken_ = true;
      return;
    }
  }
  inbox_.push_back({id, epoch, std::move(buffers)});
}

void Channel::on_ended(std::uint64_t id, End end) {
  if (const auto at = watched_.find(id); at != watched_.end()) at->second = end;
}

std::size_t Channel::poll_lane() {
  const std::size_t told = lane_->poll(*this);
  if (!is_broken_ || closed_) return told;
  on_closed(End::kCorrupt, "the other end sent a bundle that cannot be");
  lane_->close();
  return told + 1;
}

void Channel::on_closed(End why, std::string_view reason) {
  if (closed_) return;
  closed_ = true;
  why_ = why;
  reason_ = reason;
}

std::uint64_t Channel::send(std::span<const Slice> slices, const SendOptions& options, Deadline until,
                            Posted& posted) {
  posted = Posted::kClosed;
  if (is_inherited()) return 0;
  Lock lock(lock_);
  std::vector<Slice> bundled;
  std::uint64_t epoch = options.epoch;
  posted = Posted::kRefused;
  if ((epoch & kBundled) != 0) return 0;
  if (slices.size() > capabilities().max_slices) {
    bundled = bundle(slices, capabilities().max_slices, [this](std::size_t size) { return lane_->allocate(size); });
    if (bundled.empty()) return 0;
    for (const Slice& slice : slices) copied_out(slice.size_bytes);
    slices = bundled;
    epoch |= kBundled;
  }
  Transfer transfer{0, slices, epoch, options.digest, options.priority, options.deadline};
  const std::uint64_t copied_before = lane_->statistics().bytes_copied_out;
  const auto tried = [&] {
    transfer.id = next_id_;   // ids rise as they are accepted: while one thread waits for room, others may post
    posted = lane_->post(transfer);
    if (posted == Posted::kAccepted) {
      ++next_id_;
      if (options.watch) watched_[transfer.id] = End::kPending;
    }
    return posted != Posted::kBusy;
  };
  if (!tried()) wait(lock, tried, until, std::chrono::microseconds(0), true);
  if (const std::uint64_t copied = lane_->statistics().bytes_copied_out - copied_before; copied >= kCopiedBytes) {
    awake_for_ = std::min(kLongestWait, std::chrono::microseconds(copied / kBytesPerMicrosecond));
  }
  // The lane knows before we do: whoever is told that it is closed may ask why.
  if (posted == Posted::kClosed) {
    wait(lock, [this] { return closed_; }, Clock::now() + kToldWhy, std::chrono::microseconds(0), true);
  }
  if (asleep_ && lane_->in_progress()) lane_->wake();   // who sleeps has not been told of the queue
  leave(lock);
  return posted == Posted::kAccepted ? transfer.id : 0;
}

bool Channel::pop(Message& message) {
  if (inbox_.empty()) return false;
  message = std::move(inbox_.front());
  inbox_.pop_front();
  return true;
}

Channel::Got Channel::receive(Message& message, Deadline until, std::chrono::microseconds spin) {
  if (is_inherited()) return Got::kClosed;
  Lock lock(lock_);
  wait(lock, [this] { return !inbox_.empty() || closed_; }, until, spin, false);
  const bool got = pop(message);
  leave(lock);
  return got ? Got::kMessage : closed_ ? Got::kClosed : Got::kNothing;
}

Channel::Got Channel::try_receive(Message& message) {
  if (is_inherited()) return Got::kClosed;
  Lock lock(lock_);
  if (bell_rung_) {
    std::uint64_t rings = 0;
    [[maybe_unused]] const ssize_t got = ::read(bell_.get(), &rings, sizeof rings);
    bell_rung_ = false;
  }
  if (inbox_.empty() && !polling_) poll_lane();
  const bool got = pop(message);
  leave(lock);
  return got ? Got::kMessage : closed_ ? Got::kClosed : Got::kNothing;
}

std::optional<End> Channel::wait_ended(std::uint64_t id, Deadline until) {
  if (is_inherited()) return std::nullopt;
  Lock lock(lock_);
  // Another thread may forget it meanwhile.
  const auto found = [&]() -> std::optional<End> {
    const auto at = watched_.find(id);
    return at == watched_.end() ? std::nullopt : std::optional(at->second);
  };
  wait(lock, [&] { return found() != End::kPending; }, until, std::chrono::microseconds(0), true);
  const std::optional<End> end = found();
  leave(lock);
  return end;
}

void Channel::forget(std::uint64_t id) {
  if (is_inherited()) return;
  const Lock lock(lock_);
  watched_.erase(id);
}

bool Channel::cancel(std::uint64_t id) {
  if (is_inherited()) return false;
  Lock lock(lock_);
  const bool found = lane_->cancel(id);
  if (!polling_) poll_lane();
  changed_.notify_all();
  return found;
}

std::uint64_t Channel::bytes_moved(std::uint64_t id) const {
  if (is_inherited()) return 0;
  const Lock lock(lock_);
  return lane_->bytes_moved(id);
}

bool Channel::quiesce(Deadline until) {
  if (is_inherited()) return true;
  Lock lock(lock_);
  return wait(lock, [this] { return lane_->quiet() || closed_; }, until, std::chrono::microseconds(0), true);
}

void Channel::close() {
  if (is_inherited()) return;
  const Lock lock(lock_);
  lane_->close();
  if (!polling_) poll_lane();   // else who polls will be told
  changed_.notify_all();
}

bool Channel::arm() {
  if (is_inherited()) return false;
  const Lock lock(lock_);
  return inbox_.empty() && !closed_ && (polling_ || lane_->arm(false));
}

Buffer Channel::allocate(std::size_t size_bytes) {
  if (is_inherited()) return {};
  const Lock lock(lock_);
  return lane_->allocate(size_bytes);
}

void Channel::tidy() {
  if (is_inherited()) return;
  Lock lock(lock_);
  if (closed_) return;
  lane_->tidy();
  if (!polling_) poll_lane();   // else who polls tells the peer
  leave(lock);
}

Statistics Channel::statistics() const {
  if (is_inherited()) return {};
  const Lock lock(lock_);
  Statistics facts = lane_->statistics();
  facts.bytes_copied_out += copied_out_.load(std::memory_order_relaxed);
  facts.bytes_copied_in += copied_in_.load(std::memory_order_relaxed);
  return facts;
}

bool Channel::reserve(std::size_t size_bytes, std::size_t count) {
  Pool* const pool = is_inherited() ? nullptr : lane_->pool();
  return pool != nullptr && pool->reserve(size_bytes, count);   // which has a lock of its own
}

std::optional<PoolStatistics> Channel::memory() const {
  const Pool* const pool = is_inherited() ? nullptr : lane_->pool();
  return pool == nullptr ? std::nullopt : std::optional(pool->statistics());
}

std::vector<std::pair<std::string, std::uint64_t>> Channel::details() const {
  if (is_inherited()) return {};
  const Lock lock(lock_);
  return lane_->details();
}

bool Channel::closed() const {
  if (is_inherited()) return true;
  const Lock lock(lock_);
  return closed_;
}

std::string Channel::close_reason() const {
  if (is_inherited()) return "it belongs to the process that this one was forked from";
  const Lock lock(lock_);
  return reason_;
}

End Channel::close_end() const {
  if (is_inherited()) return End::kLocal;
  const Lock lock(lock_);
  return why_;
}

bool Channel::assist() {
  Lock lock(lock_);
  if (!polling_) {
    const std::size_t before = inbox_.size();
    poll_lane();
    if (inbox_.size() > before || closed_) {
      const std::uint64_t one = 1;
      [[maybe_unused]] const ssize_t written = ::write(bell_.get(), &one, sizeof one);
      bell_rung_ = true;
      changed_.notify_all();
    }
  }
  assisted_ = !closed_ && lane_->in_progress();
  // Its descriptor must become readable again for what is left.
  if (assisted_ && !polling_ && !lane_->arm(true)) lane_->wake();
  return assisted_;
}

// Before a thread turns to something else: what it leaves half done is looked after.
void Channel::leave(Lock& lock) {
  if (assisted_ || closed_ || polling_ || !lane_->in_progress()) return;
  assisted_ = was_assisted_ = true;
  if (!lane_->arm(true)) lane_->wake();
  lock.unlock();
  ::genie::assist(shared_from_this());
  lock.lock();
}

void Channel::sleep(Lock& lock, Deadline until) {
  timespec* limit = nullptr;
  timespec left{};
  until = std::min(until, lane_->next_timer());
  if (until != kNoDeadline) {
    const auto nanoseconds = std::max<std::int64_t>(
        0, std::chrono::duration_cast<std::chrono::nanoseconds>(until - Clock::now()).count());
    left.tv_sec = static_cast<time_t>(nanoseconds / 1'000'000'000);
    left.tv_nsec = static_cast<long>(nanoseconds % 1'000'000'000);
    limit = &left;
  }
  pollfd waiting{lane_->wait_fd(), POLLIN, 0};
  asleep_ = true;
  lock.unlock();
  ::ppoll(&waiting, 1, limit, nullptr);
  lock.lock();
  asleep_ = false;
}

template <typename Ready>
bool Channel::wait(Lock& lock, Ready ready, Deadline until, std::chrono::microseconds spin, bool for_ends) {
  if (!for_ends) spin = std::max(spin, std::exchange(awake_for_, std::chrono::microseconds(0)));
  Deadline spin_until = spin.count() > 0 ? Clock::now() + spin : Deadline::min();
  for (;;) {
    if (ready()) return true;
    if (closed_) return false;
    if (polling_) {
      ++num_waiting_;
      if (for_ends && asleep_) lane_->wake();   // it has not asked to be told of ends
      if (until == kNoDeadline) {
        changed_.wait(lock);
      } else if (changed_.wait_until(lock, until) == std::cv_status::timeout) {
        --num_waiting_;
        return ready();
      }
      --num_waiting_;
      continue;
    }
    polling_ = true;
    if (poll_lane() == 0) {
      if (Clock::now() < spin_until) {
        for (int i = 0; i < 64; ++i) breathe();
        ::sched_yield();   // the peer may have no other core
      } else if (Clock::now() >= until) {
        polling_ = false;
        if (num_waiting_ > 0) changed_.notify_all();
        return ready();
      } else if (lane_->arm(for_ends || num_waiting_ > 0)) {
        sleep(lock, until);
        if (poll_lane() == 0 && !for_ends && Clock::now() < until) spin_until = Clock::now() + kRungEarly;
      }
    }
    polling_ = false;
    if (num_waiting_ > 0) changed_.notify_all();
  }
}

}  // namespace genie
