#include "dpdk/hub.h"

#include <rte_lcore.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <new>
#include <utility>

#include "dpdk/eal.h"
#include "lane/fork.h"

namespace genie::dpdk {
namespace {

using protocol::Nanoseconds;

constexpr std::size_t kBurstsPerLook = 8;
constexpr std::size_t kFramesPerLook = 256;                         // of one session: others have their turn
constexpr Nanoseconds kResetInterval = protocol::kMillisecond;      // between answers to frames of no session
constexpr std::pair<Nanoseconds, Nanoseconds> kNaps[] = {           // idle for so long: nap for so long
    {200 * protocol::kMicrosecond, 0},
    {5 * protocol::kMillisecond, 20 * protocol::kMicrosecond},
    {protocol::kSecond, 100 * protocol::kMicrosecond},
    {protocol::kNever, 500 * protocol::kMicrosecond},
};

const unsigned generation = fork_generation();   // of the process that loaded this
std::mutex live_mutex;
std::vector<Hub*> live;
std::mutex hubs_mutex;
std::map<std::pair<PortKind, std::string>, std::weak_ptr<Hub>> hubs;

Nanoseconds nap_after(Nanoseconds idle) noexcept {
  for (const auto& [until, nap] : kNaps) {
    if (idle < until) return nap;
  }
  return kNaps[std::size(kNaps) - 1].second;
}

}  // namespace

Nanoseconds now_ns() noexcept {
  return static_cast<Nanoseconds>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

void keep_for_ever(const std::shared_ptr<Hub>& hub) noexcept {
  static_cast<void>(new (std::nothrow) std::shared_ptr<Hub>(hub));
}

std::shared_ptr<Hub> Hub::open(const PortSpec& spec) {
  if (spec.kind == PortKind::kMemif) return std::make_shared<Hub>(spec);
  const std::lock_guard lock(hubs_mutex);
  auto& known = hubs[{spec.kind, spec.where}];
  if (auto hub = known.lock()) return hub;
  auto hub = std::make_shared<Hub>(spec);
  known = hub;
  return hub;
}

Hub::Hub(const PortSpec& spec) : port_(spec), thread_([this] { run(); }) {
  const std::lock_guard lock(live_mutex);
  live.push_back(this);
}

Hub::~Hub() {
  const std::lock_guard lock(live_mutex);
  std::erase(live, this);
  stop();
}

void Hub::stop_all() noexcept {
  if (generation != fork_generation()) return;   // the threads and ports are those of the process that forked
  const std::lock_guard lock(live_mutex);
  for (Hub* hub : live) hub->stop();
}

void Hub::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (Client* client : clients_) client->session_.close(End::kLocal);
    if (is_open_) pump();   // says goodbye, and tells the clients
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  const std::lock_guard lock(mutex_);
  is_open_ = false;
  port_.close();
}

void Hub::unlisten(Greeter& greeter) noexcept {
  std::erase_if(greeters_, [&](const Waiting& waiting) { return waiting.greeter == &greeter; });
}

void Hub::lose_all(double chance, std::uint64_t seed) noexcept {
  const std::lock_guard lock(live_mutex);
  for (Hub* hub : live) {
    const Lock hold(hub->mutex_);
    hub->loss_ = chance;
    hub->random_ = seed | 1;
  }
}

bool Hub::is_lost() noexcept {
  if (loss_ <= 0) return false;
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<double>(random_ >> 11) * 0x1p-53 < loss_;
}

std::size_t Hub::pump() noexcept {
  if (!is_open_) return 0;
  std::size_t moved = 0, came = 0;
  for (std::size_t i = 0; i < kBurstsPerLook; ++i) {
    const Nanoseconds now = now_ns();
    came = port_.receive([&](const Mac& from, std::span<const std::byte> bytes) {
      receive(now, from, bytes);
    });
    moved += came;
    if (came < Port::kBurst) break;
  }
  port_.flush();   // what was answered to frames of no session
  const Nanoseconds now = now_ns();
  if (is_alone_ && came < Port::kBurst) {   // what it had sent before, a goodbye among it, was taken
    for (Client* client : clients_) client->session_.close(End::kPeerLost);
  }
  is_alone_ = !port_.has_peer(now);
  bool has_room = true;
  for (std::size_t i = 0; i < clients_.size(); ++i) {   // a client may leave in on_event
    Client& client = *clients_[i];
    client.session_.on_time(now);
    if (has_room) moved += send_for(client, now, has_room);
    for (protocol::Event event; client.session_.next_event(event);) client.on_event(now, event);
    client.on_events_told();
  }
  return moved;
}

// Burst by burst, as long as the driver takes all of one; what it has no room for goes back to the session. When this
// returns, before anybody can end a transfer, no driver reads its memory.
std::size_t Hub::send_for(Client& client, Nanoseconds now, bool& has_room) noexcept {
  protocol::OutgoingFrame frame;
  std::array<std::uint64_t, Port::kBurst> burst;   // which sendings stand in it
  std::size_t moved = 0;
  for (std::size_t count = 1; has_room && count > 0 && moved < kFramesPerLook; moved += count) {
    count = 0;
    while (count < burst.size() && client.session_.next_frame(now, frame)) {
      if (is_lost()) continue;
      if (!port_.send(client.peer_, frame)) {
        client.session_.take_back(frame.transmission);
        has_room = false;
        break;
      }
      burst[count++] = frame.transmission;
    }
    const std::size_t taken = port_.flush();
    for (std::size_t i = taken; i < count; ++i) client.session_.take_back(burst[i]);
    has_room = has_room && taken == count;
    count = taken;
  }
  return moved;
}

Hub::Client* Hub::find(std::uint64_t session) noexcept {
  for (Client* client : clients_) {
    if (client->session_.id() == session) return client;
  }
  return nullptr;
}

void Hub::receive(Nanoseconds now, const Mac& from, std::span<const std::byte> bytes) noexcept {
  const auto session = protocol::session_named_in(bytes);
  if (!session) return;
  Client* client = find(*session);
  if (client == nullptr) client = greet(from, bytes, *session);
  if (client != nullptr) {
    if (client->peer_ == from) client->session_.on_frame(now, bytes);
    return;
  }
  protocol::OutgoingFrame reset;
  if (now - last_reset_ < kResetInterval || !protocol::write_no_session(bytes, reset)) return;
  last_reset_ = now;   // so that there is one of them at most before the next flush
  static_cast<void>(port_.send(from, reset));
}

Hub::Client* Hub::greet(const Mac& from, std::span<const std::byte> bytes, std::uint64_t session) noexcept {
  protocol::ParsedFrame frame;
  protocol::Hello hello;
  if (greeters_.empty() || protocol::parse_frame(bytes, frame) != protocol::ParseStatus::kOk ||
      frame.header.type != static_cast<std::uint8_t>(protocol::FrameType::kHello) ||
      protocol::parse_hello(frame.payload, hello) != protocol::ParseStatus::kOk) {
    return nullptr;
  }
  for (const Waiting& waiting : greeters_) {
    if (waiting.token == hello.token) return waiting.greeter->greet(from, session);
  }
  return nullptr;
}

void Hub::run() noexcept {
  ::prctl(PR_SET_NAME, "genie-dpdk");
  ::prctl(PR_SET_TIMERSLACK, 1000UL);
  rte_thread_register();  // a thread that EAL knows has caches of packet buffers
  Nanoseconds busy_at = now_ns();
  Lock lock(mutex_);
  while (!stop_) {
    const std::size_t moved = pump();
    const Nanoseconds now = now_ns();
    if (moved > 0) busy_at = now;
    Nanoseconds nap = nap_after(now - busy_at);
    for (const Client* client : clients_) {
      const Nanoseconds next = client->session_.next_time(now);
      nap = std::min(nap, next > now ? next - now : 0);
    }
    if (nap == 0) {
      lock.unlock();
      ::sched_yield();
      lock.lock();
    } else {
      wake_.wait_for(lock, std::chrono::nanoseconds(nap));
    }
  }
  lock.unlock();
  rte_thread_unregister();
}

}  // namespace genie::dpdk
