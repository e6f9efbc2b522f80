// sample and its backward, and the random words of the noise contract.
#pragma once
#include <algorithm>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

void random_words(Tensor out, int64_t first, int64_t layer, Tensor rng_state, int64_t step_offset) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Int && out.is_contiguous() && first >= 0,
                  "dwm_fast: words go into a contiguous int32 tensor");
  kernels().random_words(static_cast<uint64_t>(first), out.numel(), static_cast<uint32_t>(layer),
                         noise_of(rng_state, step_offset), static_cast<uint32_t*>(out.data_ptr()));
}

void sample(Tensors masked, Tensor bits, Tensor penalty, Tensors logits, Tensors weights, Tensor rng_state, Tensor tau,
            Integers layers, Numbers thresholds, int64_t mode, int64_t step_offset) {
  const size_t count = weights.size();
  check_count(masked, count, "masked");
  check_logits(logits, weights);
  STD_TORCH_CHECK(layers.size() == count && thresholds.size() == count,
                  "dwm_fast: sample got wrong layers or thresholds");
  const bool pack = bits.numel() > 0;
  const Integers offsets = pack ? offsets_of(bits, numels_of(weights)) : Integers(count, 0);
  const SampleRule rule{static_cast<int>(mode), common_type(weights, "weights"), common_type(masked, "masked"),
                             noise_of(rng_state, step_offset), 1.0f / tau_of(tau, mode)[0], logits_type(logits)};
  std::vector<SampleTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(masked[i], shape, "masked");
    tensors.push_back({shape, logits[i].data_ptr(), weights[i].data_ptr(), masked[i].data_ptr(),
                       pack ? bytes(bits) + offsets[i] : nullptr, static_cast<uint32_t>(layers[i]),
                       number_of(thresholds, i, tau, mode)});
  }
  const std::vector<Piece> pieces = pieces_of(tensors);
  // One sum a chunk, added in order: the same penalty on any number of threads, which only pieces depend on.
  std::vector<double> sums(pieces.size() * kMostChunks);
  const int64_t pieces_count = static_cast<int64_t>(pieces.size());
  parallel(pieces_count, pieces_count, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    const SampleTensor& t = tensors[static_cast<size_t>(piece.tensor)];
    const int64_t step = chunk_elements(t.shape);
    size_t place = static_cast<size_t>(i * kMostChunks);
    for (int64_t begin = piece.begin; begin < piece.end; begin += step) {
      sums[place++] = kernels().sample(rule, t, begin, std::min(begin + step, piece.end));
    }
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  check_float(penalty, "penalty");
  *floats(penalty) = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, total_of(weights))));
}

void sample_backward(Tensors dlogits, Tensors dweights, Tensors grads, Tensor grad_penalty, Tensors logits,
                     Tensors weights, Tensor rng_state, Tensor tau, Integers layers, Numbers thresholds, int64_t mode,
                     int64_t step_offset) {
  const size_t count = weights.size();
  check_count(grads, count, "grads");
  check_logits(logits, weights);
  if (!dlogits.empty()) check_state(dlogits, weights, "dlogits");
  if (!dweights.empty()) check_count(dweights, count, "dweights");
  STD_TORCH_CHECK(layers.size() == count && thresholds.size() == count,
                  "dwm_fast: sample_backward got wrong layers or thresholds");
  BackwardRule rule = backward_rule(grads, weights, rng_state, tau, mode, step_offset);
  rule.logits = logits_type(logits);
  rule.penalty = scalar_of(grad_penalty, "grad_penalty") / static_cast<float>(std::max<int64_t>(1, total_of(weights)));
  if (!dweights.empty()) {
    STD_TORCH_CHECK(common_type(dweights, "dweights") == rule.weight, "dwm_fast: dweights have another dtype");
  }
  std::vector<BackwardTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(grads[i], shape, "grads");
    if (!dweights.empty()) check_like(dweights[i], shape, "dweights");
    tensors.push_back({shape, grads[i].data_ptr(), logits[i].data_ptr(), weights[i].data_ptr(),
                       dlogits.empty() ? nullptr : floats(dlogits[i]),
                       dweights.empty() ? nullptr : dweights[i].data_ptr(), static_cast<uint32_t>(layers[i]),
                       number_of(thresholds, i, tau, mode)});
  }
  for_pieces(tensors, [&](int64_t, const BackwardTensor& t, int64_t begin, int64_t end) {
    kernels().sample_backward(rule, t, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("random_words(Tensor(a!) out, int first, int layer, Tensor rng_state, int step_offset) -> ()");
  m.def(
      "sample(Tensor(a!)[] masked, Tensor(b!) bits, Tensor(c!) penalty, Tensor[] logits, Tensor[] weights, "
      "Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mode, int step_offset) -> ()");
  m.def(
      "sample_backward(Tensor(a!)[] dlogits, Tensor(b!)[] dweights, Tensor[] grads, Tensor grad_penalty, "
      "Tensor[] logits, Tensor[] weights, Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mode, "
      "int step_offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("random_words", TORCH_BOX(&random_words));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_backward", TORCH_BOX(&sample_backward));
}
