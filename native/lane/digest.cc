#include "lane/digest.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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
// shifted over a block of zeros, which is linear: four table look-ups for a fixed block size. Long blocks for what is
// long, short ones for what they leave.
constexpr std::size_t kLongBlock = 4096, kShortBlock = 256;

constexpr std::uint32_t shift_bit_by_bit(std::uint32_t crc, std::size_t zeros) {
  for (std::size_t i = 0; i < zeros; ++i) crc = (crc >> 8) ^ kTables[0][crc & 0xFFU];
  return crc;
}

struct ShiftTable {
  std::array<std::array<std::uint32_t, 256>, 4> part{};
};

template <std::size_t block>
const ShiftTable& shift_table() {
  static const ShiftTable table = [] {
    ShiftTable made;
    for (std::uint32_t byte = 0; byte < 4; ++byte) {
      for (std::uint32_t i = 0; i < 256; ++i) made.part[byte][i] = shift_bit_by_bit(i << (8 * byte), block);
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

// Takes what it can off the front of data.
template <std::size_t block>
__attribute__((target("sse4.2"))) std::uint64_t by_three(const unsigned char*& data, std::size_t& size,
                                                         std::uint64_t a) noexcept {
  if (size < 3 * block) return a;
  const ShiftTable& table = shift_table<block>();
  for (; size >= 3 * block; data += 3 * block, size -= 3 * block) {
    std::uint64_t b = 0;
    std::uint64_t c = 0;
    for (std::size_t i = 0; i < block; i += 8) {
      a = _mm_crc32_u64(a, load64(data + i));
      b = _mm_crc32_u64(b, load64(data + block + i));
      c = _mm_crc32_u64(c, load64(data + 2 * block + i));
    }
    a = shift(table, static_cast<std::uint32_t>(a)) ^ b;
    a = shift(table, static_cast<std::uint32_t>(a)) ^ c;
  }
  return a;
}

__attribute__((target("sse4.2"))) std::uint32_t by_instruction(const unsigned char* data, std::size_t size,
                                                               std::uint32_t crc) noexcept {
  std::uint64_t a = by_three<kLongBlock>(data, size, crc);
  a = by_three<kShortBlock>(data, size, a);
  for (; size >= 8; data += 8, size -= 8) a = _mm_crc32_u64(a, load64(data));
  auto narrow = static_cast<std::uint32_t>(a);
  for (; size > 0; ++data, --size) narrow = _mm_crc32_u8(narrow, *data);
  return narrow;
}

// Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", 2009): 256 bytes at a time
// are multiplied by x^2048 and added to the next 256, which leaves the CRC of the whole as it is. What is left in the
// end is 256 bytes with that CRC.
constexpr std::size_t kFold = 256;

// x^power modulo the polynomial, reflected, and shifted by the bit that a product of reflected factors lacks.
constexpr std::uint64_t power_of_x(unsigned power) {
  std::uint32_t value = 0x80000000U;
  for (unsigned i = 0; i < power; ++i) value = (value >> 1) ^ ((value & 1U) != 0 ? kPolynomial : 0U);
  return std::uint64_t{value} << 1;
}

__attribute__((target("sse4.2,avx512f,vpclmulqdq"))) std::uint32_t by_folding(const unsigned char* data,
                                                                              std::size_t size,
                                                                              std::uint32_t crc) noexcept {
  constexpr unsigned kBits = 8 * kFold;
  constexpr auto kLow = static_cast<long long>(power_of_x(kBits + 32));    // for the first 8 bytes of 16
  constexpr auto kHigh = static_cast<long long>(power_of_x(kBits - 32));
  const __m512i factor = _mm512_set_epi64(kHigh, kLow, kHigh, kLow, kHigh, kLow, kHigh, kLow);
  __m512i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = _mm512_loadu_si512(data + 64 * i);
  lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  for (data += kFold, size -= kFold; size >= kFold; data += kFold, size -= kFold) {
    for (int i = 0; i < 4; ++i) {
      const __m512i low = _mm512_clmulepi64_epi128(lanes[i], factor, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(lanes[i], factor, 0x11);
      constexpr int kXorOfThree = 0x96;
      lanes[i] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(data + 64 * i), kXorOfThree);
    }
  }
  alignas(64) unsigned char left[kFold];
  for (int i = 0; i < 4; ++i) _mm512_store_si512(left + 64 * i, lanes[i]);
  return by_instruction(data, size, by_instruction(left, kFold, 0));
}

bool has_instruction() noexcept { return __builtin_cpu_supports("sse4.2") != 0; }
bool has_folding() noexcept {
  return has_instruction() && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("vpclmulqdq") != 0;
}
#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size_bytes, std::uint32_t crc) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  static const bool folds = has_folding();
  static const bool counts = has_instruction();
  if (folds && size_bytes >= kFold) return ~by_folding(bytes, size_bytes, ~crc);
  if (counts) return ~by_instruction(bytes, size_bytes, ~crc);
#endif
  return ~by_table(bytes, size_bytes, ~crc);
}

std::vector<std::uint32_t> crc32c_in_every_way(const void* data, std::size_t size_bytes, std::uint32_t crc) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::vector<std::uint32_t> found{~by_table(bytes, size_bytes, ~crc)};
#if defined(__x86_64__)
  if (has_instruction()) found.push_back(~by_instruction(bytes, size_bytes, ~crc));
  if (has_folding() && size_bytes >= kFold) found.push_back(~by_folding(bytes, size_bytes, ~crc));
#endif
  return found;
}

}  // namespace genie
