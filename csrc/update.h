// Optimiser steps in one pass: frozen AdamW and SGD skip the lanes whose bit is 1; mask Adam folds the chain rule and
// the regulariser of the logits into Adam. Formulas and their order: dwm_fast/ops/update.py.
#pragma once

#include "sample.h"

namespace dwm::DWM_ISA {

static DWM_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }

struct AdamLane {
  float value, exp_avg, exp_avg_sq;
};

// decay * w, and 0 without decay whatever w is: a logit may be infinite, which keeps or drops its weight for good.
static DWM_INLINE float pull(float decay, float w) { return decay == 0.0f ? 0.0f : decay * w; }

static DWM_INLINE AdamLane adam_lane(const AdamRule& rule, float w, float g, float m, float v) {
  const float gradient = rule.sign * g + pull(rule.decay, w);
  const float first = m + rule.beta1_complement * (gradient - m);
  const float second = v * rule.beta2 + rule.beta2_complement * (gradient * gradient);
  const float denominator = sqrt_(second) * rule.inverse_correction + rule.eps;
  return {w * rule.shrink - rule.step_size * first / denominator, first, second};
}

// fp32 weights change in place; others arrive as `w`, leave as `moved`, and are rounded and stored by store_free.
DWM_NOINLINE static void adamw_run(const AdamRule& rule, const float* __restrict w, const float* __restrict g,
                                   float* __restrict m, float* __restrict v, const uint8_t* __restrict keep,
                                   float* __restrict moved, int n) {
  const AdamRule local = rule;
  for (int i = 0; i < n; ++i) {
    const AdamLane lane = adam_lane(local, w[i], g[i], m[i], v[i]);
    moved[i] = lane.value;
    m[i] = keep[i] ? m[i] : lane.exp_avg;
    v[i] = keep[i] ? v[i] : lane.exp_avg_sq;
  }
}

DWM_NOINLINE static void adamw_run_f32(const AdamRule& rule, float* __restrict w, const float* __restrict g,
                                       float* __restrict m, float* __restrict v, const uint8_t* __restrict keep,
                                       int n) {
  const AdamRule local = rule;
  for (int i = 0; i < n; ++i) {
    const AdamLane lane = adam_lane(local, w[i], g[i], m[i], v[i]);
    w[i] = keep[i] ? w[i] : lane.value;
    m[i] = keep[i] ? m[i] : lane.exp_avg;
    v[i] = keep[i] ? v[i] : lane.exp_avg_sq;
  }
}

DWM_NOINLINE static void sgd_run(const SgdRule& rule, const float* __restrict w, const float* __restrict g,
                                 float* __restrict moved, int n) {
  const SgdRule local = rule;
  for (int i = 0; i < n; ++i) {
    moved[i] = w[i] * local.shrink - local.lr * (local.sign * g[i] + pull(local.decay, w[i]));
  }
}

struct SgdLane {
  float value, momentum;
};

static DWM_INLINE SgdLane sgd_momentum_lane(const SgdRule& rule, float w, float g, float m) {
  const float gradient = rule.sign * g + pull(rule.decay, w);
  const float rolled = rule.momentum * m + rule.dampening_complement * gradient;
  const float velocity = rule.first ? gradient : rolled;
  const float direction = rule.nesterov ? gradient + rule.momentum * velocity : velocity;
  return {w * rule.shrink - rule.lr * direction, velocity};
}

DWM_NOINLINE static void sgd_momentum_run(const SgdRule& rule, const float* __restrict w, const float* __restrict g,
                                          float* __restrict m, const uint8_t* __restrict keep,
                                          float* __restrict moved, int n) {
  const SgdRule local = rule;
  for (int i = 0; i < n; ++i) {
    const SgdLane lane = sgd_momentum_lane(local, w[i], g[i], m[i]);
    moved[i] = lane.value;
    m[i] = keep[i] ? m[i] : lane.momentum;
  }
}

DWM_NOINLINE static void sgd_momentum_run_f32(const SgdRule& rule, float* __restrict w, const float* __restrict g,
                                              float* __restrict m, const uint8_t* __restrict keep, int n) {
  const SgdRule local = rule;
  for (int i = 0; i < n; ++i) {
    const SgdLane lane = sgd_momentum_lane(local, w[i], g[i], m[i]);
    w[i] = keep[i] ? w[i] : lane.value;
    m[i] = keep[i] ? m[i] : lane.momentum;
  }
}

// Stores of free lanes: a kept weight's bits stay as they are, whatever they mean.
DWM_NOINLINE static void store_free(Type type, const float* __restrict moved, const uint8_t* __restrict keep,
                                    void* __restrict base, int64_t at, int n) {
  if (type == Type::f32) {
    float* weight = static_cast<float*>(base) + at;
    for (int i = 0; i < n; ++i) weight[i] = keep[i] ? weight[i] : moved[i];
    return;
  }
  uint16_t* weight = static_cast<uint16_t*>(base) + at;
  if (type == Type::bf16) {
    for (int i = 0; i < n; ++i) weight[i] = keep[i] ? weight[i] : to_bf16(moved[i]);
  } else {
    for (int i = 0; i < n; ++i) weight[i] = keep[i] ? weight[i] : to_f16(moved[i]);
  }
}

// step(at, n, weights, gradients, keep, moved) for every run, between loading and storing the weights.
template <typename Tensor, typename Step>
static inline void update_free(UpdateTypes types, const Tensor& t, int64_t begin, int64_t end, Step&& step) {
  alignas(64) float weight[kTile], grad[kTile], moved[kTile];
  walk<Wanted{.bits_in = true}>(
      t.shape, TileSource{.bits_in = t.bits}, begin, end, [&](int64_t at, int64_t n, const uint32_t*, uint8_t* keep) {
        const int count = static_cast<int>(n);
        const float* w = load_run(types.weight, t.weight, at, n, weight);
        const float* g = load_run(types.grad, t.grad, at, n, grad);
        step(at, count, w, g, keep, moved);
        store_free(types.weight, moved, keep, t.weight, at, count);
      });
}

// Lanes of one tile of a tensor with compact state: small enough that offsets and values stay in a first-level cache.
constexpr int64_t kFreeTile = 1024;

// Memory offsets of the free ones among elements [begin, begin + n), in logical order; returns their number.
// begin: a multiple of 8 and of shape.spatial; n <= kFreeTile.
DWM_NOINLINE static int free_offsets(const Shape& shape, const uint8_t* bits, int64_t begin, int64_t n,
                                     int64_t* __restrict offsets) {
  alignas(64) uint8_t keep[kFreeTile];
  unpack_bytes(bits + begin / 8, n, keep);
  int count = 0;
  if (shape.spatial == 1) {
    for (int64_t e = 0; e < n; ++e) {
      offsets[count] = begin + e;
      count += 1 - keep[e];
    }
    return count;
  }
  const uint8_t* next = keep;
  for (int64_t column = begin / shape.spatial; next < keep + n; ++column) {
    const int64_t first = column / shape.inner * shape.spatial * shape.inner + column % shape.inner;
    for (int64_t s = 0; s < shape.spatial; ++s) {
      offsets[count] = first + s * shape.inner;
      count += 1 - *next++;
    }
  }
  return count;
}

template <typename T>
static inline void gather(const void* base, const int64_t* offsets, int n, T* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<const T*>(base)[offsets[i]];
}

template <typename T>
static inline void scatter(const T* values, const int64_t* offsets, int n, void* base) {
  for (int i = 0; i < n; ++i) static_cast<T*>(base)[offsets[i]] = values[i];
}

DWM_NOINLINE static void gather_lanes(Type type, const void* base, const int64_t* offsets, int n, float* values) {
  if (type == Type::f32) return gather(base, offsets, n, values);
  alignas(64) uint16_t raw[kFreeTile];
  gather(base, offsets, n, raw);
  load_run(type, raw, 0, n, values);
}

DWM_NOINLINE static void scatter_lanes(Type type, const float* values, const int64_t* offsets, int n, void* base) {
  if (type == Type::f32) return scatter(values, offsets, n, base);
  alignas(64) uint16_t raw[kFreeTile];
  store_run(type, values, raw, 0, n);
  scatter(raw, offsets, n, base);
}

// step(at, n, weights, gradients, moved) for the free lanes of a tile, whose state begins at `at`.
template <typename Tensor, typename Step>
static inline void update_compact(UpdateTypes types, const Tensor& t, int64_t begin, int64_t end, Step&& step) {
  alignas(64) float weight[kFreeTile], grad[kFreeTile], moved[kFreeTile];
  alignas(64) int64_t offsets[kFreeTile];
  const int64_t tile = t.shape.spatial == 1 ? kFreeTile : kFreeTile / t.shape.spatial / 8 * 8 * t.shape.spatial;
  int64_t at = t.ranks[begin / 128];
  for (int64_t e = begin; e < end; e += tile) {
    const int n = free_offsets(t.shape, t.bits, e, end - e < tile ? end - e : tile, offsets);
    gather_lanes(types.weight, t.weight, offsets, n, weight);
    gather_lanes(types.grad, t.grad, offsets, n, grad);
    step(at, n, weight, grad, moved);
    scatter_lanes(types.weight, moved, offsets, n, t.weight);
    at += n;
  }
}

// No lane of a tile is kept.
alignas(64) constexpr uint8_t kAllFree[kFreeTile] = {};

static void compact_adamw(UpdateTypes types, const AdamWTensor& t, int64_t begin, int64_t end) {
  update_compact(types, t, begin, end, [&](int64_t at, int n, const float* w, const float* g, float* moved) {
    adamw_run(t.rule, w, g, t.exp_avg + at, t.exp_avg_sq + at, kAllFree, moved, n);
  });
}

static void compact_sgd(UpdateTypes types, const SgdTensor& t, int64_t begin, int64_t end) {
  update_compact(types, t, begin, end, [&](int64_t at, int n, const float* w, const float* g, float* moved) {
    sgd_momentum_run(t.rule, w, g, t.momentum + at, kAllFree, moved, n);
  });
}

// fp32 weights and gradients of any memory order, in place: step(at, n, weight, gradient, keep) for every run.
template <typename Tensor, typename Step>
static inline void update_in_place(const Tensor& t, int64_t begin, int64_t end, Step&& step) {
  walk<Wanted{.bits_in = true}>(
      t.shape, TileSource{.bits_in = t.bits}, begin, end,
      [&](int64_t at, int64_t n, const uint32_t*, const uint8_t* keep) {
        step(at, static_cast<int>(n), static_cast<float*>(t.weight) + at, static_cast<const float*>(t.grad) + at, keep);
      });
}

static inline bool in_place(UpdateTypes types) { return types.weight == Type::f32 && types.grad == Type::f32; }

static void frozen_adamw(UpdateTypes types, const AdamWTensor& t, int64_t begin, int64_t end) {
  if (t.ranks) return compact_adamw(types, t, begin, end);
  if (in_place(types)) {
    return update_in_place(t, begin, end, [&](int64_t at, int n, float* w, const float* g, const uint8_t* keep) {
      adamw_run_f32(t.rule, w, g, t.exp_avg + at, t.exp_avg_sq + at, keep, n);
    });
  }
  update_free(types, t, begin, end,
              [&](int64_t at, int n, const float* w, const float* g, const uint8_t* keep, float* moved) {
                adamw_run(t.rule, w, g, t.exp_avg + at, t.exp_avg_sq + at, keep, moved, n);
              });
}

static void frozen_sgd(UpdateTypes types, const SgdTensor& t, int64_t begin, int64_t end) {
  if (t.ranks && t.momentum) return compact_sgd(types, t, begin, end);
  if (in_place(types) && t.momentum) {
    return update_in_place(t, begin, end, [&](int64_t at, int n, float* w, const float* g, const uint8_t* keep) {
      sgd_momentum_run_f32(t.rule, w, g, t.momentum + at, keep, n);
    });
  }
  update_free(types, t, begin, end,
              [&](int64_t at, int n, const float* w, const float* g, const uint8_t* keep, float* moved) {
                if (t.momentum) {
                  sgd_momentum_run(t.rule, w, g, t.momentum + at, keep, moved, n);
                } else {
                  sgd_run(t.rule, w, g, moved, n);
                }
              });
}

DWM_NOINLINE static void adam_run(const AdamRule& rule, float* __restrict l, const float* __restrict g,
                                  float* __restrict m, float* __restrict v, int n) {
  const AdamRule local = rule;
  for (int i = 0; i < n; ++i) {
    const AdamLane lane = adam_lane(local, l[i], g[i], m[i], v[i]);
    l[i] = lane.value;
    m[i] = lane.exp_avg;
    v[i] = lane.exp_avg_sq;
  }
}

template <int kMode>
static void mask_adam_range(const BackwardRule& chain, const MaskAdamTensor& t, int64_t begin, int64_t end) {
  constexpr Wanted kWanted{.words = draws_noise(kMode)};
  const TileSource source{.layer = t.layer, .noise = chain.noise};
  const ChainRule rule{t.threshold, chain.inverse_tau, chain.penalty};
  alignas(64) float grad[kTile], weight[kTile], slope[kTile];
  walk<kWanted>(t.shape, source, begin, end, [&](int64_t at, int64_t n, const uint32_t* words, uint8_t*) {
    const int count = static_cast<int>(n);
    const float* g = load_run(chain.grad, t.grad, at, n, grad);
    const float* w = load_run(chain.weight, t.weight, at, n, weight);
    logit_slopes<kMode>(rule, g, w, t.logits + at, words, slope, count);
    adam_run(t.rule, t.logits + at, slope, t.exp_avg + at, t.exp_avg_sq + at, count);
  });
}

static void mask_adam(const BackwardRule& chain, const MaskAdamTensor& t, int64_t begin, int64_t end) {
  switch (chain.mode) {
    case kScaledSoft: return mask_adam_range<kScaledSoft>(chain, t, begin, end);
    case kGumbelHard: return mask_adam_range<kGumbelHard>(chain, t, begin, end);
    case kGumbelSoft: return mask_adam_range<kGumbelSoft>(chain, t, begin, end);
    case kKeep: return mask_adam_range<kKeep>(chain, t, begin, end);
    case kThreshold: return mask_adam_range<kThreshold>(chain, t, begin, end);
    case kTernary: return mask_adam_range<kTernary>(chain, t, begin, end);
    default: return mask_adam_range<kEdit>(chain, t, begin, end);
  }
}

}  // namespace dwm::DWM_ISA
