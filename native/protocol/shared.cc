#include "protocol/shared.h"

#include <algorithm>
#include <cstring>

namespace genie::protocol {

Header Shared::header(FrameType type) const noexcept {
  Header header;
  header.type = static_cast<std::uint8_t>(type);
  header.session = session;
  header.incarnation = incarnation;
  header.credit = static_cast<std::uint16_t>(std::min<std::uint32_t>(credit_bytes / kCreditUnitBytes, 0xFFFF));
  return header;
}

void Shared::write_control(FrameType type, TransferId transfer, std::span<const std::byte> payload, const Sack* sack,
                           OutgoingFrame& frame) noexcept {
  Header head = header(type);
  head.transfer = transfer;
  write_control_frame(head, type, payload, sack, frame);
  ++stats.frames_out;
}

void write_control_frame(Header header, FrameType type, std::span<const std::byte> payload, const Sack* sack,
                         OutgoingFrame& frame) noexcept {
  constexpr std::size_t kHead = kHeaderBytes + kDigestBytes;
  header.type = static_cast<std::uint8_t>(type);
  header.flags = kFlagDigest;
  header.header_bytes = kHead;
  header.payload_bytes = static_cast<std::uint16_t>(payload.size());
  const std::span<std::byte> out{frame.head};
  std::size_t end = kHead + payload.size();
  if (!payload.empty()) std::memcpy(out.data() + kHead, payload.data(), payload.size());
  if (sack != nullptr) {
    header.flags |= kFlagSack;
    end += write_sack(*sack, out.subspan(end));
  }
  Digest digest{header, 0};
  digest.feed(out.subspan(kHead, end - kHead));
  const std::uint32_t value = digest.value();
  std::memcpy(out.data() + kHeaderBytes, &value, sizeof value);
  write_header(header, out.first<kHeaderBytes>());
  frame.head_bytes = static_cast<std::uint32_t>(end);
  frame.source = nullptr;
  frame.payload_bytes = 0;
  frame.transmission = 0;
}

}  // namespace genie::protocol
