// Sixteen fp32 lanes side by side: loads, loads under bits, products and sums. Every instruction set rounds them alike.
#pragma once

#include "bits.h"

namespace dwm::DWM_ISA {

constexpr int kLanes = 16;

static inline uint32_t load16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

#if defined(__AVX512F__)

struct Lanes {
  __m512 all;
};

static inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }

static inline void store(Lanes x, float* p) { _mm512_storeu_ps(p, x.all); }

// The lanes whose bit is 1, else +0.
static inline Lanes load_kept(const float* p, const uint8_t* bits) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(load16(bits)), p)};
}

static inline void add_product(Lanes& sum, Lanes a, Lanes b) {
  sum.all = _mm512_add_ps(sum.all, _mm512_mul_ps(a.all, b.all));
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 low, high;
};

static inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

static inline void store(Lanes x, float* p) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

static inline __m256 kept8(const float* p, __m256i word, __m256i pick) {
  const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(word, pick), pick);
  return _mm256_and_ps(_mm256_castsi256_ps(keep), _mm256_loadu_ps(p));
}

// The lanes whose bit is 1, else +0.
static inline Lanes load_kept(const float* p, const uint8_t* bits) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_setr_epi32(1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15);
  const __m256i word = _mm256_set1_epi16(static_cast<int16_t>(load16(bits)));
  return {kept8(p, word, low), kept8(p + 8, word, high)};
}

static inline void add_product(Lanes& sum, Lanes a, Lanes b) {
  sum.low = _mm256_add_ps(sum.low, _mm256_mul_ps(a.low, b.low));
  sum.high = _mm256_add_ps(sum.high, _mm256_mul_ps(a.high, b.high));
}

#else

struct Lanes {
  float lane[kLanes];
};

static inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(x.lane, p, sizeof x.lane);
  return x;
}

static inline void store(Lanes x, float* p) { std::memcpy(p, x.lane, sizeof x.lane); }

static inline Lanes load_kept(const float* p, const uint8_t* bits) {
  const uint32_t word = load16(bits);
  Lanes x;
  for (int j = 0; j < kLanes; ++j) {
    const uint32_t keep = (word & (1u << j)) != 0 ? ~0u : 0u;
    x.lane[j] = std::bit_cast<float>(std::bit_cast<uint32_t>(p[j]) & keep);
  }
  return x;
}

static inline void add_product(Lanes& sum, Lanes a, Lanes b) {
  for (int j = 0; j < kLanes; ++j) sum.lane[j] += a.lane[j] * b.lane[j];
}

#endif

// Asks for the cache line that `p` may point into, in memory or not.
static inline void fetch(const float* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// The same for what is wanted much later: as far as the second-level cache.
static inline void fetch_early(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// The lanes' sum, in a fixed order.
static inline float total(const float* lanes) {
#if defined(__AVX2__)
  const __m256 half = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float half[kLanes / 2];
  for (int j = 0; j < 8; ++j) half[j] = lanes[j] + lanes[j + 8];
  for (int j = 0; j < 4; ++j) half[j] += half[j + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
#endif
}

}  // namespace dwm::DWM_ISA
