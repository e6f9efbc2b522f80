// y = x (W * bits)^T + bias for a few rows of x, straight from packed bits: each weight is read and masked once.
#pragma once

#include "bits.h"
#include "core.h"

namespace dwm::DWM_ISA {

constexpr int kLanes = 16;

// n bytes of 0 or 1 from bit `first` on, wherever it lies in its byte.
static inline void unpack_from(const uint8_t* bits, int64_t first, int64_t n, uint8_t* bytes) {
  int64_t i = 0;
  for (; i < n && (first + i) % 8 != 0; ++i) bytes[i] = (bits[(first + i) / 8] >> ((first + i) % 8)) & 1u;
  unpack_bytes(bits + (first + i) / 8, n - i, bytes + i);
}

DWM_NOINLINE static void mask_piece(const float* __restrict w, const uint8_t* __restrict keep, float* __restrict out,
                                    int n) {
  for (int i = 0; i < n; ++i) out[i] = keep[i] ? w[i] : 0.0f;
}

// kRows dot products of one piece of a masked weight row with rows of x.
template <int kRows>
DWM_NOINLINE static void dot_piece(const float* __restrict w, const float* __restrict x, int64_t pitch, int n,
                                   float* __restrict sums) {
  float lanes[kRows][kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kLanes; ++j) lanes[r][j] += w[i + j] * x[r * pitch + i + j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float sum = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += lanes[r][j];
    for (int j = i; j < n; ++j) sum += w[j] * x[r * pitch + j];
    sums[r] += sum;
  }
}

static inline void dot_rows(int rows, const float* w, const float* x, int64_t pitch, int n, float* sums) {
  switch (rows) {
    case 1: return dot_piece<1>(w, x, pitch, n, sums);
    case 2: return dot_piece<2>(w, x, pitch, n, sums);
    case 3: return dot_piece<3>(w, x, pitch, n, sums);
    default: return dot_piece<4>(w, x, pitch, n, sums);
  }
}

static void linear_packed(const LinearPacked& job, int64_t first_row, int64_t last_row) {
  constexpr int64_t kPiece = 2048;
  alignas(64) uint8_t keep[kPiece];
  alignas(64) float masked[kPiece];
  for (int64_t row = first_row; row < last_row; ++row) {
    const float start = job.bias ? job.bias[row] : 0.0f;
    for (int64_t m = 0; m < job.m; ++m) job.out[m * job.n + row] = start;
    for (int64_t k = 0; k < job.k; k += kPiece) {
      const int n = static_cast<int>(job.k - k < kPiece ? job.k - k : kPiece);
      unpack_from(job.bits, row * job.k + k, n, keep);
      mask_piece(job.weight + row * job.k + k, keep, masked, n);
      for (int64_t m = 0; m < job.m; m += 4) {
        const int rows = static_cast<int>(job.m - m < 4 ? job.m - m : 4);
        float sums[4] = {};
        dot_rows(rows, masked, job.x + m * job.k + k, job.k, n, sums);
        for (int r = 0; r < rows; ++r) job.out[(m + r) * job.n + row] += sums[r];
      }
    }
  }
}

}  // namespace dwm::DWM_ISA
