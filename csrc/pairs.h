// Rows of x and values that are both bf16: thirty-two columns meet at a time, two of them in each of sixteen lanes.
//
// Of every 32 columns lane j takes column 2 j + 1, then column 2 j. A product of two bf16 is exact in fp32 and is added in
// one rounding, to nearest; a factor that is denormal counts as zero, and so does a sum that comes out denormal. One
// instruction of AVX512_BF16 does just that (VDPBF16PS, Intel's manual of instructions). Other sets do it in fp32, by
// products fused with sums under settings that flush denormals, the portable copy by hand: the same bits.
#pragma once

#include <cmath>

#include "expand.h"

namespace dwm::DWM_ISA {

#if defined(__AVX512BF16__)

struct Pairs {
  __m512i all;
};

static inline Pairs pairs_of(__m512i all) { return {all}; }

static inline __m512 added_pairs(__m512 sum, const Pairs& a, const Pairs& b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a.all, (__m512bh)b.all);
}

#elif defined(__AVX512F__)

struct Pairs {
  __m512 odd, even;
};

static inline Pairs pairs_of(__m512i all) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(all, upper)), _mm512_castsi512_ps(_mm512_slli_epi32(all, 16))};
}

static inline __m512 added_pairs(__m512 sum, const Pairs& a, const Pairs& b) {
  return _mm512_fmadd_ps(a.even, b.even, _mm512_fmadd_ps(a.odd, b.odd, sum));
}

#elif defined(__AVX2__)

struct HalfPairs {
  __m256 odd, even;
};

struct Pairs {
  HalfPairs low, high;
};

static inline HalfPairs half_pairs_of(__m256i all) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(all, upper)), _mm256_castsi256_ps(_mm256_slli_epi32(all, 16))};
}

static inline void add_half_pairs(__m256& sum, const HalfPairs& a, const HalfPairs& b) {
  sum = _mm256_fmadd_ps(a.even, b.even, _mm256_fmadd_ps(a.odd, b.odd, sum));
}

static inline void add_pairs(Lanes& sum, const Pairs& a, const Pairs& b) {
  add_half_pairs(sum.low, a.low, b.low);
  add_half_pairs(sum.high, a.high, b.high);
}

static inline HalfPairs load_half_pairs(const uint16_t* p) {
  return half_pairs_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

struct PairShuffles {
  alignas(64) uint8_t at[256][16];
};

// For a byte of bits the bytes of eight packed values that each of eight columns takes; 0x80 makes a zero.
static constexpr PairShuffles make_pair_shuffles() {
  PairShuffles shuffles{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int j = 0; j < 8; ++j) {
      const int one = (byte >> j) & 1;
      for (int q = 0; q < 2; ++q) shuffles.at[byte][2 * j + q] = static_cast<uint8_t>(one ? 2 * next + q : 0x80);
      next += one;
    }
  }
  return shuffles;
}

inline constexpr PairShuffles kPairShuffles = make_pair_shuffles();

// Sixteen columns of bytes a and b, whose values begin at `first` and at `second`.
static inline HalfPairs place_half_pairs(const uint16_t* first, const uint16_t* second, size_t a, size_t b) {
  const auto both = [](const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
  };
  return half_pairs_of(_mm256_shuffle_epi8(both(first, second), both(kPairShuffles.at[a], kPairShuffles.at[b])));
}

#else

// `plain`: every factor is zero or within 2^-63 and 2^64, so that every product with another such is exact in fp32.
struct Pairs {
  float odd[kLanes], even[kLanes];
  uint32_t plain;
};

static DWM_INLINE float flushed(float x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>(word & ((word & 0x7F800000u) != 0 ? ~0u : 0x80000000u));
}

// sum + a * b in one rounding, of which a denormal is zero. Whether it is one is seen after rounding to 24 bits: so 2^64
// times as large where it may be.
static inline float fused(float sum, float a, float b) {
  constexpr float kSmallest = 0x1p-126f, kScale = 0x1p64f;
  const float near = std::fma(a, b, sum);
  if (!(std::fabs(near) <= kSmallest) || near == 0.0f) return near;
  const bool first = std::fabs(a) < std::fabs(b);
  const float exact = std::fma(first ? a * kScale : a, first ? b : b * kScale, sum * kScale);
  return std::fabs(exact) < kSmallest * kScale ? std::copysign(0.0f, exact) : exact / kScale;
}

static inline void add_plain(float* sum, const float* a, const float* b) {
  for (int j = 0; j < kLanes; ++j) sum[j] = flushed(sum[j] + a[j] * b[j]);
}

static DWM_NOINLINE void add_any(float* sum, const float* a, const float* b) {
  for (int j = 0; j < kLanes; ++j) sum[j] = fused(sum[j], flushed(a[j]), flushed(b[j]));
}

static inline void add_pairs(Lanes& sum, const Pairs& a, const Pairs& b) {
  const auto add = (a.plain & b.plain) != 0 ? add_plain : add_any;
  add(sum.lane, a.odd, b.odd);
  add(sum.lane, a.even, b.even);
}

static inline Pairs load_pairs(const uint16_t* p) {
  constexpr int kSmallest = 64 << 7, kRange = (190 << 7) - kSmallest;  // of exponents, of 127 + -63 to 127 + 63
  Pairs pairs;
  uint16_t strange = 0;
  for (int j = 0; j < kStep; ++j) {
    const uint16_t size = p[j] & 0x7FFF, above = static_cast<uint16_t>((size & 0x7F80) - kSmallest);
    strange = static_cast<uint16_t>(strange | ((above > kRange) & (size != 0)));
  }
  for (int j = 0; j < kLanes; ++j) {
    pairs.odd[j] = from_bf16(p[2 * j + 1]);
    pairs.even[j] = from_bf16(p[2 * j]);
  }
  pairs.plain = strange == 0 ? 1 : 0;
  return pairs;
}

#endif

#if defined(__AVX2__) && !defined(__AVX512BF16__)

// While this lives a denormal is zero, as a factor and as a sum, and rounding is to nearest, whatever the caller's settings.
class PairRounding {
 public:
  PairRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80u | _MM_FLUSH_ZERO_ON | 0x0040u); }
  ~PairRounding() { _mm_setcsr(before_); }
  PairRounding(const PairRounding&) = delete;
  PairRounding& operator=(const PairRounding&) = delete;

 private:
  unsigned before_;
};

#else

struct PairRounding {};

#endif

// How kept.h multiplies bf16 x by bf16 values; `Singles` of expand.h is the other way.
struct BothBf16 {
  using Value = uint16_t;
  using Input = uint16_t;
  using Kept = Pairs;
  using Rounding = PairRounding;
  static constexpr int kWidth = kStep;                           // columns of a Kept
  static constexpr int kFloats = sizeof(Pairs) / sizeof(float);  // of a panel, which it takes

#if defined(__AVX512F__)
  static __m512 added(__m512 sum, const Kept& a, const Kept& b) { return added_pairs(sum, a, b); }
  static void add(Lanes& sum, const Kept& a, const Kept& b) { sum.all = added_pairs(sum.all, a, b); }
  static Kept load(const Input* x) { return pairs_of(_mm512_loadu_si512(x)); }

  static Kept place(const Value* first, uint32_t word) {
    return pairs_of(_mm512_maskz_expand_epi16(word, in_register(_mm512_loadu_si512(first))));
  }

  static void expand_step(const Value*& values, const uint8_t* bits, Kept (&kept)[1]) {
    uint32_t word;
    std::memcpy(&word, bits, 4);
    kept[0] = place(values, word);
    values += std::popcount(word);
  }
#elif defined(__AVX2__)
  static void add(Lanes& sum, const Kept& a, const Kept& b) { add_pairs(sum, a, b); }
  static Kept load(const Input* x) { return {load_half_pairs(x), load_half_pairs(x + kLanes)}; }

  static void expand_step(const Value*& values, const uint8_t* bits, Kept (&kept)[1]) {
    const size_t a = bits[0], b = bits[1], c = bits[2], d = bits[3];
    const ptrdiff_t first = std::popcount(a), second = first + std::popcount(b);
    const ptrdiff_t third = second + std::popcount(c);
    kept[0] = {place_half_pairs(values, values + first, a, b),
               place_half_pairs(values + second, values + third, c, d)};
    values += third + std::popcount(d);
  }

  using Half = HalfPairs;
  static Half load_half(const Input* x) { return load_half_pairs(x); }
  static void add_half(__m256& sum, const float* panel, const Half& x) {
    add_half_pairs(sum, {_mm256_load_ps(panel), _mm256_load_ps(panel + 8)}, x);
  }
#else
  static void add(Lanes& sum, const Kept& a, const Kept& b) { add_pairs(sum, a, b); }
  static Kept load(const Input* x) { return load_pairs(x); }

  // Reads one value behind those that are kept.
  static void expand_step(const Value*& values, const uint8_t* bits, Kept (&kept)[1]) {
    Value placed[kStep];
    for (int j = 0; j < kStep; ++j) {
      const int one = bits[j / 8] >> j % 8 & 1;
      placed[j] = static_cast<Value>(*values & -one);
      values += one;
    }
    kept[0] = load_pairs(placed);
  }
#endif

  static void store(const Kept& kept, float* panel) { std::memcpy(panel, &kept, sizeof kept); }

  static Kept stored(const float* panel) {
    Kept kept;
    std::memcpy(&kept, panel, sizeof kept);
    return kept;
  }
};

}  // namespace dwm::DWM_ISA
