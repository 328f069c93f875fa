// Bytes from the wire to the frame parser, as they are and with magic and header sum made right: a fuzzer finds no CRC.
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "protocol/frame.h"

using namespace genie::protocol;

namespace {

void parse(std::span<const std::byte> bytes) {
  ParsedFrame frame;
  if (parse_frame(bytes, frame) != ParseStatus::kOk) return;
  Digest digest{frame.header, 0};
  digest.feed(frame.digested);  // reads all of it
  if (frame.payload.size() != frame.header.payload_bytes) __builtin_trap();
  if (frame.digested.size() != frame.payload.size() + frame.trailer.size()) __builtin_trap();
  if (frame.digested.data() + frame.digested.size() > bytes.data() + bytes.size()) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  parse(std::as_bytes(std::span{data, size}));
  if (size < kHeaderBytes) return 0;
  const auto raw = std::as_bytes(std::span{data, size});
  std::vector<std::byte> bytes(raw.begin(), raw.end());
  Header header;
  std::memcpy(&header, bytes.data(), kHeaderBytes);
  header.magic = kMagic;
  header.version = kVersion;
  write_header(header, std::span<std::byte, kHeaderBytes>{bytes.data(), kHeaderBytes});
  parse(bytes);
  return 0;
}
