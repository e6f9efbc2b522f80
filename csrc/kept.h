// y = x (W * bits)^T + bias from the kept weights alone: `values` holds them in logical order, and each is put into its
// lane by its bits. What lies under a dropped bit is +0 and was never stored.
//
// `Product` is Singles (expand.h), where values are widened to fp32 as they are read, or BothBf16 (pairs.h). An output of
// Singles is summed as linear.h sums it: sixteen lanes over the columns, added in a fixed order. So it is the same bit for
// bit as from W and bits. Of either, it depends on no other row, tile, thread or instruction set.
#pragma once

#include <algorithm>

#include "columns.h"
#include "linear.h"
#include "panel.h"

namespace dwm::DWM_ISA {

#if defined(__AVX512F__)
constexpr bool kTurns = true;
constexpr int kSideBySide = 4;  // rows of W that few rows of x meet at a time
#else
constexpr bool kTurns = false;
constexpr int kSideBySide = 1;
#endif
constexpr int kAhead = 1024;    // bytes: hardware stops to look ahead at the end of a page

// Where the values of n columns at `values`, among `all`, may be expanded from: there, or, where `expand_step` would load from before
// all of them, a copy in `room`.
template <typename Product, typename Value = typename Product::Value>
static const Value* with_room(const void* all, const Value* values, const uint8_t* bits, int64_t n, Value* room) {
  if (sizeof(Value) != sizeof(float) || values - static_cast<const Value*>(all) >= kBefore) return values;
  std::memset(room, 0, kBefore * sizeof *room);
  std::memcpy(room + kBefore, values, static_cast<size_t>(ones_of(bits, 0, n) + kBehind) * sizeof *room);
  return room + kBefore;
}

// Adds the products of n columns of one row of W to the lanes of kM rows of x.
template <typename Product, int kM, typename Value = typename Product::Value>
DWM_NOINLINE static const Value* kept_run(const Value* values, const Value* ahead, const uint8_t* bits,
                                          const typename Product::Input* x, int64_t pitch, int64_t n, float* sums) {
  Lanes sum[kM];
  for (int r = 0; r < kM; ++r) sum[r] = load(sums + r * kLanes);
  values = for_kept<Product>(values, ahead, bits, n, [&](int64_t c, const typename Product::Kept& kept) {
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) Product::add(sum[r], kept, Product::load(x + r * pitch + c));
  });
  for (int r = 0; r < kM; ++r) store(sum[r], sums + r * kLanes);
  return values;
}

#if defined(__AVX512F__)

// Bytes from a row's values to those of the row that is met `later` rows later.
template <typename Product>
static inline intptr_t lead_of(const KeptLinear& job, int64_t row, int64_t later) {
  const int64_t values = job.starts[std::min(job.n, row + later)] - job.starts[row];
  return static_cast<intptr_t>(values) * static_cast<intptr_t>(sizeof(typename Product::Value));
}

// The bits of `left` columns, and no byte behind theirs.
template <int kWidth>
static inline uint32_t word_of(const uint8_t* bits, int64_t left) {
  uint32_t word = 0;
  const bool whole = left >= kWidth;
  std::memcpy(&word, bits, whole ? kWidth / 8 : static_cast<size_t>((left + 7) / 8));
  return whole ? word : word & ((1u << left) - 1);
}

// The same of kSideBySide rows of W, so that a load of x serves all of them and no sum waits for another. `next` moves on;
// what lies `lead` bytes behind it is asked for meanwhile.
template <typename Product, int kM>
DWM_NOINLINE static void kept_rows_run(const typename Product::Value** next, const intptr_t* lead,
                                       const uint8_t* const* bits, const typename Product::Input* x, int64_t pitch,
                                       int64_t n, float* sums) {
  constexpr int kN = kSideBySide, kWidth = Product::kWidth;
  const typename Product::Value* values[kN];
  __m512 sum[kN][kM];
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) {
    values[i] = next[i];
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) sum[i][r] = _mm512_load_ps(sums + (i * kM + r) * kLanes);
  }
  const auto step = [&](int64_t c, int64_t left) {
    typename Product::Kept kept[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const uint32_t word = word_of<kWidth>(bits[i] + c / 8, left);
      kept[i] = Product::place(values[i], word);
      values[i] += std::popcount(word);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) {
      const typename Product::Kept row = Product::load(x + r * pitch + c);
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) sum[i][r] = Product::added(sum[i][r], kept[i], row);
    }
  };
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) fetch_early(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(values[i]) + lead[i]));
#pragma GCC unroll 2
    for (int part = 0; part < kStep; part += kWidth) step(c + part, kWidth);
  }
  for (; c < n; c += kWidth) step(c, n - c);
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) {
    next[i] = values[i];
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) _mm512_store_ps(sums + (i * kM + r) * kLanes, sum[i][r]);
  }
}

#endif

static inline void write_sums(const KeptLinear& job, int64_t row, int64_t x_row, const float* lanes) {
  const float sum = total(lanes);
  job.out[x_row * job.n + row] = job.bias ? sum + job.bias[row] : sum;
}

// Columns at a time: of x in bf16 those that take all of a first-level cache at four rows, as x is read in order.
template <typename Product, int kM>
constexpr int64_t kPieceOf = sizeof(typename Product::Input) == sizeof(float) ? kColumns[kM] : kPiece;

// At most kTall rows of x: each weight is multiplied where it is expanded.
template <typename Product, int kM>
static void kept_few(const KeptLinear& job, int64_t row, int wide) {
  using Value = typename Product::Value;
  constexpr int64_t kColumnsOf = kPieceOf<Product, kM>;
  const auto* values = static_cast<const Value*>(job.values);
  const auto* x = static_cast<const typename Product::Input*>(job.x);
  const Value* next[kWide + 1];
  alignas(64) float sums[kWide][kM * kLanes] = {};
  Value room[kBefore + kPiece + kBehind];
  uint8_t scratch[kPiece / 8 + 1];
  for (int i = 0; i <= wide; ++i) next[i] = values + job.starts[row + i];
  for (int64_t k = 0; k < job.k; k += kColumnsOf) {
    [[maybe_unused]] const typename Product::Rounding rounding;
    const int64_t n = job.k - k < kColumnsOf ? job.k - k : kColumnsOf;
    int i = 0;
#if defined(__AVX512F__)
    for (; i + kSideBySide <= wide; i += kSideBySide) {
      uint8_t moved[kSideBySide][kPiece / 8 + 2];
      const uint8_t* bits[kSideBySide];
      intptr_t lead[kSideBySide];
      for (int j = 0; j < kSideBySide; ++j) {
        bits[j] = aligned_bits(job.bits, (row + i + j) * job.k + k, n, moved[j]);
        lead[j] = lead_of<Product>(job, row + i + j, kSideBySide);
      }
      kept_rows_run<Product, kM>(next + i, lead, bits, x + k, job.pitch, n, sums[i]);
    }
#endif
    for (; i < wide; ++i) {
      const uint8_t* bits = aligned_bits(job.bits, (row + i) * job.k + k, n, scratch);
      const Value* from = with_room<Product>(job.values, next[i], bits, n, room);
      const Value* ahead = n == job.k ? from + kAhead / sizeof *from : next[i + 1];
      next[i] += kept_run<Product, kM>(from, ahead, bits, x + k, job.pitch, n, sums[i]) - from;
    }
  }
  for (int i = 0; i < wide; ++i) {
    for (int r = 0; r < kM; ++r) write_sums(job, row + i, r, sums[i] + r * kLanes);
  }
}

#if defined(__AVX512F__)

// Expands n columns of kSideBySide rows of W into a panel: `next` moves on, and what lies `lead` bytes behind it is asked
// for.
template <typename Product>
DWM_NOINLINE static void expand_rows(const typename Product::Value** next, const intptr_t* lead,
                                     const uint8_t* const* bits, int64_t n, float* panel) {
  constexpr int kN = kSideBySide, kWidth = Product::kWidth;
  const typename Product::Value* values[kN];
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) values[i] = next[i];
  const auto step = [&](int64_t c, int64_t left) {
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const uint32_t word = word_of<kWidth>(bits[i] + c / 8, left);
      Product::store(Product::place(values[i], word), panel + i * kPanelPitch<Product>);
      values[i] += std::popcount(word);
    }
    panel += Product::kFloats;
  };
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) fetch_early(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(values[i]) + lead[i]));
#pragma GCC unroll 2
    for (int part = 0; part < kStep; part += kWidth) step(c + part, kWidth);
  }
  for (; c < n; c += kWidth) step(c, n - c);
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) next[i] = values[i];
}

#endif

// Expands n columns from column k on of `wide` rows of W from `row` on, which become kTileRows-fold by rows of zeros.
template <typename Product>
static void fill_panel(const KeptLinear& job, int64_t row, int wide, int64_t k, int64_t n,
                       const typename Product::Value** next, float* panel) {
  using Value = typename Product::Value;
  constexpr int kWidth = Product::kWidth, kFloats = Product::kFloats;
  Value room[kBefore + kPanelColumns + kBehind];
  uint8_t scratch[kPanelColumns / 8 + 1];
  int i = 0;
#if defined(__AVX512F__)
  for (; i + kSideBySide <= wide; i += kSideBySide, panel += kSideBySide * kPanelPitch<Product>) {
    uint8_t moved[kSideBySide][kPanelColumns / 8 + 1];
    const uint8_t* bits[kSideBySide];
    intptr_t lead[kSideBySide];
    for (int j = 0; j < kSideBySide; ++j) {
      bits[j] = aligned_bits(job.bits, (row + i + j) * job.k + k, n, moved[j]);
      lead[j] = lead_of<Product>(job, row + i + j, kPanelRows);
    }
    expand_rows<Product>(next + i, lead, bits, n, panel);
  }
#endif
  for (; i < wide; ++i, panel += kPanelPitch<Product>) {
    const uint8_t* bits = aligned_bits(job.bits, (row + i) * job.k + k, n, scratch);
    const Value* from = with_room<Product>(job.values, next[i], bits, n, room);
    const auto put = [&](int64_t c, const typename Product::Kept& kept) {
      Product::store(kept, panel + c / kWidth * kFloats);
    };
    next[i] += for_kept<Product>(from, from + kAhead / sizeof *from, bits, n, put) - from;
  }
  for (; i % kTileRows != 0; ++i, panel += kPanelPitch<Product>) {
    std::memset(panel, 0, static_cast<size_t>((n + kWidth - 1) / kWidth * kFloats) * sizeof(float));
  }
}

// More rows of x: a panel of W is expanded once for up to kCompany of them.
template <typename Product>
static void kept_panel(const KeptLinear& job, int64_t row, int wide) {
  alignas(64) float panel[kPanelRows * kPanelPitch<Product>];
  alignas(64) float sums[kPanelRows * kCompany * kLanes];
  const auto* values = static_cast<const typename Product::Value*>(job.values);
  const typename Product::Value* next[kPanelRows];
  for (int64_t first = 0; first < job.m; first += kCompany) {
    const int company = static_cast<int>(job.m - first < kCompany ? job.m - first : kCompany);
    std::memset(sums, 0, sizeof sums);
    for (int i = 0; i < wide; ++i) next[i] = values + job.starts[row + i];
    for (int64_t k = 0; k < job.k; k += kPanelColumns) {
      [[maybe_unused]] const typename Product::Rounding rounding;
      const int64_t n = std::min(job.k - k, kPanelColumns);
      const int64_t padded = (n + Product::kWidth - 1) / Product::kWidth * Product::kWidth;
      fill_panel<Product>(job, row, wide, k, n, next, panel);
      for (int r = 0; r < company;) {
        const auto* x = static_cast<const typename Product::Input*>(job.x) + (first + r) * job.pitch + k;
        const bool full = r + kTileCompany <= company;
        for (int i = 0; i < wide; i += kTileRows) {
          const float* tile = panel + i * kPanelPitch<Product>;
          if (full) panel_tile<Product, kTileCompany>(tile, x, job.pitch, padded, sums + sums_at(i, r));
          else panel_tile<Product, 1>(tile, x, job.pitch, padded, sums + sums_at(i, r));
        }
        r += full ? kTileCompany : 1;
      }
    }
    for (int i = 0; i < wide; ++i) {
      for (int r = 0; r < company; ++r) write_sums(job, row + i, first + r, sums + sums_at(i, r));
    }
  }
}

template <typename Product>
static void kept_rows(const KeptLinear& job, int64_t first, int64_t last) {
  const int64_t step = job.m <= kTall ? kWide : kPanelRows;
  for (int64_t row = first; row < last; row += step) {
    const int wide = static_cast<int>(last - row < step ? last - row : step);
    switch (job.m) {
      case 1: kept_few<Product, 1>(job, row, wide); break;
      case 2: kept_few<Product, 2>(job, row, wide); break;
      case 3: kept_few<Product, 3>(job, row, wide); break;
      case 4: kept_few<Product, 4>(job, row, wide); break;
      default: kept_panel<Product>(job, row, wide);
    }
  }
}

static inline bool rows_fit(const KeptLinear& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (ones_of(job.bits, row * job.k, job.k) != job.starts[row + 1] - job.starts[row]) return false;
  }
  return true;
}

template <Type kType>
static void kept_singles(const KeptLinear& job, int64_t first, int64_t last) {
  KeptLinear rest = job;
#if defined(__AVX512F__)
  if (job.turned) {
    kept_columns<kType>(job, first, last);
    rest.x = static_cast<const float*>(job.x) + job.turned_rows * job.pitch;
    rest.out += job.turned_rows * job.n;
    rest.m -= job.turned_rows;
  }
#endif
  if (rest.m > 0) kept_rows<Singles<kType>>(rest, first, last);
}

// x is fp32. False, and nothing computed, where a row's bits and its share of the values do not agree.
static inline bool linear_kept(const KeptLinear& job, int64_t first, int64_t last) {
  if (!rows_fit(job, first, last)) return false;
  switch (job.type) {
    case Type::f32: kept_singles<Type::f32>(job, first, last); break;
    case Type::bf16: kept_singles<Type::bf16>(job, first, last); break;
    default: kept_singles<Type::f16>(job, first, last);
  }
  return true;
}

// The same where x is bf16, and so are the values.
static inline bool linear_kept_bf16(const KeptLinear& job, int64_t first, int64_t last) {
  if (!rows_fit(job, first, last)) return false;
  kept_rows<BothBf16>(job, first, last);
  return true;
}

}  // namespace dwm::DWM_ISA
