#include "placement/makespan_search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

namespace genie {
namespace {

constexpr double kReorder = 0.1;        // share of steps that change an order and no device
constexpr int kTriesPerLook = 8;        // at the clock
constexpr double kInf = std::numeric_limits<double>::infinity();

[[nodiscard]] std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

}  // namespace

bool MakespanSearch::later(const Event& a, const Event& b) { return a.at_s > b.at_s; }

bool MakespanSearch::after(const Ready& a, const Ready& b) {
  if (a.priority != b.priority) return a.priority < b.priority;
  if (a.seconds != b.seconds) return a.seconds > b.seconds;
  return a.node > b.node;
}

bool MakespanSearch::behind(const Waiting& a, const Waiting& b) {
  if (a.priority != b.priority) return a.priority < b.priority;
  return a.node > b.node;
}

MakespanSearch::MakespanSearch(MakespanProblem problem) : of_(std::move(problem)) {
  const std::size_t nodes = of_.num_nodes();
  const auto devices = at(of_.num_devices);
  rank_N_.resize(nodes);
  priority_N_.resize(nodes);
  start_N_.resize(nodes);
  missing_N_.resize(nodes);
  ready_D_.resize(devices);
  busy_D_.resize(devices);
  touched_D_.resize(devices);
  waiting_L_.resize(devices * devices);
  sending_L_.resize(devices * devices);
}

double MakespanSearch::transfer_s(std::int32_t node, std::int32_t src, std::int32_t dst) const {
  const std::size_t link = at(src) * at(of_.num_devices) + at(dst);
  return of_.fixed_s[at(node)] + of_.size_bytes[at(node)] * of_.s_per_byte[link] +
         of_.sized[at(node)] * of_.latency_s[link];
}

void MakespanSearch::find_ranks() {
  const auto devices = at(of_.num_devices);
  for (auto i = of_.order.rbegin(); i != of_.order.rend(); ++i) {
    const std::int32_t node = *i;
    const std::int32_t here = device_N_[at(node)];
    double longest = 0;
    for (const auto* user = of_.users.first(node); user != of_.users.last(node); ++user) {
      const std::int32_t there = device_N_[at(*user)];
      const double way = there == here ? rank_N_[at(*user)] : rank_N_[at(*user)] + transfer_s(node, here, there);
      longest = std::max(longest, way);
    }
    rank_N_[at(node)] = longest + of_.seconds[at(node) * devices + at(here)];
  }
}

void MakespanSearch::queue(std::int32_t node) {
  const std::int32_t device = device_N_[at(node)];
  auto& ready = ready_D_[at(device)];
  ready.push_back({priority_N_[at(node)], of_.seconds[at(node) * at(of_.num_devices) + at(device)], node});
  std::push_heap(ready.begin(), ready.end(), after);
}

void MakespanSearch::touch(std::int32_t device) {
  if (touched_D_[at(device)] != 0) return;
  touched_D_[at(device)] = 1;
  touched_.push_back(device);
}

void MakespanSearch::deliver(std::int32_t node, std::int32_t device) {
  for (const auto* user = of_.users.first(node); user != of_.users.last(node); ++user) {
    if (device_N_[at(*user)] != device || --missing_N_[at(*user)] != 0) continue;
    queue(*user);
    touch(device);
  }
}

void MakespanSearch::finish(std::int32_t node) {
  const std::int32_t here = device_N_[at(node)];
  busy_D_[at(here)] = 0;
  touch(here);
  deliver(node, here);
  const auto* const users = of_.users.first(node);
  const auto* const end = of_.users.last(node);
  for (const auto* user = users; user != end; ++user) {
    const std::int32_t there = device_N_[at(*user)];
    const auto same = [&](std::int32_t other) { return device_N_[at(other)] == there; };
    if (there == here || std::any_of(users, user, same)) continue;      // each device once
    const double seconds = transfer_s(node, here, there);
    if (seconds <= 0) {
      deliver(node, there);
      continue;
    }
    double priority = -kInf;
    for (const auto* other = user; other != end; ++other) {
      if (same(*other)) priority = std::max(priority, priority_N_[at(*other)]);
    }
    const std::int32_t link = here * of_.num_devices + there;
    auto& waiting = waiting_L_[at(link)];
    waiting.push_back({priority, node, seconds});
    std::push_heap(waiting.begin(), waiting.end(), behind);
    links_.push_back(link);
  }
}

void MakespanSearch::send(double now_s, std::int32_t link) {
  auto& waiting = waiting_L_[at(link)];
  if (waiting.empty() || sending_L_[at(link)] != 0) return;
  std::pop_heap(waiting.begin(), waiting.end(), behind);
  const Waiting next = waiting.back();
  waiting.pop_back();
  sending_L_[at(link)] = 1;
  events_.push_back({now_s + next.seconds, next.node, link});
  std::push_heap(events_.begin(), events_.end(), later);
}

bool MakespanSearch::begin(double now_s, std::int32_t device, double worst_s) {
  auto& ready = ready_D_[at(device)];
  if (ready.empty() || busy_D_[at(device)] != 0) return true;
  std::pop_heap(ready.begin(), ready.end(), after);
  const Ready next = ready.back();
  ready.pop_back();
  // The way to the end from here is the least that is still to come.
  if (now_s + rank_N_[at(next.node)] > worst_s) return false;
  busy_D_[at(device)] = 1;
  start_N_[at(next.node)] = now_s;
  const double end_s = now_s + next.seconds;
  end_s_ = std::max(end_s_, end_s);
  events_.push_back({end_s, next.node, -1});
  std::push_heap(events_.begin(), events_.end(), later);
  return true;
}

double MakespanSearch::schedule(double worst_s) {
  worst_s *= 1 + 1e-12;      // ranks add up in another order than times do
  for (auto& ready : ready_D_) ready.clear();
  for (auto& waiting : waiting_L_) waiting.clear();
  std::fill(busy_D_.begin(), busy_D_.end(), std::uint8_t{0});
  std::fill(sending_L_.begin(), sending_L_.end(), std::uint8_t{0});
  std::fill(touched_D_.begin(), touched_D_.end(), std::uint8_t{0});
  touched_.clear();
  links_.clear();
  events_.clear();
  end_s_ = 0;
  for (std::int32_t node = 0; node < static_cast<std::int32_t>(of_.num_nodes()); ++node) {
    priority_N_[at(node)] = rank_N_[at(node)] + bias_N_[at(node)];
    missing_N_[at(node)] = of_.makers.size(node);
  }
  for (std::int32_t node = 0; node < static_cast<std::int32_t>(of_.num_nodes()); ++node) {
    if (missing_N_[at(node)] == 0) queue(node);
  }
  for (std::int32_t device = 0; device < of_.num_devices; ++device) {
    if (!begin(0.0, device, worst_s)) return kInf;
  }
  while (!events_.empty()) {
    // All that ends at one time is taken in before anything begins, so that priority decides and not order.
    const double now_s = events_.front().at_s;
    while (!events_.empty() && events_.front().at_s == now_s) {
      std::pop_heap(events_.begin(), events_.end(), later);
      const Event event = events_.back();
      events_.pop_back();
      if (event.link < 0) {
        finish(event.node);
      } else {
        sending_L_[at(event.link)] = 0;
        links_.push_back(event.link);
        deliver(event.node, event.link % of_.num_devices);
      }
    }
    for (const std::int32_t link : links_) send(now_s, link);
    links_.clear();
    for (const std::int32_t device : touched_) {
      touched_D_[at(device)] = 0;
      if (!begin(now_s, device, worst_s)) return kInf;
    }
    touched_.clear();
  }
  return end_s_;
}

void MakespanSearch::start(const std::vector<std::int32_t>& start_A) {
  device_A_ = start_A;
  device_N_.resize(of_.num_nodes());
  used_D_.assign(at(of_.num_devices), 0.0);
  for (std::size_t atom = 0; atom < device_A_.size(); ++atom) used_D_[at(device_A_[atom])] += of_.memory_bytes[atom];
  for (std::size_t node = 0; node < device_N_.size(); ++node) device_N_[node] = device_A_[at(of_.atom_of[node])];
  bias_N_.assign(of_.num_nodes(), 0.0);
  find_ranks();
  now_s_ = schedule(kInf);
  find_critical();
  best_ = {device_A_, priority_N_, now_s_, 0};
}

MakespanResult MakespanSearch::anneal(const std::vector<std::int32_t>& start_A, const AnnealOptions& options) {
  check_start(start_A, of_.num_atoms, of_.num_devices, options);
  const auto started = std::chrono::steady_clock::now();
  random_ = Random(options.seed);
  start(start_A);
  const double scale_s = now_s_;
  if (!(scale_s > 0) || of_.num_devices < 2) return best_;
  double left = 1;
  for (; best_.tries < options.tries; ++best_.tries) {
    if (best_.tries % kTriesPerLook == 0) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - started;
      if (spent.count() >= options.limit_s) break;
      if (options.cool_by_time) left = 1 - spent.count() / options.limit_s;
    }
    if (!options.cool_by_time) left = 1 - static_cast<double>(best_.tries) / static_cast<double>(options.tries);
    step(scale_s * options.cold * std::pow(options.hot / options.cold, std::max(0.0, left)));
  }
  return best_;
}

void MakespanSearch::step(double heat_s) {
  if (random_.uniform() < kReorder) {
    reorder(heat_s);
    return;
  }
  propose();
  if (moves_.empty()) return;
  undo_.clear();
  for (const Move& move : moves_) undo_.push_back({move.atom, device_A_[at(move.atom)]});
  apply(moves_);
  const auto full = [&](const Move& move) { return used_D_[at(move.device)] > of_.capacity_bytes[at(move.device)]; };
  if (std::any_of(moves_.begin(), moves_.end(), full) || !judge(heat_s)) apply(undo_);
}

void MakespanSearch::reorder(double heat_s) {
  const std::int32_t node = random_.below(of_.num_nodes());
  const double before = bias_N_[at(node)];
  bias_N_[at(node)] = before != 0 ? 0.0 : now_s_ * (random_.uniform() - 0.5);
  if (!judge(heat_s)) bias_N_[at(node)] = before;
}

// Metropolis, with the draw made first: a schedule that is sure to be refused is not finished.
bool MakespanSearch::judge(double heat_s) {
  const double worst_s = now_s_ - heat_s * std::log(1 - random_.uniform());
  find_ranks();
  const double makespan_s = schedule(worst_s);
  if (!(makespan_s <= worst_s)) return false;
  now_s_ = makespan_s;
  find_critical();
  if (now_s_ < best_.makespan_s) {
    best_.device_A = device_A_;
    best_.priority_N = priority_N_;
    best_.makespan_s = now_s_;
  }
  return true;
}

void MakespanSearch::apply(const std::vector<Move>& moves) {
  for (const Move& move : moves) {
    const double memory = of_.memory_bytes[at(move.atom)];
    used_D_[at(device_A_[at(move.atom)])] -= memory;
    used_D_[at(move.device)] += memory;
    device_A_[at(move.atom)] = move.device;
    for (const auto* node = of_.nodes_of.first(move.atom); node != of_.nodes_of.last(move.atom); ++node) {
      device_N_[at(*node)] = move.device;
    }
  }
}

void MakespanSearch::find_critical() {
  critical_.clear();
  const double least_s = now_s_ * (1 - 1e-9);
  for (std::size_t node = 0; node < start_N_.size(); ++node) {
    if (start_N_[node] + rank_N_[node] >= least_s) critical_.push_back(static_cast<std::int32_t>(node));
  }
}

void MakespanSearch::add_atom(std::int32_t atom) {
  if (std::find(atoms_.begin(), atoms_.end(), atom) == atoms_.end()) atoms_.push_back(atom);
}

// Atoms of a chain of users that starts at a node, as far as it stays on the device.
void MakespanSearch::add_run_of(std::int32_t node, std::int32_t device) {
  for (std::int32_t left = 1 + random_.below(8); left > 0; --left) {
    std::int32_t following = -1;
    std::size_t seen = 0;
    for (const auto* user = of_.users.first(node); user != of_.users.last(node); ++user) {
      if (device_N_[at(*user)] == device && random_.below(++seen) == 0) following = *user;
    }
    if (following < 0) return;
    node = following;
    add_atom(of_.atom_of[at(node)]);
  }
}

void MakespanSearch::propose() {
  moves_.clear();
  const bool critical = random_.uniform() < 0.5 && !critical_.empty();
  const std::int32_t node = critical ? critical_[at(random_.below(critical_.size()))] : random_.below(of_.num_nodes());
  const std::int32_t num_makers = of_.makers.size(node);
  const std::int32_t around = num_makers + of_.users.size(node);
  std::int32_t friend_node = node;
  if (around > 0) {
    const std::int32_t drawn = random_.below(at(around));
    friend_node = drawn < num_makers ? of_.makers.first(node)[drawn] : of_.users.first(node)[drawn - num_makers];
  }
  const std::int32_t src = device_N_[at(node)];
  std::int32_t dst = device_N_[at(friend_node)];
  if (dst == src || random_.uniform() < 0.3) dst = random_.below(at(of_.num_devices));
  if (dst == src) return;
  atoms_.assign(1, of_.atom_of[at(node)]);
  if (device_N_[at(friend_node)] == src && random_.uniform() < 0.4) {
    add_atom(of_.atom_of[at(friend_node)]);
    if (random_.uniform() < 0.5) add_run_of(friend_node, src);
  }
  for (const std::int32_t atom : atoms_) moves_.push_back({atom, dst});
  if (random_.uniform() < 0.15) {
    const std::int32_t other = of_.atom_of[at(random_.below(of_.num_nodes()))];
    if (device_A_[at(other)] == dst && std::find(atoms_.begin(), atoms_.end(), other) == atoms_.end()) {
      moves_.push_back({other, src});
    }
  }
  const auto cannot = [&](const Move& move) {
    return of_.runs[at(move.atom) * at(of_.num_devices) + at(move.device)] == 0;
  };
  if (std::any_of(moves_.begin(), moves_.end(), cannot)) moves_.clear();
}

}  // namespace genie
