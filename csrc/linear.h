// y = x (W * bits)^T + bias for rows of x that belong to several domains: a piece of W is brought into the cache once
// and masked in registers by the bits of each domain in turn.
//
// One output is the sum of sixteen lanes, lane j over the columns c with c % 16 = j in rising order, and the lanes are
// added in a fixed order. So it depends on its own row of x, row of W, bits and bias and on nothing else: not on other
// rows or domains, tiles, threads or instruction sets.
#pragma once

#include "lanes.h"

namespace dwm::DWM_ISA {

constexpr int kTall = 4;           // rows of x that share a masked piece of W
constexpr int kWide = 16;          // rows of W that stay in the second-level cache while all domains use them
constexpr int kSlots = 16;         // groups of at most kTall rows of x that are worked on at a time
constexpr int64_t kPiece = 4096;   // floats of x that take half of a first-level cache

// Columns at a time, by the rows of x.
constexpr int64_t kColumns[kTall + 1] = {0, kPiece, kPiece / 2, kPiece / 4, kPiece / 4};

// Rows of W at a time, by the rows of x: as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int kGroup[kTall + 1] = {0, 4, 4, 4, 4};
#elif defined(__AVX2__)
constexpr int kGroup[kTall + 1] = {0, 4, 2, 1, 1};
#else
constexpr int kGroup[kTall + 1] = {0, 1, 1, 1, 1};
#endif

// At most kTall rows of x of one domain.
struct Slot {
  const LinearPart* part;
  int64_t row;
  int rows;
};

// Rows of W and columns of it.
struct WeightPiece {
  const float* weight;
  int64_t stride;  // from one of its rows to the next
  int64_t first;   // its first element in W, so also its first bit
  int64_t pitch;   // of W and of x
  int64_t columns;
  int rows;
};

// `count` bits from bit `first` on, beginning with a byte: where they lie, or moved into `scratch`.
static inline const uint8_t* aligned_bits(const uint8_t* bits, int64_t first, int64_t count, uint8_t* scratch) {
  const uint8_t* from = bits + first / 8;
  const int shift = static_cast<int>(first % 8);
  if (shift == 0) return from;
  const int64_t last = (shift + count - 1) / 8;
  for (int64_t i = 0; i < last; ++i) scratch[i] = static_cast<uint8_t>(from[i] >> shift | from[i + 1] << (8 - shift));
  scratch[last] = static_cast<uint8_t>(from[last] >> shift);
  return scratch;
}

// Adds the products of n columns to the lanes of kN rows of W and kM rows of x. kFetch: W comes from memory, and the
// rows after these are asked for in time.
template <int kN, int kM, bool kFetch>
DWM_NOINLINE static void dot_run(const float* w, int64_t stride, const uint8_t* const* bits, const float* x,
                                 int64_t pitch, int64_t n, float* sums) {
  Lanes sum[kN][kM];
  for (int i = 0; i < kN; ++i) {
    for (int r = 0; r < kM; ++r) sum[i][r] = load(sums + (i * kTall + r) * kLanes);
  }
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Lanes kept[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      if constexpr (kFetch) fetch(w + (kN + i) * stride + c);
      kept[i] = load_kept(w + i * stride + c, bits[i] + c / 8);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r) {
      const Lanes row = load(x + r * pitch + c);
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) add_product(sum[i][r], kept[i], row);
    }
  }
  if (c < n) {
    const size_t left = static_cast<size_t>(n - c);
    for (int i = 0; i < kN; ++i) {
      float rest[kLanes] = {};
      uint8_t keep[2] = {};
      std::memcpy(rest, w + i * stride + c, left * sizeof(float));
      std::memcpy(keep, bits[i] + c / 8, left > 8 ? 2 : 1);
      const Lanes kept = load_kept(rest, keep);
      for (int r = 0; r < kM; ++r) {
        float padded[kLanes] = {};
        std::memcpy(padded, x + r * pitch + c, left * sizeof(float));
        add_product(sum[i][r], kept, load(padded));
      }
    }
  }
  for (int i = 0; i < kN; ++i) {
    for (int r = 0; r < kM; ++r) store(sum[i][r], sums + (i * kTall + r) * kLanes);
  }
}

template <int kM, bool kFetch>
static inline void dot_piece(const WeightPiece& piece, const uint8_t* bits, const float* x, float* sums) {
  constexpr int kN = kGroup[kM];
  uint8_t scratch[kN][kPiece / 8 + 1];
  const uint8_t* where[kN];
  const auto align = [&](int i, int j) {
    where[j] = aligned_bits(bits, piece.first + (i + j) * piece.pitch, piece.columns, scratch[j]);
  };
  int i = 0;
  for (; i + kN <= piece.rows; i += kN) {
    for (int j = 0; j < kN; ++j) align(i, j);
    const float* w = piece.weight + i * piece.stride;
    dot_run<kN, kM, kFetch>(w, piece.stride, where, x, piece.pitch, piece.columns, sums + i * kTall * kLanes);
  }
  for (; i < piece.rows; ++i) {
    align(i, 0);
    const float* w = piece.weight + i * piece.stride;
    dot_run<1, kM, kFetch>(w, piece.stride, where, x, piece.pitch, piece.columns, sums + i * kTall * kLanes);
  }
}

template <bool kFetch>
static inline void dot_slot(const WeightPiece& piece, const Slot& slot, const float* x, float* sums) {
  switch (slot.rows) {
    case 1: return dot_piece<1, kFetch>(piece, slot.part->bits, x, sums);
    case 2: return dot_piece<2, kFetch>(piece, slot.part->bits, x, sums);
    case 3: return dot_piece<3, kFetch>(piece, slot.part->bits, x, sums);
    default: return dot_piece<4, kFetch>(piece, slot.part->bits, x, sums);
  }
}

static inline int tallest_of(const Slot* slots, int count) {
  int tallest = 1;
  for (int s = 0; s < count; ++s) tallest = slots[s].rows > tallest ? slots[s].rows : tallest;
  return tallest;
}

using Sums = float[kWide * kTall * kLanes];

// The outputs of `count` slots and `wide` rows of W from `row` on, of `n`.
static inline void write_block(const Slot* slots, int count, const Sums* sums, int64_t row, int wide, int64_t n,
                               float* all) {
  for (int s = 0; s < count; ++s) {
    const float* bias = slots[s].part->bias;
    for (int r = 0; r < slots[s].rows; ++r) {
      float* out = all + (slots[s].row + r) * n + row;
      for (int i = 0; i < wide; ++i) {
        const float sum = total(sums[s] + (i * kTall + r) * kLanes);
        out[i] = bias ? sum + bias[row + i] : sum;
      }
    }
  }
}

// All outputs of `count` slots and `wide` rows of W from `row` on.
static void dot_block(const LinearPacked& job, const Slot* slots, int count, int64_t row, int wide) {
  alignas(64) Sums sums[kSlots];
  std::memset(sums, 0, static_cast<size_t>(count) * sizeof sums[0]);
  const int64_t columns = kColumns[tallest_of(slots, count)];
  for (int64_t k = 0; k < job.k; k += columns) {
    const int64_t first = row * job.k + k;
    const int64_t n = job.k - k < columns ? job.k - k : columns;
    const WeightPiece piece{job.weight + first, job.k, first, job.k, n, wide};
    dot_slot<true>(piece, slots[0], job.x + slots[0].row * job.k + k, sums[0]);
    for (int s = 1; s < count; ++s) dot_slot<false>(piece, slots[s], job.x + slots[s].row * job.k + k, sums[s]);
  }
  write_block(slots, count, sums, row, wide, job.n, job.out);
}

// Calls block(slots, count) for all rows of x, at most kSlots slots at a time.
template <typename Block>
static inline void for_slots(const LinearPart* parts, int64_t part_count, const Block& block) {
  Slot slots[kSlots];
  int count = 0;
  for (int64_t p = 0; p < part_count; ++p) {
    for (int64_t r = parts[p].begin; r < parts[p].end; r += kTall) {
      slots[count++] = {parts + p, r, static_cast<int>(parts[p].end - r < kTall ? parts[p].end - r : kTall)};
      if (count < kSlots) continue;
      block(slots, count);
      count = 0;
    }
  }
  if (count > 0) block(slots, count);
}

static void linear_packed(const LinearPacked& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; row += kWide) {
    const int wide = static_cast<int>(last_row - row < kWide ? last_row - row : kWide);
    for_slots(job.parts, job.part_count, [&](const Slot* slots, int count) { dot_block(job, slots, count, row, wide); });
  }
}

}  // namespace dwm::DWM_ISA
