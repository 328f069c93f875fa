// A peer that says anything: the input is cut into frames whose checksums are made right, so that they get past the
// parser to the state machine. Whatever comes, memory stays where it was offered, and every transfer ends once.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <vector>

#include "protocol/session.h"

using namespace genie::protocol;

namespace {

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : left_{data, size} {}
  [[nodiscard]] bool is_empty() const { return left_.empty(); }
  template <typename T>
  T take() {
    T value{};
    const std::size_t size = std::min(sizeof value, left_.size());
    std::memcpy(&value, left_.data(), size);
    left_ = left_.subspan(size);
    return value;
  }

 private:
  std::span<const std::uint8_t> left_;
};

// A frame whose fields the input chooses, small numbers for the most part, and whose sums are right.
std::vector<std::byte> make_frame(Input& input) {
  Header header;
  header.type = static_cast<std::uint8_t>(1 + input.take<std::uint8_t>() % kLastFrameType);
  header.session = 1;
  header.incarnation = input.take<std::uint8_t>() % 8 == 0 ? 4 : 3;
  header.transfer = input.take<std::uint8_t>() % 8;
  header.chunk = input.take<std::uint8_t>() < 250 ? input.take<std::uint8_t>() : input.take<std::uint32_t>();
  header.total = input.take<std::uint8_t>() < 250 ? input.take<std::uint8_t>() : input.take<std::uint32_t>();
  header.offset = input.take<std::uint8_t>() < 250 ? std::uint64_t{header.chunk} * 512 : input.take<std::uint64_t>();
  header.credit = input.take<std::uint16_t>();
  header.flags = kFlagDigest;
  header.header_bytes = kHeaderBytes + kDigestBytes;
  std::vector<std::byte> body;
  const auto add = [&](auto&& bytes) { body.insert(body.end(), bytes.begin(), bytes.end()); };
  switch (static_cast<FrameType>(header.type)) {
    case FrameType::kHello:
    case FrameType::kHelloAck: {
      std::array<std::byte, kHelloBytes> hello;
      write_hello({.max_payload_bytes = input.take<std::uint16_t>(), .heard_incarnation = 9, .digest = true}, hello);
      add(hello);
      break;
    }
    case FrameType::kOpen: {
      Ticket ticket;
      ticket.size_bytes = input.take<std::uint8_t>() < 250 ? input.take<std::uint16_t>() : input.take<std::uint64_t>();
      ticket.chunk_bytes = input.take<std::uint8_t>() < 250 ? 512 : input.take<std::uint32_t>();
      std::array<std::byte, kTicketBytes> bytes;
      write_ticket(ticket, bytes);
      add(bytes);
      break;
    }
    case FrameType::kCancel:
    case FrameType::kReset: {
      std::array<std::byte, kResetBytes> bytes;
      const auto reason = static_cast<ResetReason>(1 + input.take<std::uint8_t>() % kLastResetReason);
      write_reset({.reason = reason, .heard_incarnation = input.take<std::uint8_t>() % 8 == 0 ? 1u : 9u}, bytes);
      add(bytes);
      break;
    }
    case FrameType::kAck: {
      Sack sack;
      sack.transfer = header.transfer;
      sack.cumulative = header.chunk;
      sack.trigger = input.take<std::uint8_t>();
      sack.trigger_try = input.take<std::uint8_t>() % 4;
      sack.words = input.take<std::uint8_t>() % (kSackWords + 1);
      for (std::size_t i = 0; i < sack.words; ++i) sack.bitmap[i] = input.take<std::uint64_t>();
      body.resize(kMaxSackBytes);
      body.resize(write_sack(sack, body));
      header.flags |= kFlagSack;
      break;
    }
    default:
      body.resize(header.type == static_cast<std::uint8_t>(FrameType::kData) ? input.take<std::uint16_t>() % 600 : 0);
      break;
  }
  header.payload_bytes = static_cast<std::uint16_t>((header.flags & kFlagSack) != 0 ? 0 : body.size());
  Digest digest{header, 0};
  digest.feed(body);
  const std::uint32_t value = digest.value();
  std::vector<std::byte> frame(kHeaderBytes + kDigestBytes);
  write_header(header, std::span<std::byte, kHeaderBytes>{frame.data(), kHeaderBytes});
  std::memcpy(frame.data() + kHeaderBytes, &value, sizeof value);
  frame.insert(frame.end(), body.begin(), body.end());
  return frame;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input{data, size};
  Config config;
  config.max_payload_bytes = 512;
  config.max_transfers = 4;
  config.max_transfer_bytes = 1 << 16;
  config.off_host = input.take<std::uint8_t>() % 2 == 0;
  Nanoseconds now = 1;
  Session session{config, Role::kWaits, 1, 9, now};
  const std::vector<std::byte> source(5000);
  std::map<TransferId, std::vector<std::byte>> landing;
  std::map<std::pair<Direction, TransferId>, int> ends;
  int posted = 0;
  const auto take_events = [&] {
    for (Event event; session.next_event(event);) {
      if (event.kind == EventKind::kOffered) {
        if (event.ticket.size_bytes > config.max_transfer_bytes || landing.contains(event.transfer)) __builtin_trap();
        auto& memory = landing[event.transfer];
        memory.resize(event.ticket.size_bytes);
        if (!session.accept(now, event.transfer, Sink{{{memory.data(), memory.size()}}}, kSecond)) __builtin_trap();
      } else if (event.kind == EventKind::kEnded && ++ends[{event.direction, event.transfer}] > 1) {
        __builtin_trap();
      }
    }
  };
  while (!input.is_empty()) {
    const auto choice = input.take<std::uint8_t>();
    if (choice < 16) {
      posted += session.post(now, Source{{{source.data(), source.size()}}}, {}, kSecond) != 0 ? 1 : 0;
    } else if (choice < 24) {
      (void)session.cancel(now, choice % 2 == 0 ? Direction::kOutgoing : Direction::kIncoming, choice % 4 + 1u);
    } else if (choice < 40) {
      now += input.take<std::uint32_t>();
    } else {
      session.on_frame(now, make_frame(input));
    }
    session.on_time(now);
    OutgoingFrame frame;
    std::array<std::byte, 2048> out;
    for (int i = 0; i < 64 && session.next_frame(now, frame); ++i) frame.copy_to(out.data());
    take_events();
    (void)session.next_time(now);
  }
  session.close();
  take_events();
  int outgoing = 0;
  for (const auto& [which, count] : ends) outgoing += which.first == Direction::kOutgoing ? count : 0;
  if (outgoing != posted) __builtin_trap();
  return 0;
}
