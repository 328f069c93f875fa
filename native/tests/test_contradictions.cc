// Frames that cannot be: corrupted, contradicting, replayed, forged.
#include <cstring>

#include "tests/checks.h"

using namespace genie::protocol;
using genie::End;

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
