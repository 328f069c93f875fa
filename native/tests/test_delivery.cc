// What arrives, how fast and in which order, whatever happens on the way.
#include <string>

#include "tests/checks.h"

using namespace genie::protocol;
using genie::End;

namespace {

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
