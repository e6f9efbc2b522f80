// linear_union: rows of x under the masks of their domains, by the weights that at least one of these keeps.
#pragma once
#include <atomic>

#include "bind_kept.h"
#include "bind_linear.h"

namespace {

using namespace dwm;

// values: (kept + padding,). starts: (n + 1,). bits, bias and parts as linear_packed takes them.
void linear_union(Tensor x, Tensor values, Tensor starts, Tensor bits, std::optional<Tensor> bias, Integers parts,
                  Tensor out) {
  for (const Tensor* t : {&x, &values, &out}) check_float(*t, "linear_union's operand");
  for (const Tensor* t : {&x, &out}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous(), "dwm_fast: linear_union takes contiguous matrices");
  }
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "dwm_fast: values must be a contiguous vector");
  check_starts(starts, values, 16);
  const int64_t m = x.size(0), k = x.size(1), n = starts.numel() - 1;
  STD_TORCH_CHECK(out.size(0) == m && out.size(1) == n, "dwm_fast: linear_union got matrices that do not fit each other");
  check_domains(bits, n * k);
  const std::vector<LinearPart> jobs = parts_of(bits, bias, parts, m, n);
  const KeptUnion job{floats(x), floats(values), static_cast<const int64_t*>(starts.data_ptr()), bytes(bits),
                      bits.size(0), bits.stride(0), floats(out), jobs.data(), static_cast<int64_t>(jobs.size()), n, k};
  constexpr int64_t kRows = 16;  // of the weight, handed to one thread at a time
  std::atomic<bool> sound{true};
  const int64_t count = (n + kRows - 1) / kRows;
  parallel(jobs.empty() ? 0 : count, count, [&](int64_t i) {
    if (!kernels().linear_union(job, i * kRows, std::min(n, (i + 1) * kRows))) sound = false;
  });
  STD_TORCH_CHECK(sound, "dwm_fast: bits and row_starts count different numbers of kept weights");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("linear_union(Tensor x, Tensor values, Tensor row_starts, Tensor bits, Tensor? bias, int[] parts, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("linear_union", TORCH_BOX(&linear_union));
}
