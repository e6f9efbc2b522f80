// y = x (W * bits)^T + bias from the kept weights alone: `values` holds them in logical order, widened to fp32 as they
// are read, and each is put into its lane by its bits. What lies under a dropped bit is +0 and was never stored.
//
// An output is summed as linear.h sums it: sixteen lanes over the columns, added in a fixed order. So it is the same
// bit for bit as from W and bits, and depends on no other row, tile, thread or instruction set.
#pragma once

#include <type_traits>

#include "linear.h"
#include "vecmath.h"

namespace dwm::DWM_ISA {

constexpr int kPanelRows = 12;          // rows of W that are expanded side by side
constexpr int64_t kPanelColumns = 512;  // with them: 24 KiB, most of a first-level cache
constexpr int kTileRows = 3;            // rows of W and
constexpr int kTileCompany = 4;         // rows of x whose sums stay in registers
constexpr int kCompany = 32;            // rows of x that share an expanded panel

template <Type kType>
using Stored = std::conditional_t<kType == Type::f32, float, uint16_t>;

#if defined(__AVX2__)

struct Picks {
  alignas(64) int8_t at[256][8];
};

// For a byte of bits the number of the value that each lane takes; negative where it takes none.
static constexpr Picks make_picks() {
  Picks picks{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int j = 0; j < 8; ++j) picks.at[byte][j] = static_cast<int8_t>((byte >> j) & 1 ? next++ : -128);
  }
  return picks;
}

inline constexpr Picks kPicks = make_picks();

static inline __m256 load8(const float* p, Type) { return _mm256_loadu_ps(p); }

static inline __m256 load8(const uint16_t* p, Type type) {
  const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  if (type == Type::bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
  // fp16 by its exponent: none (a multiple of 2^-24), any, or all ones (infinities and NaN).
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x8000)), 16);
  const __m256i size = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x7FFF)), 13);
  const __m256i raised = _mm256_add_epi32(size, _mm256_set1_epi32(112 << 23));
  const __m256i special = _mm256_cmpgt_epi32(size, _mm256_set1_epi32((31 << 23) - 1));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), size);
  const __m256i one = _mm256_set1_epi32(113 << 23);
  const __m256 exact = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(size, one)), _mm256_castsi256_ps(one));
  __m256i bits = _mm256_add_epi32(raised, _mm256_and_si256(special, _mm256_set1_epi32(112 << 23)));
  bits = _mm256_blendv_epi8(bits, _mm256_castps_si256(exact), small);
  return _mm256_castsi256_ps(_mm256_or_si256(bits, sign));
}

static inline __m256 place8(__m256 values, uint8_t bits) {
  const __m256i pick = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPicks.at[bits])));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values, pick), _mm256_setzero_ps(), _mm256_castsi256_ps(pick));
}

// Sixteen weights of a row; `values` moves on behind those that are kept.
template <Type kType>
static inline Lanes expand(const Stored<kType>*& values, const uint8_t* bits) {
  const Stored<kType>* second = values + std::popcount(bits[0]);
  const Lanes kept = {place8(load8(values, kType), bits[0]), place8(load8(second, kType), bits[1])};
  values = second + std::popcount(bits[1]);
  return kept;
}

#else

template <Type kType>
static inline float widened(Stored<kType> value) {
  if constexpr (kType == Type::f32) return value;
  else return kType == Type::bf16 ? from_bf16(value) : from_f16(value);
}

template <Type kType>
static inline Lanes expand(const Stored<kType>*& values, const uint8_t* bits) {
  const uint32_t word = load16(bits);
  Lanes kept;
  for (int j = 0; j < kLanes; ++j) kept.lane[j] = (word & (1u << j)) != 0 ? widened<kType>(*values++) : 0.0f;
  return kept;
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

// Calls body(c, sixteen weights) for columns c = 0, 16, ... of n; columns beyond n are +0.
template <Type kType, typename Body>
static inline const Stored<kType>* for_lanes(const Stored<kType>* values, const uint8_t* bits, int64_t n,
                                             const Body& body) {
  int64_t c = 0;
  const uint8_t* at = bits;
  for (; c + kLanes <= n; c += kLanes, at += 2) {
    fetch(reinterpret_cast<const float*>(values) + 256);  // a kilobyte ahead: hardware stops at the end of a page
    body(c, expand<kType>(values, at));
  }
  if (c < n) {
    uint8_t keep[2] = {};
    std::memcpy(keep, bits + c / 8, n - c > 8 ? 2 : 1);
    const int left = static_cast<int>(n - c);
    if (left < 8) keep[0] = static_cast<uint8_t>(keep[0] & ((1 << left) - 1));
    if (left > 8) keep[1] = static_cast<uint8_t>(keep[1] & ((1 << (left - 8)) - 1));
    body(c, expand<kType>(values, keep));
  }
  return values;
}

// Adds the products of n columns of one row of W to the lanes of kM rows of x.
template <Type kType, int kM>
DWM_NOINLINE static const Stored<kType>* kept_run(const Stored<kType>* values, const uint8_t* bits, const float* x,
                                                  int64_t pitch, int64_t n, float* sums) {
  Lanes sum[kM];
  for (int r = 0; r < kM; ++r) sum[r] = load(sums + r * kLanes);
  values = for_lanes<kType>(values, bits, n, [&](int64_t c, const Lanes& kept) {
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) add_product(sum[r], kept, load(x + r * pitch + c));
  });
  for (int r = 0; r < kM; ++r) store(sum[r], sums + r * kLanes);
  return values;
}

static inline void write_sums(const KeptLinear& job, int64_t row, int64_t x_row, const float* lanes) {
  const float sum = total(lanes);
  job.out[x_row * job.n + row] = job.bias ? sum + job.bias[row] : sum;
}

// At most kTall rows of x: each weight is multiplied where it is expanded.
template <Type kType, int kM>
static void kept_few(const KeptLinear& job, int64_t row, int wide) {
  const auto* values = static_cast<const Stored<kType>*>(job.values);
  const Stored<kType>* next[kWide];
  alignas(64) float sums[kWide][kM * kLanes] = {};
  uint8_t scratch[kPiece / 8 + 1];
  for (int i = 0; i < wide; ++i) next[i] = values + job.starts[row + i];
  for (int64_t k = 0; k < job.k; k += kColumns[kM]) {
    const int64_t n = job.k - k < kColumns[kM] ? job.k - k : kColumns[kM];
    for (int i = 0; i < wide; ++i) {
      const uint8_t* bits = aligned_bits(job.bits, (row + i) * job.k + k, n, scratch);
      next[i] = kept_run<kType, kM>(next[i], bits, job.x + k, job.pitch, n, sums[i]);
    }
  }
  for (int i = 0; i < wide; ++i) {
    for (int r = 0; r < kM; ++r) write_sums(job, row + i, r, sums[i] + r * kLanes);
  }
}

// Adds the products of n columns (a multiple of kLanes) of kTileRows rows of a panel and kM rows of x.
template <int kM>
DWM_NOINLINE static void panel_tile(const float* panel, const float* x, int64_t pitch, int64_t n, float* sums) {
  const auto at = [](int i, int r) { return (i * kCompany + r) * kLanes; };
#if defined(__AVX2__)
  // The lower eight lanes first, then the upper: the sums of one half fit into the registers.
  for (int half = 0; half < kLanes; half += 8) {
    __m256 sum[kTileRows][kM];
    for (int i = 0; i < kTileRows; ++i) {
      for (int r = 0; r < kM; ++r) sum[i][r] = _mm256_loadu_ps(sums + at(i, r) + half);
    }
    for (int64_t c = half; c < n; c += kLanes) {
      __m256 w[kTileRows];
      for (int i = 0; i < kTileRows; ++i) w[i] = _mm256_load_ps(panel + i * kPanelColumns + c);
#pragma GCC unroll 4
      for (int r = 0; r < kM; ++r) {
        const __m256 row = _mm256_loadu_ps(x + r * pitch + c);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i) sum[i][r] = _mm256_add_ps(sum[i][r], _mm256_mul_ps(w[i], row));
      }
    }
    for (int i = 0; i < kTileRows; ++i) {
      for (int r = 0; r < kM; ++r) _mm256_storeu_ps(sums + at(i, r) + half, sum[i][r]);
    }
  }
#else
  for (int i = 0; i < kTileRows; ++i) {
    for (int r = 0; r < kM; ++r) {
      Lanes sum = load(sums + at(i, r));
      for (int64_t c = 0; c < n; c += kLanes) add_product(sum, load(panel + i * kPanelColumns + c), load(x + r * pitch + c));
      store(sum, sums + at(i, r));
    }
  }
#endif
}

// More rows of x: a panel of W is expanded once for up to kCompany of them.
template <Type kType>
static void kept_panel(const KeptLinear& job, int64_t row, int wide) {
  alignas(64) float panel[kPanelRows * kPanelColumns];
  alignas(64) float sums[kPanelRows * kCompany * kLanes];
  const auto* values = static_cast<const Stored<kType>*>(job.values);
  const Stored<kType>* next[kPanelRows];
  uint8_t scratch[kPanelColumns / 8 + 1];
  const int tall = (wide + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t first = 0; first < job.m; first += kCompany) {
    const int company = static_cast<int>(job.m - first < kCompany ? job.m - first : kCompany);
    std::memset(sums, 0, sizeof sums);
    for (int i = 0; i < wide; ++i) next[i] = values + job.starts[row + i];
    for (int64_t k = 0; k < job.k; k += kPanelColumns) {
      const int64_t n = job.k - k < kPanelColumns ? job.k - k : kPanelColumns;
      const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
      for (int i = 0; i < tall; ++i) {
        float* out = panel + i * kPanelColumns;
        if (i >= wide) {
          std::memset(out, 0, static_cast<size_t>(padded) * sizeof(float));
          continue;
        }
        const uint8_t* bits = aligned_bits(job.bits, (row + i) * job.k + k, n, scratch);
        next[i] = for_lanes<kType>(next[i], bits, n, [&](int64_t c, const Lanes& kept) { store(kept, out + c); });
      }
      for (int r = 0; r < company;) {
        const float* x = job.x + (first + r) * job.pitch + k;
        const bool full = r + kTileCompany <= company;
        for (int i = 0; i < tall; i += kTileRows) {
          float* tile = sums + (i * kCompany + r) * kLanes;
          if (full) panel_tile<kTileCompany>(panel + i * kPanelColumns, x, job.pitch, padded, tile);
          else panel_tile<1>(panel + i * kPanelColumns, x, job.pitch, padded, tile);
        }
        r += full ? kTileCompany : 1;
      }
    }
    for (int i = 0; i < wide; ++i) {
      for (int r = 0; r < company; ++r) write_sums(job, row + i, first + r, sums + (i * kCompany + r) * kLanes);
    }
  }
}

template <Type kType>
static void kept_rows(const KeptLinear& job, int64_t first, int64_t last) {
  const int64_t step = job.m <= kTall ? kWide : kPanelRows;
  for (int64_t row = first; row < last; row += step) {
    const int wide = static_cast<int>(last - row < step ? last - row : step);
    switch (job.m) {
      case 1: kept_few<kType, 1>(job, row, wide); break;
      case 2: kept_few<kType, 2>(job, row, wide); break;
      case 3: kept_few<kType, 3>(job, row, wide); break;
      case 4: kept_few<kType, 4>(job, row, wide); break;
      default: kept_panel<kType>(job, row, wide);
    }
  }
}

// False, and nothing computed, where a row's bits and its share of the values do not agree.
static bool linear_kept(const KeptLinear& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (ones_of(job.bits, row * job.k, job.k) != job.starts[row + 1] - job.starts[row]) return false;
  }
  switch (job.type) {
    case Type::f32: kept_rows<Type::f32>(job, first, last); break;
    case Type::bf16: kept_rows<Type::bf16>(job, first, last); break;
    default: kept_rows<Type::f16>(job, first, last);
  }
  return true;
}

}  // namespace dwm::DWM_ISA
