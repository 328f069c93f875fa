#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "simulator.h"

using namespace genie::protocol;
using genie::End;

namespace {

bool all_ended(const std::map<TransferId, Outcome>& outcomes) {
  for (const auto& [id, outcome] : outcomes) {
    if (outcome.end == End::kPending) return false;
  }
  return true;
}

void check_at_most_once(Side& side) {
  for (const auto& [id, count] : side.offers) CHECK(count == 1);
  for (const auto* outcomes : {&side.incoming, &side.outgoing}) {
    for (const auto& [id, outcome] : *outcomes) CHECK(outcome.times <= 1);
  }
}

// What arrived whole is what was sent.
void check_bytes(Side& receiver, TransferId id, const std::vector<std::byte>& sent) {
  REQUIRE(receiver.incoming[id].end == End::kOk);
  CHECK((receiver.landed[id] == sent));
}

struct Run {
  Stats sender, receiver;
  Nanoseconds took = 0;
};

Run send_one(Simulator& world, std::size_t size, End expected = End::kOk) {
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

double goodput(double drop, bool off_host) {
  Config config;
  config.off_host = off_host;
  Simulator world{7, {.drop = drop}, config};
  constexpr std::size_t kSize = 32 << 20;
  return static_cast<double>(kSize) / static_cast<double>(send_one(world, kSize).took);
}

}  // namespace

TEST_CASE("sizes around the borders of chunks arrive, also nothing") {
  for (const std::size_t size : {0, 1, 45, 8191, 8192, 8193, 16384, 100'000}) {
    Simulator world{1, {}};
    const Run run = send_one(world, size);
    CHECK(run.sender.chunks_sent_again == 0);
    CHECK(run.receiver.payload_bytes_in == size);
  }
}

TEST_CASE("without loss nothing is sent twice and the link is used") {
  Simulator world{2, {}};
  const Run run = send_one(world, 32 << 20);
  CHECK(run.sender.chunks_sent_again == 0);
  CHECK(run.sender.timeouts == 0);
  const double used = (32 << 20) / (static_cast<double>(run.took) * 1e-9) / 1.25e9;
  CHECK(used > 0.8);
}

TEST_CASE("loss, reordering, duplication and corruption: whole and equal") {
  struct Case {
    std::string name;
    Weather weather;
    std::size_t size;
  };
  const Case cases[] = {
      {"drop 0.1 %", {.drop = 0.001}, 8 << 20},
      {"drop 1 %", {.drop = 0.01}, 8 << 20},
      {"drop 30 %", {.drop = 0.3}, 1 << 20},
      {"reorder 20 %", {.reorder = 0.2}, 8 << 20},
      {"duplicate 20 %", {.duplicate = 0.2}, 8 << 20},
      {"corrupt 5 %", {.corrupt = 0.05}, 4 << 20},
      {"refuse 30 %", {.refuse = 0.3}, 4 << 20},
      {"all at once", {.drop = 0.05, .duplicate = 0.05, .corrupt = 0.05, .reorder = 0.1}, 2 << 20},
  };
  for (const Case& one : cases) {
    for (const bool off_host : {true, false}) {
      for (std::uint64_t seed = 1; seed <= 5; ++seed) {
        CAPTURE(one.name);
        CAPTURE(off_host);
        CAPTURE(seed);
        Config config;
        config.off_host = off_host;
        Simulator world{seed, one.weather, config};
        send_one(world, one.size);
      }
    }
  }
}

TEST_CASE("reordering alone is not taken for loss for long") {
  Simulator world{3, {.reorder = 0.1}};
  const Run run = send_one(world, 16 << 20);
  CHECK(run.sender.chunks_sent_again < 200);  // of 2048
}

TEST_CASE("what the driver has no room for is neither lost nor sent again") {
  Config config;
  config.max_retries = 2;   // which a frame that never left does not use up
  Simulator world{3, {.refuse = 0.5}, config};
  world.run([&] { return world.side(0).session->is_established(); });
  const Run run = send_one(world, 4 << 20);
  CHECK(run.sender.chunks_sent_again == 0);
  CHECK(run.receiver.duplicates == 0);
  CHECK(run.sender.payload_bytes_out == 4 << 20);
}

TEST_CASE("frames taken back that are no chunk under way change nothing") {
  Simulator world{3, {}};
  const auto& bytes = world.make_bytes(1 << 20);
  const TransferId id = world.post(0, bytes);
  for (int i = 0; i < 2000 && world.side(0).outgoing[id].end == End::kPending; ++i) {
    for (const std::uint64_t number : {std::uint64_t{0}, std::uint64_t{1}, ~std::uint64_t{0}}) {
      if (i > 100 || number != 1) world.side(0).session->take_back(number);
    }
    world.step();
  }
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }));
  check_bytes(world.side(1), id, bytes);
}

TEST_CASE("a stall of the other end is not taken for congestion once its answers have come") {
  Simulator world{3, {}};
  const auto& bytes = world.make_bytes(64 << 20);
  const TransferId id = world.post(0, bytes);
  Session& sender = *world.side(0).session;
  const auto sent = [&](std::uint64_t most) { return [&, most] { return sender.stats().payload_bytes_out > most; }; };
  REQUIRE(world.run(sent(8 << 20)));
  const std::uint64_t before = sender.stats().window_bytes;
  const Nanoseconds usual = world.weather.delay_ns;
  world.weather.delay_ns = 30 * kMillisecond;   // what is sent now comes after the timer has run out
  REQUIRE(world.run([&] { return sender.stats().timeouts > 0; }));
  world.weather.delay_ns = usual;
  REQUIRE(world.run(sent(sender.stats().payload_bytes_out)));   // the first that is new after the answers
  CHECK(sender.stats().window_bytes * 4 > before * 3);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }));
  check_bytes(world.side(1), id, bytes);
}

// In virtual time: properties of the protocol, not measurements.
TEST_CASE("property: goodput under loss") {
  for (const bool off_host : {true, false}) {
    CAPTURE(off_host);
    const double clean = goodput(0, off_host);
    CHECK(goodput(0.001, off_host) >= 0.8 * clean);
    CHECK(goodput(0.01, off_host) >= 0.5 * clean);
  }
}

TEST_CASE("property: a shallow queue is shared without drowning in loss") {
  Weather weather;
  weather.queue_bytes = 256 << 10;
  Simulator world{4, weather};
  const Run run = send_one(world, 32 << 20);
  CHECK(run.sender.chunks_sent_again * 10 < (32 << 20) / 8192);
  CHECK((32 << 20) / (static_cast<double>(run.took) * 1e-9) / 1.25e9 > 0.5);
}

TEST_CASE("property: delay is kept near its target, off-host") {
  Simulator world{5, {}};
  const Run run = send_one(world, 64 << 20);
  CHECK(run.sender.smoothed_rtt_ns < 500 * kMicrosecond);  // unloaded: 27 us; credit alone would queue 3.3 ms
}

TEST_CASE("an urgent transfer overtakes one that is under way") {
  Simulator world{6, {}};
  const auto& large = world.make_bytes(32 << 20);
  const auto& small = world.make_bytes(4096);
  const TransferId bulk = world.post(0, large, 2);
  world.run([&] { return world.side(1).session->stats().payload_bytes_in > 1 << 20; });
  const TransferId urgent = world.post(0, small, 0);
  REQUIRE(world.run([&] { return world.side(0).outgoing[urgent].end == End::kOk; }));
  CHECK(world.side(0).outgoing[bulk].end == End::kPending);
  REQUIRE(world.run([&] { return world.side(0).outgoing[bulk].end == End::kOk; }));
  CHECK(world.side(1).arrived == std::vector<TransferId>{urgent, bulk});
}

TEST_CASE("many transfers in both directions, in bad weather") {
  Simulator world{8, {.drop = 0.02, .duplicate = 0.02, .reorder = 0.05}};
  std::map<TransferId, const std::vector<std::byte>*> sent[2];
  for (int i = 0; i < 40; ++i) {
    for (const int from : {0, 1}) {
      const auto& bytes = world.make_bytes(static_cast<std::size_t>(i) * 3001);
      const TransferId id = world.post(from, bytes, static_cast<std::uint8_t>(i % 3));
      REQUIRE(id != 0);
      sent[from][id] = &bytes;
    }
  }
  REQUIRE(world.run([&] { return all_ended(world.side(0).outgoing) && all_ended(world.side(1).outgoing); }));
  for (const int from : {0, 1}) {
    for (const auto& [id, bytes] : sent[from]) {
      CHECK(world.side(from).outgoing[id].end == End::kOk);
      check_bytes(world.side(1 - from), id, *bytes);
    }
    check_at_most_once(world.side(from));
  }
}

TEST_CASE("tickets name the transfer of their priority before them") {
  Simulator world{9, {}};
  for (const int priority : {0, 2, 0, 2, 2}) (void)world.post(0, world.make_bytes(10), static_cast<std::uint8_t>(priority));
  REQUIRE(world.run([&] { return all_ended(world.side(0).outgoing); }));
  // Ids are given in the order of posting, offers go out by priority.
  auto& tickets = world.side(1).tickets;
  CHECK(tickets[1].after == 0);
  CHECK(tickets[3].after == 1);
  CHECK(tickets[2].after == 0);
  CHECK(tickets[4].after == 2);
  CHECK(tickets[5].after == 4);
  for (TransferId id = 0; id <= 5; ++id) CHECK(world.side(1).session->has_ended(id));
  CHECK_FALSE(world.side(1).session->has_ended(6));
}

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

TEST_CASE("chunks that never match end in CORRUPT on both ends") {
  Simulator world{20, {}};
  const TransferId id = world.post(0, world.make_bytes(64 << 10));
  world.side(1).accepts = true;
  // Every bit of a chunk's payload may flip; control frames are small enough to get through now and then.
  world.weather.corrupt = 1.0;
  world.run([&] { return all_ended(world.side(0).outgoing); }, 20 * kSecond);
  const End end = world.side(0).outgoing[id].end;
  CHECK((end == End::kCorrupt || end == End::kPeerLost || end == End::kTimeout));

  Config config;
  config.max_corrupt_in_a_row = 4;
  Simulator other{21, {}, config};
  auto& bytes = const_cast<std::vector<std::byte>&>(other.make_bytes(1 << 20));
  const TransferId second = other.post(0, bytes);
  REQUIRE(other.run([&] { return other.side(1).session->stats().payload_bytes_in > 0; }));
  // A wrong epoch: the digests of everything that follows are those of another tensor.
  auto frame = other.last_frame_to(1);
  for (int i = 0; i < 6; ++i) {
    Header header;
    std::memcpy(&header, frame.data(), kHeaderBytes);
    if (header.type != static_cast<std::uint8_t>(FrameType::kData)) break;
    header.chunk = header.total - 1 - static_cast<std::uint32_t>(i);
    header.chunk = std::min(header.chunk, 100u - static_cast<std::uint32_t>(i));
    header.offset = std::uint64_t{header.chunk} * 8192;
    write_header(header, std::span<std::byte, kHeaderBytes>{frame.data(), kHeaderBytes});
    other.side(1).session->on_frame(other.now(), frame);
  }
  REQUIRE(other.run([&] { return all_ended(other.side(0).outgoing) && all_ended(other.side(1).incoming); }));
  CHECK(other.side(1).session->stats().bad_digests >= 5);
  CHECK(other.side(0).outgoing[second].end == End::kCorrupt);
  CHECK(other.side(1).incoming[second].end == End::kCorrupt);
}

TEST_CASE("frames that contradict the ticket, the window or the protocol change nothing") {
  Simulator world{22, {}};
  const auto& bytes = world.make_bytes(1 << 20);
  const TransferId id = world.post(0, bytes);
  world.run([&] { return world.side(1).session->stats().payload_bytes_in > 200'000; });
  auto data = world.last_frame_to(1);
  ParsedFrame parsed;
  REQUIRE(parse_frame(data, parsed) == ParseStatus::kOk);
  REQUIRE(parsed.header.type == static_cast<std::uint8_t>(FrameType::kData));
  const auto before = world.side(1).session->stats();
  const auto forge = [&](auto change) {
    auto forged = data;
    Header header = parsed.header;
    change(header);
    write_header(header, std::span<std::byte, kHeaderBytes>{forged.data(), kHeaderBytes});
    world.side(1).session->on_frame(world.now(), forged);
  };
  forge([](Header& h) { h.total += 1; });
  forge([](Header& h) { h.offset += 1; });
  forge([](Header& h) { h.offset = ~0ull - 10; });
  forge([](Header& h) { h.payload_bytes -= 1; });
  forge([](Header& h) { h.chunk = h.total; });
  forge([](Header& h) { h.chunk = ~0u; h.offset = std::uint64_t{h.chunk} * 8192; });
  forge([](Header& h) { h.flags = 0; h.header_bytes = kHeaderBytes; });  // without the digest that was agreed on
  CHECK(world.side(1).session->stats().bad_tickets == before.bad_tickets + 7);
  forge([](Header& h) { h.incarnation += 1; });
  CHECK(world.side(1).session->stats().stale_frames == before.stale_frames + 1);
  forge([](Header& h) { h.transfer = 999; });  // answered by a reset, which ends nothing here
  CHECK(world.side(1).session->stats().payload_bytes_in == before.payload_bytes_in);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end != End::kPending; }));
  check_bytes(world.side(1), id, bytes);
}

TEST_CASE("a replay of everything that was ever sent delivers nothing again") {
  Simulator world{23, {.duplicate = 1.0}};
  const auto& bytes = world.make_bytes(100'000);
  const TransferId id = world.post(0, bytes);
  std::vector<std::vector<std::byte>> tape;
  while (world.side(0).outgoing[id].end == End::kPending) {
    REQUIRE(world.step());
    if (tape.empty() || tape.back() != world.last_frame_to(1)) tape.push_back(world.last_frame_to(1));
  }
  const auto received = world.side(1).session->stats().payload_bytes_in;
  for (const auto& frame : tape) world.inject(1, frame);
  const Nanoseconds then = world.now();
  world.run([&] { return world.now() > then + 100 * kMillisecond; });
  CHECK(world.side(1).session->stats().payload_bytes_in == received);
  check_at_most_once(world.side(1));
  CHECK(world.side(1).closed == End::kPending);
}

TEST_CASE("a forged acknowledgement of what was never sent ends nothing") {
  Simulator world{24, {}};
  const TransferId id = world.post(0, world.make_bytes(32 << 20));
  world.run([&] { return world.side(1).session->stats().payload_bytes_in > 200'000; });
  Sack sack;
  sack.transfer = id;
  sack.cumulative = 32 << 20 >> 13;  // all of it
  Header header;
  header.session = world.side(0).session->id();
  header.incarnation = 2002;
  header.transfer = id;
  header.credit = 1024;
  OutgoingFrame forged;
  write_control_frame(header, FrameType::kAck, {}, &sack, forged);
  std::vector<std::byte> bytes(forged.size_bytes());
  forged.copy_to(bytes.data());
  world.side(0).session->on_frame(world.now(), bytes);
  CHECK(world.side(0).session->stats().bad_tickets == 1);
  CHECK(world.side(0).outgoing[id].end == End::kPending);
  REQUIRE(world.run([&] { return world.side(0).outgoing[id].end == End::kOk; }));
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
