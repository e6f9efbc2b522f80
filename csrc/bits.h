// One bit per element, LSB first: eight bytes of 0 or 1 <-> one byte, whole tiles and whole buffers.
#pragma once

#include <array>
#include <bit>
#include <cstring>

#include "core.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dwm::DWM_ISA {

static_assert(std::endian::native == std::endian::little, "bit order and byte tricks assume a little-endian machine");

static inline uint64_t load64(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

static inline void store64(uint8_t* p, uint64_t x) { std::memcpy(p, &x, 8); }

// Eight bytes of 0 or 1 -> one byte: the product moves byte i's bit to bit 56 + i.
static inline uint8_t pack8(uint64_t bytes) { return static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56); }

// Any nonzero byte -> 1.
static inline uint64_t normalize8(uint64_t bytes) {
  constexpr uint64_t k7F = 0x7F7F7F7F7F7F7F7Fu;
  return ((((bytes & k7F) + k7F) | bytes) >> 7) & 0x0101010101010101u;
}

static constexpr std::array<uint64_t, 256> make_unpack_table() {
  std::array<uint64_t, 256> table{};
  for (uint64_t byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 8; ++i) table[byte] |= ((byte >> i) & 1u) << (8 * i);
  }
  return table;
}

inline constexpr std::array<uint64_t, 256> kUnpack = make_unpack_table();

// n bytes (nonzero = 1) -> bits; the last byte is padded with zero bits.
DWM_NOINLINE static void pack_bytes(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  int64_t i = 0;
#if defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto word_at = [&](int64_t at) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, zero)));
  };
  for (; i + 128 <= n; i += 128) {
    const uint32_t words[4] = {word_at(i), word_at(i + 32), word_at(i + 64), word_at(i + 96)};
    std::memcpy(bits + i / 8, words, sizeof(words));
  }
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = word_at(i);
    std::memcpy(bits + i / 8, &word, 4);
  }
#endif
  for (; i + 8 <= n; i += 8) bits[i / 8] = pack8(normalize8(load64(bytes + i)));
  if (i < n) {
    uint8_t last = 0;
    for (int64_t j = i; j < n; ++j) last = static_cast<uint8_t>(last | ((bytes[j] != 0 ? 1 : 0) << (j - i)));
    bits[i / 8] = last;
  }
}

// Bits -> n bytes of 0 or 1.
DWM_NOINLINE static void unpack_bytes(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  int64_t i = 0;
#if defined(__AVX2__)
  const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i pick = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i one = _mm256_set1_epi8(1);
  const auto spread_word = [&](int64_t at) {
    int32_t word;
    std::memcpy(&word, bits + at / 8, 4);
    const __m256i x = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), pick);
    return _mm256_and_si256(_mm256_cmpeq_epi8(x, pick), one);
  };
  for (; i + 128 <= n; i += 128) {
    const __m256i a = spread_word(i), b = spread_word(i + 32), c = spread_word(i + 64), d = spread_word(i + 96);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i + 32), b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i + 64), c);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i + 96), d);
  }
  for (; i + 32 <= n; i += 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i), spread_word(i));
#endif
  for (; i + 8 <= n; i += 8) store64(bytes + i, kUnpack[bits[i / 8]]);
  for (; i < n; ++i) bytes[i] = (bits[i / 8] >> (i % 8)) & 1u;
}

static int64_t count_bits(const uint8_t* a, int64_t nbytes) {
  int64_t ones = 0;
  for (int64_t i = 0; i < nbytes; i += 8) ones += std::popcount(load64(a + i));
  return ones;
}

static void overlap_bits(const uint8_t* a, const uint8_t* b, int64_t nbytes, int64_t* both, int64_t* either) {
  int64_t in_both = 0, in_either = 0;
  for (int64_t i = 0; i < nbytes; i += 8) {
    const uint64_t x = load64(a + i), y = load64(b + i);
    in_both += std::popcount(x & y);
    in_either += std::popcount(x | y);
  }
  *both = in_both;
  *either = in_either;
}

}  // namespace dwm::DWM_ISA
