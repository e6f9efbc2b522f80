// coded_adam: Adam on logits and moments in fewer bits.
#pragma once
#include <cmath>
#include <vector>

#include "bind_update.h"

namespace {

Type moments_type(const Tensor& first, const Tensor& second) {
  const ScalarType a = first.scalar_type(), b = second.scalar_type();
  if (a == ScalarType::Float && b == ScalarType::Float) return Type::f32;
  if (a == ScalarType::BFloat16 && b == ScalarType::BFloat16) return Type::bf16;
  STD_TORCH_CHECK(a == ScalarType::Char && b == ScalarType::Byte, "dwm_fast: unknown dtypes of moments");
  return Type::i8;
}

CodedRule coded_rule(double step, double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool decoupled) {
  CodedRule rule;
  rule.rate = static_cast<float>(1.0 - beta1);
  rule.near = 1.0 - beta1 < 0.5;
  rule.beta2 = static_cast<float>(beta2);
  rule.rate2 = static_cast<float>(1.0 - beta2);
  rule.step_size = static_cast<float>(-lr / (1.0 - std::pow(beta1, step)));
  rule.root = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
  rule.eps = static_cast<float>(eps);
  rule.shrink = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  rule.decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
  rule.step = static_cast<uint32_t>(static_cast<int64_t>(step));
  return rule;
}

float* scale_of(const Tensors& scales, size_t i, int64_t numel) {
  if (scales.empty()) return nullptr;
  check_float(scales[i], "scales");
  STD_TORCH_CHECK(scales[i].is_contiguous() && scales[i].numel() == (numel + kCodeBlock - 1) / kCodeBlock,
                  "dwm_fast: one scale a block of 128 is expected");
  return floats(scales[i]);
}

void coded_adam(Tensors logits, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors exp_avg_scale,
                Tensors exp_avg_sq_scale, Tensor rng_state, Integers layers, Tensor steps, Tensor lr, double beta1,
                double beta2, double eps, double weight_decay, bool decoupled) {
  const size_t count = logits.size();
  if (count == 0) return;
  check_state(grads, logits, "grads");
  check_count(exp_avg, count, "exp_avg");
  check_count(exp_avg_sq, count, "exp_avg_sq");
  STD_TORCH_CHECK(layers.size() == count, "dwm_fast: coded_adam got wrong layers");
  const Schedule schedule = schedule_of(steps, lr, count);
  const CodedTypes types{logits_type(logits), moments_type(exp_avg[0], exp_avg_sq[0])};
  for (const Tensors* scales : {&exp_avg_scale, &exp_avg_sq_scale}) {
    check_count(*scales, types.moments == Type::i8 ? count : 0, "scales");
  }
  std::vector<CodedTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = logits[i].numel();
    STD_TORCH_CHECK(moments_type(exp_avg[i], exp_avg_sq[i]) == types.moments, "dwm_fast: moments must have one format");
    for (const Tensor& t : {logits[i], exp_avg[i], exp_avg_sq[i]}) {
      STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, "dwm_fast: coded_adam takes contiguous tensors");
    }
    tensors.push_back({shape_of(logits[i]), logits[i].data_ptr(), floats(grads[i]), exp_avg[i].data_ptr(),
                       exp_avg_sq[i].data_ptr(), scale_of(exp_avg_scale, i, numel),
                       scale_of(exp_avg_sq_scale, i, numel), static_cast<uint32_t>(layers[i]),
                       noise_of(rng_state, 0).seed,
                       coded_rule(schedule.steps[i], schedule.lr, beta1, beta2, eps, weight_decay, decoupled)});
  }
  for_pieces(tensors, [&](int64_t, const CodedTensor& t, int64_t begin, int64_t end) {
    kernels().coded_adam(types, t, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def(
      "coded_adam(Tensor(a!)[] logits, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] exp_avg_scale, Tensor(e!)[] exp_avg_sq_scale, Tensor rng_state, int[] layers, Tensor steps, "
      "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) { m.impl("coded_adam", TORCH_BOX(&coded_adam)); }
