// y = x (W * bits)^T + bias for rows of x of several domains, from the weights that at least one of them keeps: `values`
// holds these in logical order. A few rows of W are expanded into the cache by the joined bits, then masked by the bits
// of each domain in turn, as linear.h masks all weights: an output is the same bit for bit.
#pragma once

#include "kept.h"

namespace dwm::DWM_ISA {

constexpr int kUnionRows = 4;            // rows of W that are expanded side by side, and
constexpr int64_t kUnionColumns = 1024;  // columns of them: 16 KiB, half of a first-level cache

// Bits [first, first + n), n at most kPiece, that are set in at least one domain.
static inline void join_bits(const KeptUnion& job, int64_t first, int64_t n, uint8_t* joined) {
  uint8_t scratch[kPiece / 8 + 1];
  const size_t nbytes = static_cast<size_t>((n + 7) / 8);
  std::memset(joined, 0, nbytes);
  for (int64_t d = 0; d < job.domains; ++d) {
    const uint8_t* bits = aligned_bits(job.bits + d * job.bits_stride, first, n, scratch);
    for (size_t i = 0; i < nbytes; ++i) joined[i] = static_cast<uint8_t>(joined[i] | bits[i]);
  }
}

// Whether a row's joined bits and its share of the values agree.
static inline bool union_fits(const KeptUnion& job, int64_t row) {
  uint8_t joined[kPiece / 8 + 1];
  int64_t ones = 0;
  for (int64_t k = 0; k < job.k; k += kPiece) {
    const int64_t n = job.k - k < kPiece ? job.k - k : kPiece;
    join_bits(job, row * job.k + k, n, joined);
    ones += ones_of(joined, 0, n);
  }
  return ones == job.starts[row + 1] - job.starts[row];
}

// All outputs of `count` slots and `wide` rows of W from `row` on.
static void union_block(const KeptUnion& job, const Slot* slots, int count, int64_t row, int wide) {
  alignas(64) Sums sums[kSlots];
  alignas(64) float panel[kUnionRows * kUnionColumns];
  float room[kBefore + kUnionColumns + kBehind];
  uint8_t joined[kUnionColumns / 8 + 1];
  const float* next[kWide + 1];
  std::memset(sums, 0, static_cast<size_t>(count) * sizeof sums[0]);
  for (int i = 0; i <= wide; ++i) next[i] = job.values + job.starts[row + i];
  const int64_t columns = kUnionColumns;
  for (int64_t k = 0; k < job.k; k += columns) {
    const int64_t n = job.k - k < columns ? job.k - k : columns;
    for (int i = 0; i < wide; i += kUnionRows) {
      const int rows = wide - i < kUnionRows ? wide - i : kUnionRows;
      const int64_t first = (row + i) * job.k + k;
      for (int j = 0; j < rows; ++j) {
        join_bits(job, first + j * job.k, n, joined);
        const float*& values = next[i + j];
        const float* from = with_room<Singles<Type::f32>>(job.values, values, joined, n, room);
        const float* ahead = n == job.k ? from + kAhead / sizeof *from : next[i + j + 1];
        const auto put = [&](int64_t c, const Lanes& kept) { store(kept, panel + j * columns + c); };
        values += for_kept<Singles<Type::f32>>(from, ahead, joined, n, put) - from;
      }
      const WeightPiece piece{panel, columns, first, job.k, n, rows};
      for (int s = 0; s < count; ++s) {
        dot_slot<false>(piece, slots[s], job.x + slots[s].row * job.k + k, sums[s] + i * kTall * kLanes);
      }
    }
  }
  write_block(slots, count, sums, row, wide, job.n, job.out);
}

// False, and nothing computed, where the joined bits of a row and its share of the values do not agree.
static bool linear_union(const KeptUnion& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    if (!union_fits(job, row)) return false;
  }
  for (int64_t row = first_row; row < last_row; row += kWide) {
    const int wide = static_cast<int>(last_row - row < kWide ? last_row - row : kWide);
    for_slots(job.parts, job.part_count, [&](const Slot* slots, int count) { union_block(job, slots, count, row, wide); });
  }
  return true;
}

}  // namespace dwm::DWM_ISA
