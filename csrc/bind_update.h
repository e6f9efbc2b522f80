// Optimiser steps that read bits or draw masks.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

// Steps counted from 1, one per tensor, and the learning rate: read here, since a CPU scalar is free to read.
struct Schedule {
  const float* steps;
  double lr;
};

Schedule schedule_of(const Tensor& steps, const Tensor& lr, size_t count) {
  check_float(steps, "steps");
  STD_TORCH_CHECK(steps.is_contiguous() && steps.numel() == static_cast<int64_t>(count),
                  "dwm_fast: steps must hold one number per tensor");
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.numel() == 1, "dwm_fast: lr must be one float64");
  return {floats(steps), *static_cast<const double*>(lr.data_ptr())};
}

AdamRule adam_rule(double step, double lr, double beta1, double beta2, double eps, double weight_decay,
                        bool decoupled, bool maximize) {
  AdamRule rule;
  rule.beta1_complement = static_cast<float>(1.0 - beta1);
  rule.beta2 = static_cast<float>(beta2);
  rule.beta2_complement = static_cast<float>(1.0 - beta2);
  rule.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  rule.inverse_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  rule.eps = static_cast<float>(eps);
  rule.shrink = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  rule.decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
  rule.sign = maximize ? -1.0f : 1.0f;
  return rule;
}

// Tensors with compact state: `ranks` counts the free lanes of a tensor before each 128 of them. Checked against the
// bits where the kernels read it, at the beginning of every chunk, and against the states' lengths.
void check_compact(const Tensors& weights, const std::vector<const Tensors*>& states, const Tensor& bits,
                   const Integers& offsets, const Tensor& ranks) {
  STD_TORCH_CHECK(ranks.scalar_type() == ScalarType::Long && ranks.is_contiguous() &&
                      16 * ranks.numel() == bits.numel(),
                  "dwm_fast: ranks must be one int64 per 16 bytes of bits");
  for (const Tensors* state : states) check_count(*state, weights.size(), "state");
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t numel = weights[i].numel(), step = chunk_elements(shape_of(weights[i]));
    const int64_t* before = static_cast<const int64_t*>(ranks.data_ptr()) + offsets[i] / 16;
    int64_t free = 0;
    for (int64_t begin = 0; begin < numel; begin += step) {
      STD_TORCH_CHECK(before[begin / 128] == free, "dwm_fast: ranks do not count the free lanes of bits");
      const int64_t lanes = std::min(step, numel - begin);
      free += lanes - kernels().count(bytes(bits) + offsets[i] + begin / 8, packed_nbytes(lanes));
    }
    for (const Tensors* state : states) {
      const Tensor& t = (*state)[i];
      check_float(t, "state");
      STD_TORCH_CHECK(t.numel() == free && t.is_contiguous(), "dwm_fast: compact state has another length than lanes");
    }
  }
}

// Where the ranks of the tensor whose bits begin at `offset` lie; nullptr for dense state.
const int64_t* ranks_at(const Tensor& ranks, int64_t offset) {
  return ranks.numel() == 0 ? nullptr : static_cast<const int64_t*>(ranks.data_ptr()) + offset / 16;
}

void frozen_adamw(Tensors weights, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensor bits, Tensor ranks,
                  Tensor steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                  bool maximize) {
  check_gradients(grads, weights);
  const Integers offsets = offsets_of(bits, numels_of(weights));
  if (ranks.numel() > 0) {
    check_compact(weights, {&exp_avg, &exp_avg_sq}, bits, offsets, ranks);
  } else {
    check_state(exp_avg, weights, "exp_avg");
    check_state(exp_avg_sq, weights, "exp_avg_sq");
  }
  const Schedule schedule = schedule_of(steps, lr, weights.size());
  const UpdateTypes types{common_type(weights, "weights"), common_type(grads, "grads")};
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    tensors.push_back({shape_of(weights[i]), weights[i].data_ptr(), grads[i].data_ptr(), floats(exp_avg[i]),
                       floats(exp_avg_sq[i]), bytes(bits) + offsets[i], ranks_at(ranks, offsets[i]),
                       adam_rule(schedule.steps[i], schedule.lr, beta1, beta2, eps, weight_decay, decoupled,
                                 maximize)});
  }
  for_pieces(tensors, [&](int64_t, const AdamWTensor& t, int64_t begin, int64_t end) {
    kernels().frozen_adamw(types, t, begin, end);
  });
}

void frozen_sgd(Tensors weights, Tensors grads, Tensors momentum_buffers, Tensor bits, Tensor ranks, Tensor steps,
                Tensor lr, double momentum, double dampening, double weight_decay, bool nesterov, bool decoupled,
                bool maximize) {
  check_gradients(grads, weights);
  const bool moving = momentum != 0.0;
  const Integers offsets = offsets_of(bits, numels_of(weights));
  if (moving && ranks.numel() > 0) {
    check_compact(weights, {&momentum_buffers}, bits, offsets, ranks);
  } else if (moving) {
    check_state(momentum_buffers, weights, "momentum_buffers");
  }
  const Schedule schedule = schedule_of(steps, lr, weights.size());
  const UpdateTypes types{common_type(weights, "weights"), common_type(grads, "grads")};
  SgdRule rule{static_cast<float>(schedule.lr),
                    static_cast<float>(momentum),
                    static_cast<float>(1.0 - dampening),
                    decoupled ? static_cast<float>(1.0 - schedule.lr * weight_decay) : 1.0f,
                    decoupled ? 0.0f : static_cast<float>(weight_decay),
                    maximize ? -1.0f : 1.0f,
                    nesterov,
                    false};
  std::vector<SgdTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    rule.first = schedule.steps[i] == 1.0f;
    tensors.push_back({shape_of(weights[i]), weights[i].data_ptr(), grads[i].data_ptr(),
                       moving ? floats(momentum_buffers[i]) : nullptr, bytes(bits) + offsets[i],
                       ranks_at(ranks, offsets[i]), rule});
  }
  for_pieces(tensors, [&](int64_t, const SgdTensor& t, int64_t begin, int64_t end) {
    kernels().frozen_sgd(types, t, begin, end);
  });
}

void mask_adam(Tensors logits, Tensors weights, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensor rng_state,
               Tensor tau, Integers layers, Numbers thresholds, int64_t mode, int64_t step_offset,
               Tensor penalty_scale, Tensor steps, Tensor lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled) {
  const size_t count = logits.size();
  check_count(weights, count, "weights");
  check_gradients(grads, weights);
  check_state(logits, weights, "logits");
  check_state(exp_avg, weights, "exp_avg");
  check_state(exp_avg_sq, weights, "exp_avg_sq");
  STD_TORCH_CHECK(layers.size() == count && thresholds.size() == count,
                  "dwm_fast: mask_adam got wrong layers or thresholds");
  BackwardRule chain = backward_rule(grads, weights, rng_state, tau, mode, step_offset);
  chain.penalty = scalar_of(penalty_scale, "penalty_scale");
  const Schedule schedule = schedule_of(steps, lr, count);
  std::vector<MaskAdamTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back({shape_of(logits[i]), floats(logits[i]), weights[i].data_ptr(), grads[i].data_ptr(),
                       floats(exp_avg[i]), floats(exp_avg_sq[i]), static_cast<uint32_t>(layers[i]),
                       number_of(thresholds, i, tau, mode),
                       adam_rule(schedule.steps[i], schedule.lr, beta1, beta2, eps, weight_decay, decoupled, false)});
  }
  for_pieces(tensors, [&](int64_t, const MaskAdamTensor& t, int64_t begin, int64_t end) {
    kernels().mask_adam(chain, t, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def(
      "frozen_adamw(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor bits, "
      "Tensor ranks, Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, "
      "bool maximize) -> ()");
  m.def(
      "frozen_sgd(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor bits, Tensor ranks, "
      "Tensor steps, Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool decoupled, bool maximize) "
      "-> ()");
  m.def(
      "mask_adam(Tensor(a!)[] logits, Tensor[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mask_mode, "
      "int step_offset, Tensor penalty_scale, Tensor steps, Tensor lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("frozen_adamw", TORCH_BOX(&frozen_adamw));
  m.impl("frozen_sgd", TORCH_BOX(&frozen_sgd));
  m.impl("mask_adam", TORCH_BOX(&mask_adam));
}
