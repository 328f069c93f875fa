#include <doctest/doctest.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "lane/digest.h"

namespace {

// The definition, bit by bit.
std::uint32_t reference(const std::vector<unsigned char>& data) {
  std::uint32_t crc = ~0U;
  for (const unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0x82F63B78U : 0U);
  }
  return ~crc;
}

std::vector<unsigned char> some_bytes(std::size_t size) {
  std::vector<unsigned char> data(size);
  std::uint32_t state = 12345;
  for (unsigned char& byte : data) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<unsigned char>(state >> 24);
  }
  return data;
}

}  // namespace

TEST_CASE("the check value of the standard") {
  constexpr std::string_view digits = "123456789";
  CHECK(genie::crc32c(digits.data(), digits.size()) == 0xE3069283U);
}

TEST_CASE("every length, also those that take the interleaved way") {
  for (const std::size_t size : {0UL, 1UL, 7UL, 8UL, 9UL, 4095UL, 12287UL, 12288UL, 12289UL, 40000UL}) {
    const auto data = some_bytes(size);
    CHECK(genie::crc32c(data.data(), data.size()) == reference(data));
  }
}

TEST_CASE("pieces give what the whole gives") {
  const auto data = some_bytes(30000);
  for (const std::size_t cut : {0UL, 1UL, 12288UL, 29999UL}) {
    const std::uint32_t first = genie::crc32c(data.data(), cut);
    CHECK(genie::crc32c(data.data() + cut, data.size() - cut, first) == genie::crc32c(data.data(), data.size()));
  }
}
