// KSM's soft masks of filters, and SPG's soft-masked step.
#pragma once
#include <algorithm>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

// Weights (out, in, ...) in contiguous or channels_last order, with one number a kernel.
std::vector<FilterTensor> filters_of(const Tensors& reals, const Tensors& weights, const Tensors& grads,
                                     const Tensors& out) {
  check_count(reals, weights.size(), "reals");
  check_count(out, weights.size(), "out");
  std::vector<FilterTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const Shape shape = shape_of(weight);
    STD_TORCH_CHECK(weight.dim() >= 2, "dwm_fast: a weight needs two dimensions");
    check_float(weight, "weights");
    check_float(reals[i], "reals");
    check_float(out[i], "out");
    const int64_t outer = weight.size(0), inner = weight.size(1), kernels = outer * inner;
    STD_TORCH_CHECK(reals[i].is_contiguous() && reals[i].numel() == kernels, "dwm_fast: reals have another shape");
    if (!grads.empty()) {
      check_float(grads[i], "grads");
      check_like(grads[i], shape, "grads");
      STD_TORCH_CHECK(out[i].is_contiguous() && out[i].numel() == kernels, "dwm_fast: out has another shape");
    } else {
      check_like(out[i], shape, "out");
    }
    tensors.push_back({outer, inner, kernels ? shape.numel / kernels : 0, shape.spatial > 1, floats(reals[i]),
                       floats(weight), grads.empty() ? nullptr : floats(grads[i]), floats(out[i])});
  }
  return tensors;
}

// body(index, tensor, begin, end): rows of every tensor that has elements, about a chunk of elements at a time.
template <typename Body>
void for_rows(const std::vector<FilterTensor>& tensors, const Body& body) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const FilterTensor& t = tensors[i];
    const int64_t width = t.inner * t.taps;
    if (width == 0) continue;
    const int64_t step = std::max<int64_t>(1, kChunk / width);
    for (int64_t begin = 0; begin < t.outer; begin += step) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(begin + step, t.outer)});
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel(count, count, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    body(static_cast<size_t>(piece.tensor), tensors[static_cast<size_t>(piece.tensor)], piece.begin, piece.end);
  });
}

void kernel_soft(Tensors masked, Tensors reals, Tensors weights, double threshold) {
  const std::vector<FilterTensor> tensors = filters_of(reals, weights, {}, masked);
  const float border = static_cast<float>(threshold);
  std::vector<FilterRange> ranges(tensors.size());
  const int64_t count = static_cast<int64_t>(tensors.size());
  parallel(count, count, [&](int64_t i) {
    const FilterTensor& t = tensors[static_cast<size_t>(i)];
    if (t.outer * t.inner > 0) ranges[static_cast<size_t>(i)] = kernels().filter_range(border, t);
  });
  for_rows(tensors, [&](size_t i, const FilterTensor& t, int64_t begin, int64_t end) {
    kernels().kernel_soft(border, ranges[i], t, begin, end);
  });
}

void kernel_soft_backward(Tensors dreals, Tensors grads, Tensors reals, Tensors weights, double threshold) {
  check_count(grads, weights.size(), "grads");
  const float border = static_cast<float>(threshold);
  for_rows(filters_of(reals, weights, grads, dreals), [&](size_t, const FilterTensor& t, int64_t begin, int64_t end) {
    kernels().kernel_soft_backward(border, t, begin, end);
  });
}

void soft_masked_sgd(Tensors weights, Tensors grads, Tensors gammas, Tensor lr) {
  check_gradients(grads, weights);
  check_count(gammas, weights.size(), "gammas");
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.numel() == 1, "dwm_fast: lr must be one float64");
  const float rate = static_cast<float>(*static_cast<const double*>(lr.data_ptr()));
  const UpdateTypes types{common_type(weights, "weights"), common_type(grads, "grads")};
  std::vector<SoftTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool whole = gammas[i].dim() == 0;
    check_float(gammas[i], "gammas");
    if (!whole) check_like(gammas[i], shape_of(weights[i]), "gammas");
    tensors.push_back({Shape{weights[i].numel()}, weights[i].data_ptr(), grads[i].data_ptr(), floats(gammas[i]), whole});
  }
  for_pieces(tensors, [&](int64_t, const SoftTensor& t, int64_t begin, int64_t end) {
    kernels().soft_masked_sgd(types, rate, t, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("kernel_soft(Tensor(a!)[] masked, Tensor[] reals, Tensor[] weights, float threshold) -> ()");
  m.def(
      "kernel_soft_backward(Tensor(a!)[] dreals, Tensor[] grads, Tensor[] reals, Tensor[] weights, float threshold) "
      "-> ()");
  m.def("soft_masked_sgd(Tensor(a!)[] weights, Tensor[] grads, Tensor[] gammas, Tensor lr) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("kernel_soft", TORCH_BOX(&kernel_soft));
  m.impl("kernel_soft_backward", TORCH_BOX(&kernel_soft_backward));
  m.impl("soft_masked_sgd", TORCH_BOX(&soft_masked_sgd));
}
