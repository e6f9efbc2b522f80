// A panel: some rows of W whose kept weights have been put into their lanes, in the first-level cache, and their product
// with rows of x.
#pragma once

#include "pairs.h"

namespace dwm::DWM_ISA {

constexpr int kPanelRows = 12;          // rows of W that are expanded side by side
constexpr int64_t kPanelColumns = 512;  // with them: at most 24 KiB, most of a first-level cache
#if defined(__AVX512F__)
constexpr int kTileRows = 4;  // rows of W and
#else
constexpr int kTileRows = 3;
#endif
constexpr int kTileCompany = 4;  // rows of x whose sums stay in registers
constexpr int kCompany = 32;     // rows of x that share an expanded panel

// Floats from one row of a panel to the next.
template <typename Product>
constexpr int64_t kPanelPitch = kPanelColumns / Product::kWidth * Product::kFloats;

static constexpr int sums_at(int row, int x_row) { return (row * kCompany + x_row) * kLanes; }

// Adds the products of n columns (a multiple of kWidth) of kTileRows rows of a panel and kM rows of x.
template <typename Product, int kM>
DWM_NOINLINE static void panel_tile(const float* panel, const typename Product::Input* x, int64_t pitch, int64_t n,
                                    float* sums) {
  constexpr int64_t kPitch = kPanelPitch<Product>;
#if defined(__AVX512F__)
  __m512 sum[kTileRows][kM];
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) sum[i][r] = _mm512_load_ps(sums + sums_at(i, r));
  }
  for (int64_t c = 0; c < n; c += Product::kWidth, panel += Product::kFloats) {
    typename Product::Kept w[kTileRows];
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) w[i] = Product::stored(panel + i * kPitch);
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) {
      const typename Product::Kept row = Product::load(x + r * pitch + c);
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) sum[i][r] = Product::added(sum[i][r], w[i], row);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) _mm512_store_ps(sums + sums_at(i, r), sum[i][r]);
  }
#elif defined(__AVX2__)
  // The lower eight lanes first, then the upper: the sums of one half fit into the registers.
  for (int half = 0; half < 2; ++half) {
    __m256 sum[kTileRows][kM];
    for (int i = 0; i < kTileRows; ++i) {
      for (int r = 0; r < kM; ++r) sum[i][r] = _mm256_loadu_ps(sums + sums_at(i, r) + 8 * half);
    }
    const float* weights = panel + half * (Product::kFloats / 2);
    for (int64_t c = half * (Product::kWidth / 2); c < n; c += Product::kWidth, weights += Product::kFloats) {
#pragma GCC unroll 4
      for (int r = 0; r < kM; ++r) {
        const typename Product::Half row = Product::load_half(x + r * pitch + c);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i) Product::add_half(sum[i][r], weights + i * kPitch, row);
      }
    }
    for (int i = 0; i < kTileRows; ++i) {
      for (int r = 0; r < kM; ++r) _mm256_storeu_ps(sums + sums_at(i, r) + 8 * half, sum[i][r]);
    }
  }
#else
  for (int i = 0; i < kTileRows; ++i, panel += kPitch) {
    for (int r = 0; r < kM; ++r) {
      Lanes sum = load(sums + sums_at(i, r));
      const float* weights = panel;
      for (int64_t c = 0; c < n; c += Product::kWidth, weights += Product::kFloats) {
        Product::add(sum, Product::stored(weights), Product::load(x + r * pitch + c));
      }
      store(sum, sums + sums_at(i, r));
    }
  }
#endif
}

}  // namespace dwm::DWM_ISA
