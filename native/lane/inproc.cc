#include "lane/inproc.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <mutex>

#include "lane/digest.h"
#include "lane/landing.h"
#include "lane/unix_socket.h"

namespace genie {
namespace {

constexpr std::size_t kMaxQueued = 1024;

struct Message {
  std::uint64_t id = 0;
  std::uint64_t epoch = 0;
  Deadline deadline = kNoDeadline;
  std::vector<Buffer> buffers;
};

// One direction and the bell of its receiver.
struct Queue {
  std::array<std::deque<Message>, kNumPriorities> waiting;
  std::vector<std::pair<std::uint64_t, End>> ended;   // for the sender
  Fd bell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  bool closed = false;

  [[nodiscard]] std::size_t size() const noexcept {
    std::size_t count = 0;
    for (const auto& queue : waiting) count += queue.size();
    return count;
  }
  void ring() const noexcept {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(bell.get(), &one, sizeof one);
  }
};

struct Shared {
  std::mutex lock;
  std::array<Queue, 2> queues;   // by receiver
};

class InprocLane final : public Lane {
 public:
  InprocLane(std::shared_ptr<Shared> shared, std::size_t me) : shared_(std::move(shared)), me_(me) {
    capabilities_.name = "inproc";
    capabilities_.zero_copy_receive = true;
    if (!mine().bell.valid()) throw LaneError(error_text("making an eventfd"));
  }
  ~InprocLane() override { close(); }

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  [[nodiscard]] Buffer allocate(std::size_t size_bytes) noexcept override { return land(size_bytes); }
  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }

  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override try {
    const std::lock_guard hold(shared_->lock);
    if (mine().closed || theirs().closed) return Posted::kClosed;
    if (transfer.id <= last_id_ || transfer.slices.size() > kMaxSlices) return Posted::kRefused;
    if (theirs().size() >= kMaxQueued) return Posted::kBusy;
    Message message{transfer.id, transfer.epoch, transfer.deadline, {}};
    message.buffers.reserve(transfer.slices.size());
    std::uint64_t shared_bytes = 0;
    std::uint64_t copied_bytes = 0;
    for (const Slice& slice : transfer.slices) {
      if (slice.owner != nullptr) {
        // Read-only by contract: it is still the sender's memory.
        message.buffers.push_back({const_cast<std::byte*>(slice.data), slice.size_bytes, true, slice.owner});
        shared_bytes += slice.size_bytes;
        continue;
      }
      Buffer copy = land(slice.size_bytes);
      if (copy.data == nullptr) return Posted::kBusy;
      std::copy_n(slice.data, slice.size_bytes, copy.data);
      copied_bytes += slice.size_bytes;
      message.buffers.push_back(std::move(copy));
    }
    theirs().waiting[static_cast<std::size_t>(transfer.priority)].push_back(std::move(message));
    last_id_ = transfer.id;
    ++open_;
    ++facts_.posted;
    facts_.bytes_sent += shared_bytes + copied_bytes;
    facts_.bytes_shared += shared_bytes;
    facts_.bytes_copied_out += copied_bytes;
    theirs().ring();
    return Posted::kAccepted;
  } catch (...) {
    return Posted::kBusy;
  }

  std::size_t poll(Sink& sink) noexcept override {
    std::vector<Message> arrived;
    std::vector<std::pair<std::uint64_t, End>> ended;
    bool over = false;
    {
      const std::lock_guard hold(shared_->lock);
      std::uint64_t rings = 0;
      [[maybe_unused]] const ssize_t got = ::read(mine().bell.get(), &rings, sizeof rings);
      take(arrived);
      ended.swap(mine().ended);
      over = (mine().closed || theirs().closed) && !said_closed_;
      if (over) said_closed_ = true;
      if (!arrived.empty()) theirs().ring();
    }
    for (const auto& [id, how] : ended) {
      --open_;
      ++(how == End::kOk ? facts_.ended_ok : facts_.ended_badly);
      sink.on_ended(id, how);
    }
    for (Message& message : arrived) {
      ++facts_.arrived;
      for (const Buffer& buffer : message.buffers) facts_.bytes_arrived += buffer.size_bytes;
      sink.on_arrived(message.id, message.epoch, std::move(message.buffers));
    }
    if (over) sink.on_closed(closed_here_ ? End::kCancelled : End::kPeerLost, "closed");
    return arrived.size() + ended.size() + (over ? 1 : 0);
  }

  [[nodiscard]] bool arm(bool) noexcept override {
    const std::lock_guard hold(shared_->lock);
    if ((mine().closed || theirs().closed) && !said_closed_) return false;
    return mine().size() == 0 && mine().ended.empty();
  }
  [[nodiscard]] int wait_fd() const noexcept override { return shared_->queues[me_].bell.get(); }
  void wake() noexcept override { shared_->queues[me_].ring(); }
  [[nodiscard]] Deadline next_timer() const noexcept override {
    const std::lock_guard hold(shared_->lock);
    Deadline first = kNoDeadline;
    for (const auto& queue : shared_->queues[1 - me_].waiting) {
      for (const Message& message : queue) first = std::min(first, message.deadline);
    }
    return first;
  }

  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override {
    const std::lock_guard hold(shared_->lock);
    for (auto& queue : theirs().waiting) {
      const auto at = std::find_if(queue.begin(), queue.end(), [id](const Message& m) { return m.id == id; });
      if (at == queue.end()) continue;
      queue.erase(at);
      mine().ended.emplace_back(id, End::kCancelled);
      return true;
    }
    return false;
  }

  [[nodiscard]] std::uint64_t bytes_moved(std::uint64_t) const noexcept override { return 0; }

  [[nodiscard]] bool quiet() const noexcept override { return open_ == 0; }

  void close() noexcept override {
    const std::lock_guard hold(shared_->lock);
    if (mine().closed) return;
    closed_here_ = !theirs().closed;
    mine().closed = true;
    end_waiting(theirs(), mine(), End::kCancelled);
    end_waiting(mine(), theirs(), End::kPeerLost);
    theirs().ring();
    mine().ring();
  }

  [[nodiscard]] Statistics statistics() const noexcept override { return facts_; }

 private:
  [[nodiscard]] Queue& mine() noexcept { return shared_->queues[me_]; }
  [[nodiscard]] Queue& theirs() noexcept { return shared_->queues[1 - me_]; }

  // What is there for this end, most urgent first; what is late ends instead. The lock is held.
  void take(std::vector<Message>& arrived) {
    const auto now = Clock::now();
    for (auto& queue : mine().waiting) {
      for (Message& message : queue) {
        const bool late = message.deadline <= now;
        theirs().ended.emplace_back(message.id, late ? End::kTimeout : End::kOk);
        if (!late) arrived.push_back(std::move(message));
      }
      queue.clear();
    }
    for (auto& queue : theirs().waiting) {
      for (auto at = queue.begin(); at != queue.end();) {
        if (at->deadline > now) {
          ++at;
          continue;
        }
        mine().ended.emplace_back(at->id, End::kTimeout);
        at = queue.erase(at);
      }
    }
  }

  static void end_waiting(Queue& receiver, Queue& sender, End how) {
    for (auto& queue : receiver.waiting) {
      for (const Message& message : queue) sender.ended.emplace_back(message.id, how);
      queue.clear();
    }
  }

  const std::shared_ptr<Shared> shared_;
  const std::size_t me_;
  Capabilities capabilities_;
  std::uint64_t last_id_ = 0;
  std::uint64_t open_ = 0;
  bool said_closed_ = false;
  bool closed_here_ = false;
  Statistics facts_;
};

}  // namespace

std::pair<std::unique_ptr<Lane>, std::unique_ptr<Lane>> make_inproc() {
  auto shared = std::make_shared<Shared>();
  return {std::make_unique<InprocLane>(shared, 0), std::make_unique<InprocLane>(shared, 1)};
}

}  // namespace genie
