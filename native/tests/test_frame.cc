#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <vector>

#include "protocol/frame.h"
#include "protocol/shared.h"

using namespace genie::protocol;

namespace {

std::vector<std::byte> sack_frame() {
  OutgoingFrame frame;
  Sack sack;
  sack.transfer = 7;
  sack.cumulative = 100;
  sack.trigger = 130;
  sack.words = 1;
  sack.bitmap[0] = 1ull << 30;
  Header header;
  header.session = 0xABCDEF;
  header.incarnation = 5;
  header.transfer = 7;
  write_control_frame(header, FrameType::kAck, {}, &sack, frame);
  std::vector<std::byte> bytes(frame.size_bytes());
  frame.copy_to(bytes.data());
  return bytes;
}

}  // namespace

TEST_CASE("the header stands on the wire as the format says") {
  Header header;
  header.type = 4;
  header.session = 0x0102030405060708;
  header.payload_bytes = 0x1112;
  header.credit = 0x2122;
  std::array<std::byte, kHeaderBytes> out;
  write_header(header, out);
  CHECK(out[0] == std::byte{0x47});
  CHECK(out[1] == std::byte{0x6E});
  CHECK(out[2] == std::byte{1});
  CHECK(out[3] == std::byte{4});
  CHECK(out[8] == std::byte{0x08});
  CHECK(out[15] == std::byte{0x01});
  CHECK(out[40] == std::byte{0x12});
  CHECK(out[42] == std::byte{0x22});
}

TEST_CASE("a frame parses to what was written, also with Ethernet's padding after it") {
  auto bytes = sack_frame();
  for (int padding = 0; padding < 2; ++padding) {
    ParsedFrame frame;
    REQUIRE(parse_frame(bytes, frame) == ParseStatus::kOk);
    CHECK(frame.header.session == 0xABCDEF);
    CHECK(frame.header.transfer == 7);
    Digest digest{frame.header, 0};
    digest.feed(frame.digested);
    CHECK(digest.value() == frame.digest);
    Sack sack;
    REQUIRE(parse_sack(frame.trailer, sack) == ParseStatus::kOk);
    CHECK(sack.cumulative == 100);
    CHECK(sack.trigger == 130);
    CHECK(sack.bitmap[0] == 1ull << 30);
    bytes.resize(bytes.size() + 18, std::byte{0xFF});
  }
}

TEST_CASE("no single flipped bit goes unnoticed") {
  const auto good = sack_frame();
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    auto bytes = good;
    bytes[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
    ParsedFrame frame;
    if (parse_frame(bytes, frame) != ParseStatus::kOk) continue;
    Digest digest{frame.header, 0};
    digest.feed(frame.digested);
    CHECK_MESSAGE(digest.value() != frame.digest, "bit " << bit);
  }
}

TEST_CASE("cut short anywhere it does not parse") {
  const auto good = sack_frame();
  for (std::size_t size = 0; size < good.size(); ++size) {
    ParsedFrame frame;
    const std::vector<std::byte> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(parse_frame(cut, frame) != ParseStatus::kOk);
  }
}

TEST_CASE("a digest is bound to session, transfer, chunk and epoch") {
  Header header;
  header.session = 1;
  header.transfer = 2;
  header.chunk = 3;
  const std::array<std::byte, 5> data{};
  const auto digest = [&](const Header& of, std::uint64_t epoch) {
    Digest sum{of, epoch};
    sum.feed(data);
    return sum.value();
  };
  const auto right = digest(header, 9);
  CHECK(digest(header, 10) != right);
  CHECK(digest(header, 9 + (1ull << 40)) != right);
  Header other = header;
  other.session = 4;
  CHECK(digest(other, 9) != right);
  other = header;
  other.transfer = 4;
  CHECK(digest(other, 9) != right);
  other = header;
  other.chunk = 4;
  CHECK(digest(other, 9) != right);
}

TEST_CASE("a ticket whose numbers contradict each other or the limits is refused") {
  const TicketLimits limits{.max_bytes = 1 << 20, .max_chunk_bytes = 8192};
  Ticket good;
  good.size_bytes = 100'000;
  good.chunk_bytes = 4096;
  good.after = 6;
  good.epoch = 3;
  good.tag = 8;
  good.priority = 2;
  std::array<std::byte, kTicketBytes> bytes;
  write_ticket(good, bytes);
  Ticket read;
  REQUIRE(parse_ticket(bytes, limits, read) == ParseStatus::kOk);
  CHECK(read.size_bytes == good.size_bytes);
  CHECK(read.after == 6);
  CHECK(read.epoch == 3);
  CHECK(read.tag == 8);
  CHECK(read.priority == 2);
  CHECK(read.num_chunks() == 25);
  CHECK(read.bytes_of(24) == 100'000 - 24 * 4096);

  const auto status_with = [&](std::size_t at, std::uint64_t value, std::size_t size) {
    auto changed = bytes;
    std::memcpy(changed.data() + at, &value, size);
    return parse_ticket(changed, limits, read);
  };
  CHECK(status_with(4, 0, 4) == ParseStatus::kBadContent);                  // chunks of nothing
  CHECK(status_with(4, 8193, 4) == ParseStatus::kBadContent);               // more than a frame
  CHECK(status_with(8, (1 << 20) + 1, 8) == ParseStatus::kBadContent);      // more than is taken
  CHECK(status_with(8, ~0ull, 8) == ParseStatus::kBadContent);
  CHECK(status_with(16, 24, 4) == ParseStatus::kBadContent);                // another number of chunks
  CHECK(status_with(0, 0, 2) == ParseStatus::kBadMagic);
  CHECK(status_with(2, 2, 1) == ParseStatus::kBadVersion);
  CHECK(parse_ticket(std::span{bytes}.first(kTicketBytes - 1), limits, read) == ParseStatus::kBadLength);
}

TEST_CASE("a SACK says a thing in one way") {
  Sack sack;
  sack.words = 2;
  sack.bitmap[1] = 1;
  std::array<std::byte, kMaxSackBytes> bytes;
  const std::size_t size = write_sack(sack, bytes);
  const std::span<const std::byte> whole{bytes.data(), size};
  REQUIRE(parse_sack(whole, sack) == ParseStatus::kOk);
  CHECK(parse_sack(whole.first(size - 1), sack) == ParseStatus::kBadLength);
  bytes[kSackHeadBytes] = std::byte{1};  // the chunk that `cumulative` says is missing
  CHECK(parse_sack(whole, sack) == ParseStatus::kBadContent);
  bytes[kSackHeadBytes] = std::byte{0};
  bytes[kSackHeadBytes + 8] = std::byte{0};  // an empty last word
  CHECK(parse_sack(whole, sack) == ParseStatus::kBadContent);
  bytes[16] = std::byte{17};
  CHECK(parse_sack(whole, sack) == ParseStatus::kBadLength);
}
