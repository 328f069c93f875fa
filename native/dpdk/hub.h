// Who moves a port: one thread for each, and whoever posts or polls meanwhile. Sessions of several lanes may share a port.
//
// A port of DPDK has nothing to sleep on, so the thread looks, less and less often while nothing comes: at once for
// 0.2 ms, every 20 us for 5 ms, every 100 us for a second, then every 500 us.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "dpdk/port.h"
#include "protocol/session.h"

namespace genie::dpdk {

[[nodiscard]] protocol::Nanoseconds now_ns() noexcept;

class Hub;
// For a forked child, which has no thread that moves the port and must not close what is its parent's.
void keep_for_ever(const std::shared_ptr<Hub>& hub) noexcept;

class Hub {
 public:
  // A session on this port. Its functions are called with the hub's lock held.
  class Client {
   public:
    Client(const protocol::Config& config, protocol::Role role, std::uint64_t session, std::uint32_t incarnation)
        : session_(config, role, session, incarnation, now_ns()) {}
    virtual ~Client() = default;
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    virtual void on_event(protocol::Nanoseconds now, const protocol::Event& event) noexcept = 0;
    // The events of one look at the port have been told.
    virtual void on_events_told() noexcept {}

    protocol::Session session_;
    Mac peer_{};
  };

  // Who waits for sessions that others begin with a token. Called with the lock held; null: not this one.
  class Greeter {
   public:
    virtual ~Greeter() = default;
    virtual Client* greet(const Mac& from, std::uint64_t session) noexcept = 0;
  };

  // Ends every lane of this process in LOCAL and closes every port: what has to come before stop_eal().
  static void stop_all() noexcept;
  // For tests and benches: the chance that a frame is lost instead of sent, on every port of this process that is open
  // now, decided by a seeded generator.
  static void lose_all(double chance, std::uint64_t seed) noexcept;

  using Lock = std::unique_lock<std::mutex>;

  // The hub of a port. Ports on interfaces and NICs are opened once in a process and shared. Throws DpdkError.
  [[nodiscard]] static std::shared_ptr<Hub> open(const PortSpec& spec);
  explicit Hub(const PortSpec& spec);
  ~Hub();
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;

  [[nodiscard]] Lock lock() { return Lock(mutex_); }
  [[nodiscard]] const Port& port() const noexcept { return port_; }

  // The rest needs the lock.
  void attach(Client& client) { clients_.push_back(&client); }
  void detach(Client& client) noexcept { std::erase(clients_, &client); }
  void listen(std::uint64_t token, Greeter& greeter) { greeters_.push_back({token, &greeter}); }
  void unlisten(Greeter& greeter) noexcept;
  void join(Fd peer) noexcept { port_.join(std::move(peer)); }   // memif: see Port
  // Moves what can be moved now; returns how many frames came or went.
  std::size_t pump() noexcept;

 private:
  struct Waiting {
    std::uint64_t token;
    Greeter* greeter;
  };
  void run() noexcept;
  void stop() noexcept;
  [[nodiscard]] std::size_t send_for(Client& client, protocol::Nanoseconds now, bool& has_room) noexcept;
  void receive(protocol::Nanoseconds now, const Mac& from, std::span<const std::byte> bytes) noexcept;
  [[nodiscard]] Client* find(std::uint64_t session) noexcept;
  [[nodiscard]] Client* greet(const Mac& from, std::span<const std::byte> bytes, std::uint64_t session) noexcept;
  [[nodiscard]] bool is_lost() noexcept;

  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool is_open_ = true;
  bool is_alone_ = false;   // the process at the other end of a memif has ended
  Port port_;
  std::vector<Client*> clients_;
  std::vector<Waiting> greeters_;
  protocol::Nanoseconds last_reset_ = 0;
  double loss_ = 0;
  std::uint64_t random_ = 1;
  std::thread thread_;
};

}  // namespace genie::dpdk
