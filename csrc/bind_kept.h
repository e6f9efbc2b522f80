// linear_kept: rows of x by the kept weights of a masked matrix.
#pragma once
#include <algorithm>
#include <atomic>
#include <optional>

#include "bind_cpu.h"

namespace {

using namespace dwm;

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
  const KeptLinear job{x.data_ptr(), values.data_ptr(), static_cast<const int64_t*>(starts.data_ptr()), bytes(bits),
                       bias ? floats(*bias) : nullptr, floats(out), m, n, k, pitch, type_of(values)};
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
