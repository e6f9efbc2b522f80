// linear_packed: rows of x under the masks of their domains.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

// Bits of every domain for a weight of `numel` elements: (domains, nbytes), rows may lie apart.
void check_domains(const Tensor& bits, int64_t numel) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 2 && bits.size(1) == packed_nbytes(numel) &&
                      (bits.size(1) == 0 || bits.stride(1) == 1),
                  "dwm_fast: bits must be uint8 of one packed row per domain");
}

// The parts of a product with n outputs and m rows of x. bias: (n,), or (domains, n). parts: (domain, begin, end) rows of
// x, flat.
std::vector<LinearPart> parts_of(const Tensor& bits, const std::optional<Tensor>& bias, const Integers& parts, int64_t m,
                                 int64_t n) {
  const int64_t domains = bits.size(0);
  const bool own_bias = bias && bias->dim() == 2;
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == (own_bias ? domains * n : n) && bias->is_contiguous(),
                    "dwm_fast: bias has another length");
  }
  std::vector<LinearPart> jobs;
  STD_TORCH_CHECK(parts.size() % 3 == 0, "dwm_fast: parts come as domain, begin, end");
  for (size_t i = 0; i < parts.size(); i += 3) {
    const int64_t domain = parts[i], begin = parts[i + 1], end = parts[i + 2];
    STD_TORCH_CHECK(domain >= 0 && domain < domains && begin >= 0 && begin <= end && end <= m,
                    "dwm_fast: a part lies outside of the matrices");
    const float* shift = bias ? floats(*bias) + (own_bias ? domain * n : 0) : nullptr;
    jobs.push_back({bytes(bits) + domain * bits.stride(0), shift, begin, end});
  }
  return jobs;
}

void linear_packed(Tensor x, Tensor weight, Tensor bits, std::optional<Tensor> bias, Integers parts, Tensor out) {
  for (const Tensor* t : {&x, &weight, &out}) {
    check_float(*t, "linear_packed's operand");
    STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous(), "dwm_fast: linear_packed takes contiguous matrices");
  }
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(x.size(1) == k && out.size(0) == m && out.size(1) == n,
                  "dwm_fast: linear_packed got matrices that do not fit each other");
  check_domains(bits, n * k);
  const std::vector<LinearPart> jobs = parts_of(bits, bias, parts, m, n);
  const LinearPacked job{floats(x), floats(weight), floats(out), jobs.data(), static_cast<int64_t>(jobs.size()), n, k};
  constexpr int64_t kRows = 16;  // of the weight, handed to one thread at a time
  const int64_t count = (n + kRows - 1) / kRows;
  parallel(count, count, [&](int64_t i) {
    kernels().linear_packed(job, i * kRows, std::min(n, (i + 1) * kRows));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("linear_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, int[] parts, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
}
