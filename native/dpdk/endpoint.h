// One end of a dpdk lane; see lane.h.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dpdk/hub.h"
#include "lane/fork.h"
#include "lane/lane.h"

namespace genie::dpdk {

class DpdkLane final : public Lane, public Hub::Client {
 public:
  DpdkLane(std::shared_ptr<Hub> hub, const protocol::Config& config, protocol::Role role, std::uint64_t session,
           std::uint32_t incarnation);
  ~DpdkLane() override;

  // With the hub's lock held.
  void attach(const Mac& peer) {
    peer_ = peer;
    hub_->attach(*this);
    attached_ = true;
  }
  [[nodiscard]] Hub& hub() noexcept { return *hub_; }

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  [[nodiscard]] Buffer allocate(std::size_t) noexcept override { return {}; }
  [[nodiscard]] bool register_memory(std::span<std::byte>) noexcept override { return true; }
  [[nodiscard]] Posted post(const Transfer& transfer) noexcept override;
  std::size_t poll(Sink& sink) noexcept override;
  [[nodiscard]] bool arm(bool for_ends) noexcept override;
  [[nodiscard]] int wait_fd() const noexcept override { return wait_fd_; }
  void wake() noexcept override;
  [[nodiscard]] bool cancel(std::uint64_t id) noexcept override;
  [[nodiscard]] bool quiet() const noexcept override;
  void close() noexcept override;
  [[nodiscard]] Statistics statistics() const noexcept override;
  [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> details() const override;

  void on_event(protocol::Nanoseconds now, const protocol::Event& event) noexcept override;
  void on_events_told() noexcept override;

 private:
  struct Sending {
    std::uint64_t id = 0;
    std::size_t size_bytes = 0;
    std::vector<Slice> slices;
    std::vector<std::byte> manifest;
  };
  struct Landing {
    protocol::Ticket ticket;
    Buffer memory;
    bool is_whole = false;
  };
  struct Arrived {
    std::uint64_t id = 0;
    std::uint64_t epoch = 0;
    std::uint64_t whole_bytes = 0;
    std::vector<Buffer> buffers;
  };
  struct Ended {
    std::uint64_t id;
    End end;
  };

  [[nodiscard]] static protocol::Source describe(Sending& sending);
  void on_offered(protocol::Nanoseconds now, const protocol::Event& event) noexcept;
  [[nodiscard]] bool open(Landing& landing, Arrived& arrived) noexcept;
  void shut(End why, const char* reason) noexcept;

  const unsigned generation_ = fork_generation();
  const std::shared_ptr<Hub> hub_;
  const int wait_fd_;
  Capabilities capabilities_;
  // The rest under the hub's lock.
  bool attached_ = false;
  std::uint64_t last_id_ = 0;
  std::map<protocol::TransferId, Sending> sending_;
  std::map<protocol::TransferId, Landing> landing_;
  std::deque<protocol::Event> waiting_;   // offers for which there is no room yet
  std::uint64_t untaken_bytes_ = 0;       // of landing_ and arrived_
  std::deque<Arrived> arrived_;
  std::vector<Ended> ended_;
  std::vector<Sending> done_;
  bool armed_ = false, armed_for_ends_ = false, closed_ = false, told_closed_ = false;
  std::atomic<bool> rung_ = false;
  End why_ = End::kPending;
  const char* reason_ = "";
  Statistics facts_;
};

}  // namespace genie::dpdk
