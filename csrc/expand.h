// Kept weights put into their lanes: values in logical order and bits become sixteen fp32 lanes, +0 under dropped bits.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "vecmath.h"

namespace dwm::DWM_ISA {

template <Type kType>
using Stored = std::conditional_t<kType == Type::f32, float, uint16_t>;

constexpr int kStep = 2 * kLanes;  // columns that are expanded at a time

// Values behind the last one and before the first one wanted that `expand` may load.
#if defined(__AVX512F__)
constexpr int kBehind = 16;
constexpr int kBefore = 0;
#else
constexpr int kBehind = 8;
constexpr int kBefore = 4;
#endif

#if defined(__AVX512F__)

// Keeps the compiler from an expansion that reads memory itself: that form takes two operations on some processors and
// dozens on others, the one between registers two on all.
template <typename Register>
static inline Register in_register(Register x) {
  asm("" : "+v"(x));
  return x;
}

// The values of sixteen lanes from `first` on.
template <Type kType>
static inline Lanes place16(const Stored<kType>* first, uint32_t bits) {
  const auto mask = static_cast<__mmask16>(bits);
  if constexpr (kType == Type::f32) {
    return {_mm512_maskz_expand_ps(mask, in_register(_mm512_loadu_ps(first)))};
  } else {
    const __m256i sixteen = in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m256i placed = _mm256_maskz_expand_epi16(mask, sixteen);
    if constexpr (kType == Type::f16) return {_mm512_cvtph_ps(placed)};
    else return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(placed), 16))};
  }
}

// The weights of kStep columns of a row; `values` moves on behind those that are kept.
template <Type kType>
static inline void expand_step(const Stored<kType>*& values, const uint8_t* bits, Lanes (&kept)[2]) {
  uint32_t word;
  std::memcpy(&word, bits, 4);
  kept[0] = place16<kType>(values, word & 0xFFFFu);
  kept[1] = place16<kType>(values + std::popcount(word & 0xFFFFu), word >> 16);
  values += std::popcount(word);
}

#elif defined(__AVX2__)

struct Shuffles {
  alignas(64) uint8_t at[256][32];
};

// For a byte of bits the bytes that each of eight lanes takes; 0x80, which makes a zero, where it takes none. Sixteen-bit
// values are in the same eight for all lanes and become the upper half of theirs. Of 32-bit values four stand for the
// lower four lanes, from the first kept one on, and four for the upper four, up to the last kept one: so no lane crosses
// the halves of a register, and the byte's number of ones is the one thing to count.
template <int kBytes>
static constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (int byte = 0; byte < 256; ++byte) {
    const auto one = [&](int j) { return (byte >> j) & 1; };
    int next = 0;
    for (int j = 0; j < 8; ++j) {
      if (kBytes == 4 && j == 4) next = 4 - one(4) - one(5) - one(6) - one(7);
      for (int q = 0; q < 4; ++q) {
        const int from = kBytes * next + q - (4 - kBytes);
        shuffles.at[byte][4 * j + q] = static_cast<uint8_t>(one(j) && q >= 4 - kBytes ? from : 0x80);
      }
      next += one(j);
    }
  }
  return shuffles;
}

inline constexpr Shuffles kShuffles16 = make_shuffles<2>();
inline constexpr Shuffles kShuffles32 = make_shuffles<4>();

static inline __m256i shuffle(__m256i values, const Shuffles& shuffles, size_t byte) {
  return _mm256_shuffle_epi8(values, _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffles.at[byte])));
}

// Eight lanes of fp16, each in the upper half of 32 bits, by exponent: none (a multiple of 2^-24), any, or all ones
// (infinities and NaN).
static inline __m256 from_f16x8(__m256i upper) {
  const __m256i sign = _mm256_and_si256(upper, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  const __m256i size = _mm256_srli_epi32(_mm256_andnot_si256(sign, upper), 3);
  const __m256i raised = _mm256_add_epi32(size, _mm256_set1_epi32(112 << 23));
  const __m256i special = _mm256_cmpgt_epi32(size, _mm256_set1_epi32((31 << 23) - 1));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), size);
  const __m256i one = _mm256_set1_epi32(113 << 23);
  const __m256 exact = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(size, one)), _mm256_castsi256_ps(one));
  __m256i bits = _mm256_add_epi32(raised, _mm256_and_si256(special, _mm256_set1_epi32(112 << 23)));
  bits = _mm256_blendv_epi8(bits, _mm256_castps_si256(exact), small);
  return _mm256_castsi256_ps(_mm256_or_si256(bits, sign));
}

// The lanes of `byte`, whose values lie in [first, end).
template <Type kType>
static inline __m256 place8(const Stored<kType>* first, const Stored<kType>* end, size_t byte) {
  if constexpr (kType == Type::f32) {
    const __m256 lower = _mm256_castps128_ps256(_mm_loadu_ps(first));
    const __m256 both = _mm256_insertf128_ps(lower, _mm_loadu_ps(end - kBefore), 1);
    return _mm256_castsi256_ps(shuffle(_mm256_castps_si256(both), kShuffles32, byte));
  } else {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m256i upper = shuffle(_mm256_broadcastsi128_si256(eight), kShuffles16, byte);
    return kType == Type::bf16 ? _mm256_castsi256_ps(upper) : from_f16x8(upper);
  }
}

// The weights of kStep columns of a row; `values` moves on behind those that are kept.
template <Type kType>
static inline void expand_step(const Stored<kType>*& values, const uint8_t* bits, Lanes (&kept)[2]) {
  const size_t a = bits[0], b = bits[1], c = bits[2], d = bits[3];
  // Counted from `values`, so that one addition a step is all that the next one waits for.
  const ptrdiff_t first = std::popcount(a), second = first + std::popcount(b);
  const ptrdiff_t third = second + std::popcount(c), end = third + std::popcount(d);
  kept[0] = {place8<kType>(values, values + first, a), place8<kType>(values + first, values + second, b)};
  kept[1] = {place8<kType>(values + second, values + third, c), place8<kType>(values + third, values + end, d)};
  values += end;
}

#else

template <Type kType>
static inline float widened(Stored<kType> value) {
  if constexpr (kType == Type::f32) return value;
  else return kType == Type::bf16 ? from_bf16(value) : from_f16(value);
}

// Without a branch on a bit, which nobody could foretell: one value behind those that are kept is read.
template <Type kType>
static inline void expand_step(const Stored<kType>*& values, const uint8_t* bits, Lanes (&kept)[2]) {
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = load16(bits + 2 * i);
    for (int j = 0; j < kLanes; ++j) {
      const uint32_t one = word >> j & 1u;
      kept[i].lane[j] = std::bit_cast<float>(std::bit_cast<uint32_t>(widened<kType>(*values)) & (0u - one));
      values += one;
    }
  }
}

#endif

// Ones among bits [first, first + count).
static inline int64_t ones_of(const uint8_t* bits, int64_t first, int64_t count) {
  if (count == 0) return 0;
  const int64_t begin = first / 8, end = (first + count - 1) / 8;
  const unsigned head = 0xFFu << (first % 8), tail = 0xFFu >> (7 - (first + count - 1) % 8);
  if (begin == end) return std::popcount(bits[begin] & head & tail);
  int64_t ones = std::popcount(bits[begin] & head & 0xFFu) + std::popcount(bits[end] & tail);
  int64_t i = begin + 1;
  for (; i + 8 <= end; i += 8) ones += std::popcount(load64(bits + i));
  for (; i < end; ++i) ones += std::popcount(bits[i]);
  return ones;
}

// How kept.h multiplies fp32 x by values of kType: sixteen columns at a time, one in each lane, products and sums rounded.
template <Type kType>
struct Singles {
  using Value = Stored<kType>;
  using Input = float;
  using Kept = Lanes;
  struct Rounding {};
  static constexpr int kWidth = kLanes;   // columns of a Kept
  static constexpr int kFloats = kLanes;  // of a panel, which it takes

  static void add(Lanes& sum, const Kept& a, const Kept& b) { add_product(sum, a, b); }
  static Kept load(const Input* x) { return dwm::DWM_ISA::load(x); }
#if defined(__AVX512F__)
  static Kept place(const Value* first, uint32_t word) { return place16<kType>(first, word); }
  static __m512 added(__m512 sum, const Kept& a, const Kept& b) { return _mm512_add_ps(sum, _mm512_mul_ps(a.all, b.all)); }
#endif
  static void expand_step(const Value*& values, const uint8_t* bits, Kept (&kept)[2]) {
    dwm::DWM_ISA::expand_step<kType>(values, bits, kept);
  }
  static void store(const Kept& kept, float* panel) { dwm::DWM_ISA::store(kept, panel); }
  static Kept stored(const float* panel) { return dwm::DWM_ISA::load(panel); }

#if defined(__AVX2__) && !defined(__AVX512F__)
  using Half = __m256;
  static Half load_half(const Input* x) { return _mm256_loadu_ps(x); }
  static void add_half(__m256& sum, const float* panel, const Half& x) {
    sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_load_ps(panel), x));
  }
#endif
};

// Calls body(c, kept weights) for columns c = 0, kWidth, ... of n; columns beyond n are +0. At the pace at which it reads
// `values` it asks for what lies from `ahead` on.
template <typename Product, typename Body>
static inline const typename Product::Value* for_kept(const typename Product::Value* values,
                                                      const typename Product::Value* ahead, const uint8_t* bits,
                                                      int64_t n, const Body& body) {
  constexpr int kParts = kStep / Product::kWidth;
  const intptr_t lead = reinterpret_cast<intptr_t>(ahead) - reinterpret_cast<intptr_t>(values);
  typename Product::Kept kept[kParts];
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    fetch(reinterpret_cast<const float*>(reinterpret_cast<intptr_t>(values) + lead));
    Product::expand_step(values, bits + c / 8, kept);
    for (int i = 0; i < kParts; ++i) body(c + i * Product::kWidth, kept[i]);
  }
  if (c < n) {
    const int left = static_cast<int>(n - c);
    uint8_t keep[kStep / 8] = {};
    std::memcpy(keep, bits + c / 8, static_cast<size_t>((left + 7) / 8));
    if (left % 8 != 0) keep[left / 8] = static_cast<uint8_t>(keep[left / 8] & ((1 << left % 8) - 1));
    Product::expand_step(values, keep, kept);
    for (int i = 0; i * Product::kWidth < left; ++i) body(c + i * Product::kWidth, kept[i]);
  }
  return values;
}

}  // namespace dwm::DWM_ISA
