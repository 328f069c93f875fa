// How long to wait for an answer, and how much to have under way while waiting.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "protocol/types.h"

namespace genie::protocol {

// The retransmission timeout after Jacobson (RFC 6298), with a floor and a ceiling of our own. Samples come only from
// frames that were sent once (Karn).
class RttEstimator {
 public:
  explicit RttEstimator(const Config& config) : min_(config.rto_min_ns), max_(config.rto_max_ns) {}

  void sample(Nanoseconds rtt) noexcept {
    least_ = std::min(least_, rtt);
    if (smoothed_ == 0) {
      smoothed_ = rtt;
      variation_ = rtt / 2;
      return;
    }
    const Nanoseconds error = rtt > smoothed_ ? rtt - smoothed_ : smoothed_ - rtt;
    variation_ = (3 * variation_ + error) / 4;
    smoothed_ = (7 * smoothed_ + rtt) / 8;
  }
  [[nodiscard]] Nanoseconds smoothed() const noexcept { return smoothed_; }
  [[nodiscard]] Nanoseconds least() const noexcept { return least_ == kNever ? 0 : least_; }
  // Before anything was measured: ten times the floor. `backoff` doublings.
  [[nodiscard]] Nanoseconds rto(std::uint32_t backoff) const noexcept {
    const Nanoseconds measured = smoothed_ == 0 ? 10 * min_ : smoothed_ + 4 * variation_;
    const Nanoseconds base = std::clamp(measured, min_, max_);
    return std::min(max_, base << std::min(backoff, 16u));
  }

 private:
  Nanoseconds min_, max_;
  Nanoseconds smoothed_ = 0, variation_ = 0, least_ = kNever;
};

// A window that follows delay, in the way of Timely (SIGCOMM 2015) and Swift (SIGCOMM 2020): it grows while frames are
// answered within a target above the least delay that was seen, and shrinks once a round trip, by how far they are
// above. Differs from Swift: loss shrinks it only where it is more than chance (kLossIsCongestion of a round), since
// what a bad cable loses does not become less by sending slowly; and the window never is below kMinFrames frames.
class CongestionWindow {
 public:
  CongestionWindow(const Config& config, std::uint32_t frame_bytes)
    : target_queueing_(config.target_queueing_ns),
     frame_bytes_(frame_bytes),
     max_(std::max<std::uint64_t>(64ull << 20, config.credit_bytes)),
     window_(std::uint64_t{kInitialFrames} * frame_bytes) {}

  [[nodiscard]] std::uint64_t bytes() const noexcept { return window_; }

  void on_delivered(Nanoseconds now, std::uint64_t bytes, Nanoseconds rtt, const RttEstimator& estimator) noexcept {
    delivered_in_round_ += bytes;
    end_round(now, estimator);
    if (rtt == 0) return;
    before_timeout_ = 0;
    const Nanoseconds target = estimator.least() + target_queueing_;
    if (rtt <= target) {
      // Doubling while nothing has ever been too slow, then a frame a round trip.
      window_ += starting_ ? bytes : std::max<std::uint64_t>(1, frame_bytes_ * bytes / window_);
      window_ = std::min(window_, max_);
      return;
    }
    starting_ = false;
    const double above = static_cast<double>(rtt - target) / static_cast<double>(rtt);
    shrink(now, std::min(kBeta * above, kMaxShrink), estimator);
  }
  void on_lost(std::uint64_t bytes) noexcept { lost_in_round_ += bytes; }
  void on_timeout(Nanoseconds now, const RttEstimator& estimator) noexcept {
    before_timeout_ = std::max(before_timeout_, window_);
    starting_ = false;
    shrink(now, kMaxShrink, estimator);
  }
  // What a timer gave up has come after all: the other end was slow, not the way. As Eifel does (RFC 4015).
  void on_late() noexcept { window_ = std::max(window_, std::exchange(before_timeout_, 0)); }

 private:
  static constexpr std::uint32_t kInitialFrames = 32, kMinFrames = 4;
  static constexpr double kBeta = 0.8, kMaxShrink = 0.5, kLossIsCongestion = 0.05;

  void end_round(Nanoseconds now, const RttEstimator& estimator) noexcept {
    if (now - round_began_ < estimator.smoothed()) return;
    const auto all = static_cast<double>(lost_in_round_ + delivered_in_round_);
    if (lost_in_round_ > frame_bytes_ && static_cast<double>(lost_in_round_) > kLossIsCongestion * all) {
      starting_ = false;
      shrink(now, kMaxShrink, estimator);
    }
    round_began_ = now;
    lost_in_round_ = delivered_in_round_ = 0;
  }
  void shrink(Nanoseconds now, double by, const RttEstimator& estimator) noexcept {
    if (now - shrunk_at_ < estimator.smoothed()) return;
    shrunk_at_ = now;
    const auto smaller = static_cast<std::uint64_t>(static_cast<double>(window_) * (1.0 - by));
    window_ = std::max(smaller, std::uint64_t{kMinFrames} * frame_bytes_);
  }

  Nanoseconds target_queueing_;
  std::uint64_t frame_bytes_;
  std::uint64_t max_;
  std::uint64_t window_;
  std::uint64_t before_timeout_ = 0;   // the window, until an answer tells what the timeout meant
  bool starting_ = true;
  Nanoseconds shrunk_at_ = 0, round_began_ = 0;
  std::uint64_t lost_in_round_ = 0, delivered_in_round_ = 0;
};

}  // namespace genie::protocol
