// y = x (W * bits)^T + bias from the kept weights alone: `values` holds them in logical order, widened to fp32 as they
// are read, and each is put into its lane by its bits. What lies under a dropped bit is +0 and was never stored.
//
// An output is summed as linear.h sums it: sixteen lanes over the columns, added in a fixed order. So it is the same
// bit for bit as from W and bits, and depends on no other row, tile, thread or instruction set.
#pragma once

#include "expand.h"
#include "linear.h"

namespace dwm::DWM_ISA {

constexpr int kPanelRows = 12;          // rows of W that are expanded side by side
constexpr int64_t kPanelColumns = 512;  // with them: 24 KiB, most of a first-level cache
#if defined(__AVX512F__)
constexpr int kTileRows = 4;            // rows of W and
constexpr int kSideBySide = 4;          // rows of W that few rows of x meet at a time
#else
constexpr int kTileRows = 3;
constexpr int kSideBySide = 1;
#endif
constexpr int kTileCompany = 4;         // rows of x whose sums stay in registers
constexpr int kCompany = 32;            // rows of x that share an expanded panel
constexpr int kAhead = 1024;            // bytes: hardware stops to look ahead at the end of a page

// Where the values of n columns at `values`, among `all`, may be expanded from: there, or, where `expand_step` would load from before
// all of them, a copy in `room`.
template <Type kType>
static const Stored<kType>* with_room(const void* all, const Stored<kType>* values, const uint8_t* bits, int64_t n,
                                      Stored<kType>* room) {
  if (kType != Type::f32 || values - static_cast<const Stored<kType>*>(all) >= kBefore) return values;
  std::memset(room, 0, kBefore * sizeof *room);
  std::memcpy(room + kBefore, values, static_cast<size_t>(ones_of(bits, 0, n) + kBehind) * sizeof *room);
  return room + kBefore;
}

// Adds the products of n columns of one row of W to the lanes of kM rows of x.
template <Type kType, int kM>
DWM_NOINLINE static const Stored<kType>* kept_run(const Stored<kType>* values, const Stored<kType>* ahead,
                                                  const uint8_t* bits, const float* x, int64_t pitch, int64_t n,
                                                  float* sums) {
  Lanes sum[kM];
  for (int r = 0; r < kM; ++r) sum[r] = load(sums + r * kLanes);
  values = for_lanes<kType>(values, ahead, bits, n, [&](int64_t c, const Lanes& kept) {
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) add_product(sum[r], kept, load(x + r * pitch + c));
  });
  for (int r = 0; r < kM; ++r) store(sum[r], sums + r * kLanes);
  return values;
}

#if defined(__AVX512F__)

// The same of kSideBySide rows of W, so that a load of x serves all of them and no sum waits for another. `next` moves on;
// what lies `lead` bytes behind it is asked for meanwhile.
template <Type kType, int kM>
DWM_NOINLINE static void kept_rows_run(const Stored<kType>** next, const intptr_t* lead, const uint8_t* const* bits,
                                       const float* x, int64_t pitch, int64_t n, float* sums) {
  constexpr int kN = kSideBySide;
  const Stored<kType>* values[kN];
  Lanes sum[kN][kM];
  for (int i = 0; i < kN; ++i) {
    values[i] = next[i];
    for (int r = 0; r < kM; ++r) sum[i][r] = load(sums + (i * kM + r) * kLanes);
  }
  const auto step = [&](int64_t c, uint32_t wanted) {
    Lanes kept[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      // Of eight columns and fewer one byte is read: bits may end with it.
      const uint32_t word = wanted > 0xFFu ? load16(bits[i] + c / 8) & wanted : bits[i][c / 8] & wanted;
      kept[i] = place16<kType>(values[i], word);
      values[i] += std::popcount(word);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) {
      const Lanes row = load(x + r * pitch + c);
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) add_product(sum[i][r], kept[i], row);
    }
  };
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) fetch_early(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(values[i]) + lead[i]));
    step(c, 0xFFFFu);
    step(c + kLanes, 0xFFFFu);
  }
  for (; c < n; c += kLanes) step(c, n - c < kLanes ? (1u << (n - c)) - 1 : 0xFFFFu);
  for (int i = 0; i < kN; ++i) {
    next[i] = values[i];
    for (int r = 0; r < kM; ++r) store(sum[i][r], sums + (i * kM + r) * kLanes);
  }
}

#endif

static inline void write_sums(const KeptLinear& job, int64_t row, int64_t x_row, const float* lanes) {
  const float sum = total(lanes);
  job.out[x_row * job.n + row] = job.bias ? sum + job.bias[row] : sum;
}

// At most kTall rows of x: each weight is multiplied where it is expanded.
template <Type kType, int kM>
static void kept_few(const KeptLinear& job, int64_t row, int wide) {
  const auto* values = static_cast<const Stored<kType>*>(job.values);
  const Stored<kType>* next[kWide + 1];
  alignas(64) float sums[kWide][kM * kLanes] = {};
  Stored<kType> room[kBefore + kPiece + kBehind];
  uint8_t scratch[kPiece / 8 + 1];
  for (int i = 0; i <= wide; ++i) next[i] = values + job.starts[row + i];
  for (int64_t k = 0; k < job.k; k += kColumns[kM]) {
    const int64_t n = job.k - k < kColumns[kM] ? job.k - k : kColumns[kM];
    int i = 0;
#if defined(__AVX512F__)
    for (; i + kSideBySide <= wide; i += kSideBySide) {
      uint8_t moved[kSideBySide][kPiece / 8 + 2];
      const uint8_t* bits[kSideBySide];
      intptr_t lead[kSideBySide];
      for (int j = 0; j < kSideBySide; ++j) {
        bits[j] = aligned_bits(job.bits, (row + i + j) * job.k + k, n, moved[j]);
        const int then = i + kSideBySide + j < wide ? i + kSideBySide + j : wide;
        lead[j] = reinterpret_cast<intptr_t>(next[then]) - reinterpret_cast<intptr_t>(next[i + j]);
      }
      kept_rows_run<kType, kM>(next + i, lead, bits, job.x + k, job.pitch, n, sums[i]);
    }
#endif
    for (; i < wide; ++i) {
      const uint8_t* bits = aligned_bits(job.bits, (row + i) * job.k + k, n, scratch);
      const Stored<kType>* from = with_room<kType>(job.values, next[i], bits, n, room);
      const Stored<kType>* ahead = n == job.k ? from + kAhead / sizeof *from : next[i + 1];
      next[i] += kept_run<kType, kM>(from, ahead, bits, job.x + k, job.pitch, n, sums[i]) - from;
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
#if defined(__AVX512F__)
  __m512 sum[kTileRows][kM];
  for (int i = 0; i < kTileRows; ++i) {
    for (int r = 0; r < kM; ++r) sum[i][r] = _mm512_load_ps(sums + at(i, r));
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    __m512 w[kTileRows];
    for (int i = 0; i < kTileRows; ++i) w[i] = _mm512_load_ps(panel + i * kPanelColumns + c);
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) {
      const __m512 row = _mm512_loadu_ps(x + r * pitch + c);
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) sum[i][r] = _mm512_add_ps(sum[i][r], _mm512_mul_ps(w[i], row));
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int r = 0; r < kM; ++r) _mm512_store_ps(sums + at(i, r), sum[i][r]);
  }
#elif defined(__AVX2__)
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
  Stored<kType> room[kBefore + kPanelColumns + kBehind];
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
        const Stored<kType>* from = with_room<kType>(job.values, next[i], bits, n, room);
        const auto put = [&](int64_t c, const Lanes& kept) { store(kept, out + c); };
        next[i] += for_lanes<kType>(from, from + kAhead / sizeof *from, bits, n, put) - from;
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
