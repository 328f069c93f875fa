#include "placement/load_search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

namespace genie {
namespace {

constexpr int kTriesPerLook = 64;               // at the clock
constexpr std::int64_t kMovesPerCount = 1 << 14;  // sums of many changes drift
constexpr std::int32_t kShortRun = 8;
constexpr double kLongRuns = 0.1;               // share of runs that may be as long as their device is full
constexpr double kExchanges = 0.3;              // exchanges of whole devices in as many draws as there are atoms

[[nodiscard]] std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

}  // namespace

LoadSearch::LoadSearch(LoadProblem problem) : of_(std::move(problem)) {}

void LoadSearch::charge(std::int32_t tensor, double sign) {
  const std::int32_t src = device_A_[at(of_.source[at(tensor)])];
  const std::int32_t* count = count_TD_.data() + at(tensor) * at(of_.num_devices);
  double slowest_s = 0;
  for (std::int32_t dst = 0; dst < of_.num_devices; ++dst) {
    if (count[dst] == 0 || dst == src) continue;
    const std::size_t link = at(src) * at(of_.num_devices) + at(dst);
    const double seconds = of_.fixed_s[at(tensor)] + of_.size_bytes[at(tensor)] * of_.s_per_byte[link] +
                           of_.sized[at(tensor)] * of_.latency_s[link];
    slowest_s = std::max(slowest_s, seconds);
    if (of_.pays[at(dst)] != 0) loads_D_[at(dst)] += sign * seconds;
  }
  if (of_.pays[at(src)] != 0) loads_D_[at(src)] += sign * slowest_s;
}

void LoadSearch::apply(const Move& move) {
  const std::int32_t atom = move.atom;
  const std::int32_t src = device_A_[at(atom)];
  const std::int32_t dst = move.device;
  const std::size_t row = at(atom) * at(of_.num_devices);
  const auto* const made = of_.made.first(atom);
  const auto* const read = of_.read.first(atom);
  for (const auto* t = made; t != of_.made.last(atom); ++t) charge(*t, -1);
  for (const auto* t = read; t != of_.read.last(atom); ++t) {
    charge(*t, -1);
    std::int32_t* count = count_TD_.data() + at(*t) * at(of_.num_devices);
    --count[src];
    ++count[dst];
    charge(*t, 1);      // an atom does not read what it makes
  }
  device_A_[at(atom)] = dst;
  for (const auto* t = made; t != of_.made.last(atom); ++t) charge(*t, 1);
  loads_D_[at(src)] -= of_.seconds[row + at(src)];
  loads_D_[at(dst)] += of_.seconds[row + at(dst)];
  used_D_[at(src)] -= of_.memory_bytes[at(atom)];
  used_D_[at(dst)] += of_.memory_bytes[at(atom)];
  auto& left = members_D_[at(src)];
  const std::int32_t last = left.back();
  left[at(slot_A_[at(atom)])] = last;
  slot_A_[at(last)] = slot_A_[at(atom)];
  left.pop_back();
  slot_A_[at(atom)] = static_cast<std::int32_t>(members_D_[at(dst)].size());
  members_D_[at(dst)].push_back(atom);
}

void LoadSearch::count_loads() {
  std::fill(loads_D_.begin(), loads_D_.end(), 0.0);
  for (std::int32_t atom = 0; atom < of_.num_atoms; ++atom) {
    const std::int32_t device = device_A_[at(atom)];
    loads_D_[at(device)] += of_.seconds[at(atom) * at(of_.num_devices) + at(device)];
  }
  for (std::int32_t tensor = 0; tensor < static_cast<std::int32_t>(of_.source.size()); ++tensor) charge(tensor, 1);
}

void LoadSearch::start(const std::vector<std::int32_t>& start_A) {
  const std::size_t devices = at(of_.num_devices);
  device_A_ = start_A;
  count_TD_.assign(of_.source.size() * devices, 0);
  loads_D_.assign(devices, 0.0);
  used_D_.assign(devices, 0.0);
  members_D_.assign(devices, {});
  slot_A_.resize(start_A.size());
  for (std::int32_t tensor = 0; tensor < static_cast<std::int32_t>(of_.source.size()); ++tensor) {
    for (const auto* atom = of_.readers.first(tensor); atom != of_.readers.last(tensor); ++atom) {
      ++count_TD_[at(tensor) * devices + at(device_A_[at(*atom)])];
    }
  }
  for (std::int32_t atom = 0; atom < of_.num_atoms; ++atom) {
    const std::int32_t device = device_A_[at(atom)];
    used_D_[at(device)] += of_.memory_bytes[at(atom)];
    slot_A_[at(atom)] = static_cast<std::int32_t>(members_D_[at(device)].size());
    members_D_[at(device)].push_back(atom);
  }
  count_loads();
  taken_ = 0;
  best_ = {device_A_, largest(), 0};
}

double LoadSearch::largest() const { return *std::max_element(loads_D_.begin(), loads_D_.end()); }

// A smooth maximum: the norm of order 16 of the loads.
double LoadSearch::energy() const {
  double sum = 0;
  for (const double load : loads_D_) {
    const double share = load / scale_s_;
    const double fourth = share * share * share * share;
    sum += fourth * fourth * fourth * fourth;
  }
  return std::sqrt(std::sqrt(std::sqrt(std::sqrt(sum))));
}

LoadResult LoadSearch::anneal(const std::vector<std::int32_t>& start_A, const AnnealOptions& options) {
  check_start(start_A, of_.num_atoms, of_.num_devices, options);
  const auto started = std::chrono::steady_clock::now();
  random_ = Random(options.seed);
  start(start_A);
  scale_s_ = best_.largest_s;
  if (!(scale_s_ > 0) || of_.num_devices < 2) return best_;
  energy_ = energy();
  double heat = options.hot;
  double left = 1;
  for (; best_.tries < options.tries; ++best_.tries) {
    if (best_.tries % kTriesPerLook == 0) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - started;
      if (spent.count() >= options.limit_s) break;
      left = options.cool_by_time ? 1 - spent.count() / options.limit_s
                                  : 1 - static_cast<double>(best_.tries) / static_cast<double>(options.tries);
      heat = options.cold * std::pow(options.hot / options.cold, std::max(0.0, left));
    }
    step(heat);
  }
  return best_;
}

void LoadSearch::step(double heat) {
  propose();
  if (moves_.empty()) return;
  before_D_ = loads_D_;
  undo_.clear();
  for (const Move& move : moves_) {
    undo_.push_back({move.atom, device_A_[at(move.atom)]});
    apply(move);
  }
  if (!holds()) return take_back();
  const double found = energy();
  if (found > energy_ && random_.uniform() >= std::exp((energy_ - found) / heat)) return take_back();
  energy_ = found;
  if (++taken_ % kMovesPerCount == 0) {
    count_loads();
    energy_ = energy();
  }
  const double value_s = largest();
  if (value_s < best_.largest_s * (1 - 1e-12)) {
    best_.largest_s = value_s;
    best_.device_A = device_A_;
  }
}

bool LoadSearch::holds() const {
  return std::all_of(moves_.begin(), moves_.end(), [this](const Move& move) {
    return used_D_[at(move.device)] <= of_.capacity_bytes[at(move.device)];
  });
}

void LoadSearch::take_back() {
  for (const Move& move : undo_) apply(move);
  loads_D_ = before_D_;
}

void LoadSearch::add_move(std::int32_t atom, std::int32_t device) {
  const auto same = [atom](const Move& move) { return move.atom == atom; };
  if (std::none_of(moves_.begin(), moves_.end(), same)) moves_.push_back({atom, device});
}

// An atom that makes or reads a tensor of this one's, or itself.
std::int32_t LoadSearch::drawn_friend(std::int32_t atom) {
  const std::int32_t num_read = of_.read.size(atom);
  const std::int32_t around = num_read + of_.made.size(atom);
  if (around == 0) return atom;
  const std::int32_t drawn = random_.below(at(around));
  const std::int32_t tensor = drawn < num_read ? of_.read.first(atom)[drawn] : of_.made.first(atom)[drawn - num_read];
  const std::int32_t pin = random_.below(at(of_.readers.size(tensor)) + 1);
  return pin == 0 ? of_.source[at(tensor)] : of_.readers.first(tensor)[pin - 1];
}

void LoadSearch::propose() {
  moves_.clear();
  const auto busiest = static_cast<std::int32_t>(std::max_element(loads_D_.begin(), loads_D_.end()) - loads_D_.begin());
  const std::int32_t src = random_.uniform() < 0.6 ? busiest : random_.below(at(of_.num_devices));
  const auto& members = members_D_[at(src)];
  if (members.empty()) return;
  if (random_.uniform() * static_cast<double>(of_.num_atoms) < kExchanges) {
    exchange_devices(src, random_.below(at(of_.num_devices)));
    return drop_if_unsupported();
  }
  const std::int32_t atom = members[at(random_.below(members.size()))];
  const std::int32_t other = random_.uniform() < 0.7 ? drawn_friend(atom) : atom;
  const bool apart = device_A_[at(other)] != src;
  const std::int32_t dst = apart ? device_A_[at(other)] : random_.below(at(of_.num_devices));
  if (dst == src) return;
  moves_.push_back({atom, dst});
  const double draw = random_.uniform();
  const auto& there = members_D_[at(dst)];
  if (draw < 0.25 && !there.empty()) {
    moves_.push_back({there[at(random_.below(there.size()))], src});
  } else if (draw < 0.45 && other != atom && !apart) {
    moves_.push_back({other, dst});
  } else if (draw < 0.6) {      // a connected few that stand together
    const bool is_long = random_.uniform() < kLongRuns;
    const std::size_t most = is_long ? std::max<std::size_t>(members.size(), kShortRun) : kShortRun;
    for (std::int32_t left = 1 + random_.below(most); left > 0; --left) {
      const std::int32_t next = drawn_friend(moves_[at(random_.below(moves_.size()))].atom);
      if (device_A_[at(next)] == src) add_move(next, dst);
    }
  }
  drop_if_unsupported();
}

void LoadSearch::exchange_devices(std::int32_t one, std::int32_t other) {
  if (one == other) return;
  for (const std::int32_t atom : members_D_[at(one)]) moves_.push_back({atom, other});
  for (const std::int32_t atom : members_D_[at(other)]) moves_.push_back({atom, one});
}

void LoadSearch::drop_if_unsupported() {
  const auto cannot = [this](const Move& move) {
    return !std::isfinite(of_.seconds[at(move.atom) * at(of_.num_devices) + at(move.device)]);
  };
  if (std::any_of(moves_.begin(), moves_.end(), cannot)) moves_.clear();
}

}  // namespace genie
