// What the tests of the message protocol look at after a run of the simulator.
#pragma once

#include <doctest/doctest.h>

#include <map>
#include <vector>

#include "simulator.h"

namespace genie::protocol {

inline bool all_ended(const std::map<TransferId, Outcome>& outcomes) {
  for (const auto& [id, outcome] : outcomes) {
    if (outcome.end == End::kPending) return false;
  }
  return true;
}

inline void check_at_most_once(Side& side) {
  for (const auto& [id, count] : side.offers) CHECK(count == 1);
  for (const auto* outcomes : {&side.incoming, &side.outgoing}) {
    for (const auto& [id, outcome] : *outcomes) CHECK(outcome.times <= 1);
  }
}

// What arrived whole is what was sent.
inline void check_bytes(Side& receiver, TransferId id, const std::vector<std::byte>& sent) {
  REQUIRE(receiver.incoming[id].end == End::kOk);
  CHECK((receiver.landed[id] == sent));
}

struct Run {
  Stats sender, receiver;
  Nanoseconds took = 0;
};

inline Run send_one(Simulator& world, std::size_t size, End expected = End::kOk) {
  const auto& bytes = world.make_bytes(size);
  const Nanoseconds began = world.now();
  const TransferId id = world.post(0, bytes);
  REQUIRE(id != 0);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }));
  CHECK(world.side(0).outgoing[id].end == expected);
  if (expected == End::kOk) check_bytes(world.side(1), id, bytes);
  check_at_most_once(world.side(1));
  return {world.side(0).session->stats(), world.side(1).session->stats(), world.now() - began};
}

}  // namespace genie::protocol
