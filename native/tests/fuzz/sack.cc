// Bytes to the SACK parser; what it takes must be what would have been written.
#include <cstdint>
#include <cstring>
#include <span>

#include "protocol/frame.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace genie::protocol;
  Sack sack;
  if (parse_sack(std::as_bytes(std::span{data, size}), sack) != ParseStatus::kOk) return 0;
  std::array<std::byte, kMaxSackBytes> again;
  if (write_sack(sack, again) != size || std::memcmp(again.data(), data, size) != 0) __builtin_trap();
  return 0;
}
