#include "lane/digest.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace genie {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78U;   // reflected

constexpr std::array<std::array<std::uint32_t, 256>, 8> make_tables() {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? kPolynomial : 0U);
    tables[0][i] = crc;
  }
  for (std::size_t t = 1; t < 8; ++t) {
    for (std::size_t i = 0; i < 256; ++i) {
      const std::uint32_t before = tables[t - 1][i];
      tables[t][i] = (before >> 8) ^ tables[0][before & 0xFFU];
    }
  }
  return tables;
}

constexpr auto kTables = make_tables();

std::uint32_t by_table(const unsigned char* data, std::size_t size, std::uint32_t crc) noexcept {
  for (; size >= 8; data += 8, size -= 8) {
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = kTables[7][low & 0xFFU] ^ kTables[6][(low >> 8) & 0xFFU] ^ kTables[5][(low >> 16) & 0xFFU] ^
          kTables[4][low >> 24] ^ kTables[3][high & 0xFFU] ^ kTables[2][(high >> 8) & 0xFFU] ^
          kTables[1][(high >> 16) & 0xFFU] ^ kTables[0][high >> 24];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFFU];
  return crc;
}

#if defined(__x86_64__)
// The instruction has a latency of three cycles: three independent streams keep it busy. Joining them needs the CRC
// shifted over a block of zeros, which is linear: four table look-ups for a fixed block size.
constexpr std::size_t kBlock = 4096;

constexpr std::uint32_t shift_bit_by_bit(std::uint32_t crc, std::size_t zeros) {
  for (std::size_t i = 0; i < zeros; ++i) crc = (crc >> 8) ^ kTables[0][crc & 0xFFU];
  return crc;
}

struct ShiftTable {
  std::array<std::array<std::uint32_t, 256>, 4> part{};
};

const ShiftTable& shift_table() {
  static const ShiftTable table = [] {
    ShiftTable made;
    for (std::uint32_t byte = 0; byte < 4; ++byte) {
      for (std::uint32_t i = 0; i < 256; ++i) made.part[byte][i] = shift_bit_by_bit(i << (8 * byte), kBlock);
    }
    return made;
  }();
  return table;
}

std::uint32_t shift(const ShiftTable& table, std::uint32_t crc) noexcept {
  return table.part[0][crc & 0xFFU] ^ table.part[1][(crc >> 8) & 0xFFU] ^ table.part[2][(crc >> 16) & 0xFFU] ^
         table.part[3][crc >> 24];
}

std::uint64_t load64(const unsigned char* data) noexcept {
  std::uint64_t word = 0;
  std::memcpy(&word, data, sizeof word);
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t by_instruction(const unsigned char* data, std::size_t size,
                                                               std::uint32_t crc) noexcept {
  std::uint64_t a = crc;
  if (size >= 3 * kBlock) {
    const ShiftTable& table = shift_table();
    for (; size >= 3 * kBlock; data += 3 * kBlock, size -= 3 * kBlock) {
      std::uint64_t b = 0;
      std::uint64_t c = 0;
      for (std::size_t i = 0; i < kBlock; i += 8) {
        a = _mm_crc32_u64(a, load64(data + i));
        b = _mm_crc32_u64(b, load64(data + kBlock + i));
        c = _mm_crc32_u64(c, load64(data + 2 * kBlock + i));
      }
      a = shift(table, static_cast<std::uint32_t>(a)) ^ b;
      a = shift(table, static_cast<std::uint32_t>(a)) ^ c;
    }
  }
  for (; size >= 8; data += 8, size -= 8) a = _mm_crc32_u64(a, load64(data));
  auto narrow = static_cast<std::uint32_t>(a);
  for (; size > 0; ++data, --size) narrow = _mm_crc32_u8(narrow, *data);
  return narrow;
}
#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size_bytes, std::uint32_t crc) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) return ~by_instruction(bytes, size_bytes, ~crc);
#endif
  return ~by_table(bytes, size_bytes, ~crc);
}

}  // namespace genie
