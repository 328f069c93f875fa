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

TEST_CASE("every length, by every way that this processor has") {
  std::vector<std::size_t> sizes{4095, 12287, 12288, 12289, 16256, 40000};
  for (std::size_t size = 0; size < 1100; ++size) sizes.push_back(size);
  for (const std::size_t size : sizes) {
    CAPTURE(size);
    const auto data = some_bytes(size);
    const std::uint32_t expected = reference(data);
    CHECK(genie::crc32c(data.data(), data.size()) == expected);
    for (const std::uint32_t found : genie::crc32c_in_every_way(data.data(), data.size())) CHECK(found == expected);
  }
}

TEST_CASE("pieces give what the whole gives, wherever they begin") {
  const auto data = some_bytes(30000);
  const std::uint32_t whole = reference(data);
  for (const std::size_t cut : {0UL, 1UL, 255UL, 12288UL, 29744UL, 29999UL}) {
    const std::uint32_t first = genie::crc32c(data.data(), cut);
    for (const std::uint32_t found : genie::crc32c_in_every_way(data.data() + cut, data.size() - cut, first)) {
      CHECK(found == whole);
    }
  }
}
