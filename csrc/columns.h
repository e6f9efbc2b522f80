// Sixteen rows of x by few kept weights: each weight meets the sixteen numbers of its column at once, and a dropped one
// costs nothing. The sums are those of linear.h, sixteen for each row of x, so the result has the same bits where x is
// finite: what a dropped weight adds there is a zero, which changes no sum.
#pragma once

#include <algorithm>

#include "expand.h"
#include "linear.h"

namespace dwm::DWM_ISA {

#if defined(__AVX512F__)

constexpr int64_t kTurnedColumns = 1024;  // at a time: 16-bit numbers count the bytes of their inputs

// Byte offsets, among the inputs of n columns, of those of the columns that are kept; `offsets` has room for 32 more.
static inline int kept_offsets(const uint8_t* bits, int64_t n, uint16_t* offsets) {
  constexpr int kBytes = kTurned * sizeof(float);
  __m512i at = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10,
                                9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  at = _mm512_slli_epi16(at, 6);
  static_assert(kBytes == 1 << 6);
  int count = 0;
  for (int64_t c = 0; c < n; c += kStep) {
    const int64_t left = n - c;
    uint32_t word = 0;
    std::memcpy(&word, bits + c / 8, left >= kStep ? kStep / 8 : static_cast<size_t>((left + 7) / 8));
    if (left < kStep) word &= (1u << left) - 1;
    _mm512_storeu_si512(offsets + count, _mm512_maskz_compress_epi16(word, at));
    count += std::popcount(word);
    at = _mm512_add_epi16(at, _mm512_set1_epi16(static_cast<int16_t>(kStep * kBytes)));
  }
  return count;
}

template <Type kType>
static inline __m512 everywhere(const Stored<kType>* value) {
  if constexpr (kType == Type::f32) return _mm512_set1_ps(*value);
  else if constexpr (kType == Type::bf16) return _mm512_set1_ps(from_bf16(*value));
  else return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(*value)));
}

// Adds `count` weights times their columns' inputs: to sum j those of columns c with c % 16 = j.
template <Type kType>
DWM_NOINLINE static void add_columns(const Stored<kType>* values, const uint16_t* offsets, int count, const float* x,
                                     float* sums) {
  constexpr uint16_t kSums = kLanes * kTurned * sizeof(float) - 1;
  const auto* inputs = reinterpret_cast<const char*>(x);
  auto* all = reinterpret_cast<char*>(sums);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const uint16_t at = offsets[i];
    auto* sum = reinterpret_cast<float*>(all + (at & kSums));
    const __m512 input = _mm512_loadu_ps(reinterpret_cast<const float*>(inputs + at));
    _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_mul_ps(everywhere<kType>(values + i), input)));
  }
}

// The lanes of sixteen rows of x, added in the order of `total`.
static inline __m512 total_of_columns(const float* sums) {
  __m512 half[kLanes / 2];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) half[j] = _mm512_add_ps(_mm512_load_ps(sums + j * kTurned), _mm512_load_ps(sums + (j + 8) * kTurned));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) half[j] = _mm512_add_ps(half[j], half[j + 4]);
  return _mm512_add_ps(_mm512_add_ps(half[0], half[2]), _mm512_add_ps(half[1], half[3]));
}

// Writes the outputs of one row of W and `rows` rows of x from `x_row` on.
static inline void write_columns(const KeptLinear& job, int64_t row, int64_t x_row, int64_t rows, const float* sums) {
  alignas(64) float out[kTurned];
  __m512 sum = total_of_columns(sums);
  if (job.bias) sum = _mm512_add_ps(sum, _mm512_set1_ps(job.bias[row]));
  _mm512_store_ps(out, sum);
  for (int64_t r = 0; r < rows; ++r) job.out[(x_row + r) * job.n + row] = out[r];
}

// Rows [first, last) of W by the rows of x that `job.turned` holds.
template <Type kType>
static void kept_columns(const KeptLinear& job, int64_t first, int64_t last) {
  constexpr int kGroups = 4;  // of kTurned rows of x, which share the offsets
  alignas(64) float sums[kGroups][kLanes * kTurned];
  uint16_t offsets[kTurnedColumns + kStep];
  uint8_t scratch[kTurnedColumns / 8 + 1];
  for (int64_t row = first; row < last; ++row) {
    for (int64_t begin = 0; begin < job.turned_rows; begin += kGroups * kTurned) {
      const int64_t end = std::min(job.turned_rows, begin + kGroups * kTurned);
      const auto* values = static_cast<const Stored<kType>*>(job.values) + job.starts[row];
      std::memset(sums, 0, sizeof sums);
      for (int64_t k = 0; k < job.k; k += kTurnedColumns) {
        const int64_t n = std::min(job.k - k, kTurnedColumns);
        const int count = kept_offsets(aligned_bits(job.bits, row * job.k + k, n, scratch), n, offsets);
        for (int64_t x_row = begin; x_row < end; x_row += kTurned) {
          const float* x = job.turned + x_row * job.k + k * kTurned;
          add_columns<kType>(values, offsets, count, x, sums[(x_row - begin) / kTurned]);
        }
        values += count;
      }
      for (int64_t x_row = begin; x_row < end; x_row += kTurned) {
        write_columns(job, row, x_row, std::min<int64_t>(end - x_row, kTurned), sums[(x_row - begin) / kTurned]);
      }
    }
  }
}

#endif

}  // namespace dwm::DWM_ISA
