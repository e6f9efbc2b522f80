// linear_kept: rows of x by the kept weights of a masked matrix.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <optional>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

// Rows of x, at a kept fraction of 1, from which on weights are multiplied column by column; by measurement.
constexpr double kRowsPerKept = 53.0;

// First value of every row: rising, and all of them with `overread` more, which a load may reach, inside of `values`.
void check_starts(const Tensor& starts, const Tensor& values, int64_t overread) {
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.is_contiguous() &&
                      starts.numel() > 0,
                  "dwm_fast: row_starts must be a contiguous int64 vector of one number more than there are rows");
  const int64_t* at = static_cast<const int64_t*>(starts.data_ptr());
  const int64_t n = starts.numel() - 1;
  bool rising = at[0] == 0;
  for (int64_t i = 0; i < n; ++i) rising = rising && at[i] <= at[i + 1];
  STD_TORCH_CHECK(rising && at[n] <= values.numel() - overread,
                  "dwm_fast: row_starts must rise from 0 and end before the padding of values");
}

// How many rows of x are multiplied column by column: the groups of kTurned, of which the last may lack some, for which that
// takes less time than to multiply every weight, dropped ones too.
int64_t rows_to_turn(const KeptLinear& job) {
  const double kept = static_cast<double>(job.starts[job.n]) / (static_cast<double>(job.n) * static_cast<double>(job.k));
  const int64_t rest = job.m % kTurned;
  const auto worth = [&](int64_t rows) { return static_cast<double>(rows) >= kRowsPerKept * kept; };
  if (!worth(kTurned)) return 0;
  return job.m - (worth(rest) ? 0 : rest);
}

// Lays those rows of x out in `room`, and tells the job, if all of their numbers are finite.
void turn_rows(KeptLinear& job, std::vector<float>& room) {
  const int64_t rows = job.n * job.k > 0 ? rows_to_turn(job) : 0, groups = (rows + kTurned - 1) / kTurned;
  if (rows == 0) return;
  constexpr size_t kAligned = 64 / sizeof(float);
  room.assign(static_cast<size_t>(groups * kTurned * job.k) + kAligned, 0.0f);
  const size_t past = reinterpret_cast<uintptr_t>(room.data()) / sizeof(float) % kAligned;
  float* const turned = room.data() + (kAligned - past) % kAligned;
  const auto* const x = static_cast<const float*>(job.x);
  std::atomic<bool> finite{true};
  constexpr int64_t kColumns = 512;  // handed to one thread at a time
  const int64_t blocks = (job.k + kColumns - 1) / kColumns;
  parallel(groups * blocks, groups * blocks, [&](int64_t i) {
    const int64_t first = i / blocks * kTurned, begin = i % blocks * kColumns, end = std::min(begin + kColumns, job.k);
    const int64_t count = std::min<int64_t>(rows - first, kTurned);
    float* const to = turned + first * job.k;
    uint32_t largest = 0;
    for (int64_t r = 0; r < count; ++r) {
      const float* const from = x + (first + r) * job.pitch;
      for (int64_t c = begin; c < end; ++c) {
        largest = std::max(largest, std::bit_cast<uint32_t>(from[c]) << 1);
        to[c * kTurned + r] = from[c];
      }
    }
    if (largest >= 0xFF000000u) finite = false;  // an exponent of ones
  });
  if (!finite) return;
  job.turned = turned;
  job.turned_rows = rows;
}

// x: (m, pitch), its columns behind k zero, in fp32 with a pitch that is a multiple of 16, or, as values are, in bf16 with
// one that is a multiple of 32. starts: (n + 1,). out: (m, n).
void linear_kept(Tensor x, Tensor values, Tensor starts, Tensor bits, std::optional<Tensor> bias, int64_t k,
                 Tensor out) {
  const bool pairs = x.scalar_type() == ScalarType::BFloat16 && values.scalar_type() == ScalarType::BFloat16;
  const int64_t step = pairs ? 32 : 16;  // columns that meet at a time, and values that are loaded then
  if (!pairs) check_float(x, "linear_kept's operand");
  check_float(out, "linear_kept's operand");
  for (const Tensor* t : {&x, &out}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous(), "dwm_fast: linear_kept takes contiguous matrices");
  }
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "dwm_fast: values must be a contiguous vector");
  check_starts(starts, values, step);
  const int64_t m = x.size(0), pitch = x.size(1), n = starts.numel() - 1;
  STD_TORCH_CHECK(k >= 0 && pitch == (k + step - 1) / step * step && out.size(0) == m && out.size(1) == n,
                  "dwm_fast: linear_kept got matrices that do not fit each other");
  offsets_of(bits, {n * k});
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == n && bias->is_contiguous(), "dwm_fast: bias has another length");
  }
  KeptLinear job{x.data_ptr(), values.data_ptr(), static_cast<const int64_t*>(starts.data_ptr()), bytes(bits),
                 bias ? floats(*bias) : nullptr, floats(out), m, n, k, pitch, type_of(values)};
  std::vector<float> room;
  if (!pairs && kernels().turns) turn_rows(job, room);
  constexpr int64_t kRows = 48;  // of the weight, handed to one thread at a time
  std::atomic<bool> sound{true};
  const int64_t count = (n + kRows - 1) / kRows;
  const auto product = pairs ? kernels().linear_kept_bf16 : kernels().linear_kept;
  parallel(m ? count : 0, count, [&](int64_t i) {
    if (!product(job, i * kRows, std::min(n, (i + 1) * kRows))) sound = false;
  });
  STD_TORCH_CHECK(sound, "dwm_fast: bits and row_starts count different numbers of kept weights");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("linear_kept(Tensor x, Tensor values, Tensor row_starts, Tensor bits, Tensor? bias, int k, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("linear_kept", TORCH_BOX(&linear_kept));
}
