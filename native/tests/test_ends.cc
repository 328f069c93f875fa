// How sessions and transfers begin and end: killed, stopped, closed, cancelled, refused, out of credit.
#include "tests/checks.h"

using namespace genie::protocol;
using genie::End;

TEST_CASE("kill -9 of either end, at every step: the other one ends everything, in time, with its type") {
  for (const int victim : {0, 1}) {
    for (int steps = 0;; ++steps) {
      CAPTURE(victim);
      CAPTURE(steps);
      Simulator world{11, {.drop = 0.05, .reorder = 0.05}};
      Side& survivor = world.side(1 - victim);
      for (const int from : {0, 1}) {
        (void)world.post(from, world.make_bytes(60'000));
        (void)world.post(from, world.make_bytes(5));
      }
      bool over = false;
      for (int i = 0; i < steps && !over; ++i) {
        over = !world.step() || (all_ended(world.side(0).outgoing) && all_ended(world.side(1).outgoing));
      }
      if (over) {
        CHECK(steps > 40);  // the whole life of the session was covered
        break;
      }
      world.side(victim).running = false;
      REQUIRE(world.run([&] { return survivor.closed != End::kPending; }, 10 * kSecond));
      CHECK(survivor.closed == End::kPeerLost);
      CHECK(all_ended(survivor.outgoing));
      CHECK(all_ended(survivor.incoming));
      check_at_most_once(survivor);
    }
  }
}

TEST_CASE("SIGSTOP of either end, at every third step: both end everything, and what is OK is equal") {
  for (const int victim : {0, 1}) {
    for (const Nanoseconds pause : {100 * kMillisecond, 20 * kSecond}) {
      for (int steps = 0;; steps += 3) {
        CAPTURE(victim);
        CAPTURE(steps);
        Simulator world{12, {.drop = 0.05}};
        std::map<TransferId, const std::vector<std::byte>*> sent[2];
        for (const int from : {0, 1}) {
          const auto& bytes = world.make_bytes(300'000);
          sent[from][world.post(from, bytes)] = &bytes;
        }
        const auto done = [&] { return all_ended(world.side(0).outgoing) && all_ended(world.side(1).outgoing) &&
                                       all_ended(world.side(0).incoming) && all_ended(world.side(1).incoming); };
        bool over = false;
        for (int i = 0; i < steps && !over; ++i) over = !world.step() || done();
        if (over) {
          CHECK(steps > 40);
          break;
        }
        world.side(victim).running = false;
        const Nanoseconds until = world.now() + pause;
        world.run([&] { return world.now() >= until; }, pause);
        if (world.now() < until) world.pass(until - world.now());
        world.side(victim).running = true;
        REQUIRE(world.run(done));
        for (const int from : {0, 1}) {
          check_at_most_once(world.side(from));
          for (const auto& [id, outcome] : world.side(1 - from).incoming) {
            if (outcome.end == End::kOk) CHECK((world.side(1 - from).landed[id] == *sent[from][id]));
          }
          if (pause < kSecond) {
            for (const auto& [id, outcome] : world.side(from).outgoing) CHECK(outcome.end == End::kOk);
          }
        }
      }
    }
  }
}

TEST_CASE("an end that has begun another life is lost at once, whether it knows the session or not") {
  for (const bool knows_session : {false, true}) {
    for (const int victim : {0, 1}) {
      CAPTURE(knows_session);
      CAPTURE(victim);
      Simulator world{13, {}};
      const TransferId id = world.post(1 - victim, world.make_bytes(8 << 20));
      world.run([&] { return world.side(victim).session->stats().payload_bytes_in > 100'000; });
      const Nanoseconds then = world.now();
      world.restart(victim, 3003, knows_session);
      Side& survivor = world.side(1 - victim);
      REQUIRE(world.run([&] { return survivor.closed != End::kPending; }));
      CHECK(survivor.outgoing[id].end == End::kPeerLost);
      // A passive end that knows the session says nothing until it is greeted: silence has to be noticed.
      const bool silent = knows_session && victim == 1;
      CHECK(world.now() - then < (silent ? 4 * kSecond : 10 * kMillisecond));
    }
  }
}

TEST_CASE("close tells the other end") {
  Simulator world{14, {}};
  const TransferId id = world.post(0, world.make_bytes(32 << 20));
  world.run([&] { return world.side(1).session->stats().payload_bytes_in > 100'000; });
  world.side(1).session->close();
  REQUIRE(world.run([&] { return world.side(0).closed != End::kPending; }, 10 * kMillisecond));
  CHECK(world.side(0).outgoing[id].end == End::kPeerLost);
  world.run([&] { return world.side(1).closed != End::kPending; }, 10 * kMillisecond);
  CHECK(world.side(1).closed == End::kCancelled);
  CHECK(world.side(1).incoming[id].end == End::kCancelled);
  CHECK(world.side(0).session->post(world.now(), Source{}, {}, kSecond) == 0);
}

TEST_CASE("cancelled by either end, both know") {
  for (const int who : {0, 1}) {
    Simulator world{15, {.drop = 0.1}};
    const TransferId id = world.post(0, world.make_bytes(32 << 20));
    world.run([&] { return world.side(1).session->stats().payload_bytes_in > 100'000; });
    const auto direction = who == 0 ? Direction::kOutgoing : Direction::kIncoming;
    CHECK(world.side(who).session->cancel(world.now(), direction, id));
    CHECK_FALSE(world.side(who).session->cancel(world.now(), direction, id));
    REQUIRE(world.run([&] { return all_ended(world.side(0).outgoing) && all_ended(world.side(1).incoming); }, kSecond));
    CHECK(world.side(0).outgoing[id].end == End::kCancelled);
    CHECK(world.side(1).incoming[id].end == End::kCancelled);
    send_one(world, 10'000);  // the session goes on
  }
}

TEST_CASE("an offer that nobody takes ends at its deadline, and never begins later") {
  Simulator world{16, {}};
  world.side(1).accepts = false;
  const TransferId id = world.post(0, world.make_bytes(1000), 0, 300 * kMillisecond);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }, kSecond));
  CHECK(world.side(0).outgoing[id].end == End::kTimeout);
  REQUIRE(world.run([&] { return world.side(1).incoming[id].end != End::kPending; }, kSecond));
  CHECK(world.side(1).incoming[id].end == End::kTimeout);
  auto& memory = world.side(1).landed[id];
  CHECK_FALSE(world.side(1).session->accept(world.now(), id, Sink{{{memory.data(), memory.size()}}}, kSecond));
}

TEST_CASE("refused offers end at once") {
  Simulator world{17, {}};
  world.side(1).accepts = false;
  const TransferId id = world.post(0, world.make_bytes(1000));
  REQUIRE(world.run([&] { return world.side(1).offers[id] > 0; }, kSecond));
  CHECK(world.side(1).session->refuse(id));
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }, kSecond));
  CHECK(world.side(0).outgoing[id].end == End::kCancelled);
}

TEST_CASE("more than the receiver takes is refused without an allocation") {
  Config small;
  small.max_transfer_bytes = 1000;
  Simulator world{18, {}, Config{}, small};
  send_one(world, 1001, End::kCancelled);
  CHECK(world.side(1).offers.empty());
  CHECK(world.side(1).session->stats().bad_tickets == 1);
}

TEST_CASE("credit bounds what is in flight; none stops it; more lets it go on") {
  Config tight;
  tight.credit_bytes = 64 << 10;
  Simulator world{19, {}, Config{}, tight};
  const TransferId id = world.post(0, world.make_bytes(8 << 20));
  world.run([&] { return world.side(1).session->stats().payload_bytes_in > 1 << 20; });
  CHECK(world.side(0).session->stats().window_bytes <= 64 << 10);
  world.side(1).session->grant(0);
  const Nanoseconds then = world.now();
  world.run([&] { return world.now() > then + 50 * kMillisecond; });
  const auto before = world.side(1).session->stats().payload_bytes_in;
  world.run([&] { return world.now() > then + kSecond; });
  CHECK(world.side(1).session->stats().payload_bytes_in == before);
  CHECK(world.side(0).outgoing[id].end == End::kPending);
  world.side(1).session->grant(1 << 20);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end == End::kOk; }, kSecond));
}

TEST_CASE("nobody answers: connecting ends in PEER_LOST") {
  Simulator world{25, {.drop = 1.0}};
  const TransferId id = world.post(0, world.make_bytes(10));
  REQUIRE(world.run([&] { return world.side(0).closed != End::kPending && world.side(1).closed != End::kPending; }));
  CHECK(world.side(0).outgoing[id].end == End::kPeerLost);
  CHECK(world.now() < 6 * kSecond);
}

TEST_CASE("ends with different limits agree on the smaller frame, and on a digest that one wants") {
  Config jumbo, plain;
  jumbo.max_payload_bytes = 60'000;
  jumbo.digest = false;
  plain.max_payload_bytes = 1400;
  Simulator world{26, {}, jumbo, plain};
  const Run run = send_one(world, 100'000);
  CHECK(world.side(0).session->chunk_bytes() == 1400);
  CHECK(run.receiver.bad_tickets == 0);
}
