// sample and its backward: one tensor's range, every rule. Formulas: dwm_fast/ops/sample.py.
#pragma once

#include "tiles.h"
#include "vecmath.h"

namespace dwm::DWM_ISA {

// Everything that the Gumbel rules need of a logit comes from one exponential, e^-l.
// P(kept) = sigmoid(l) = 1 / (1 + e^-l); a weight is kept where u > P(not kept) = e^-l / (1 + e^-l), and in the upper
// tail, where u stands for -(1 - u), where 1 - u < P(kept).
struct Odds {
  float against;  // e^-l
  float keep;     // sigmoid(l)
};

static DWM_INLINE Odds odds_of(float logit) {
  const float against = exp_(-logit);
  return {against, 1.0f / (1.0f + against)};
}

static DWM_INLINE bool kept(const Odds& odds, float u) { return u > (u < 0.0f ? -odds.keep : odds.against * odds.keep); }

// u and 1 - u, the small one of a tail exact.
struct Pair {
  float u;
  float other;
};

static DWM_INLINE Pair pair_of(float u) {
  const float near = magnitude_of(u), far = 1.0f - near;
  return {u < 0.0f ? far : near, u < 0.0f ? near : far};
}

// soft = sigmoid((l + log u - log(1 - u)) / tau). At tau = 1 it is u / (u + (1 - u) e^-l), without a logarithm.
template <bool kUnitTau>
static DWM_INLINE float soft_value(float logit, float u, float inverse_tau) {
  const Pair p = pair_of(u);
  if constexpr (kUnitTau) return p.u / (p.u + p.other * exp_(-logit));
  return 1.0f / (1.0f + exp_(-(logit + log_(p.u / p.other)) * inverse_tau));
}

// d soft / d l = soft (1 - soft) / tau; `against` = e^-l.
template <bool kUnitTau>
static DWM_INLINE float soft_slope(float logit, float against, float u, float inverse_tau) {
  const Pair p = pair_of(u);
  if constexpr (kUnitTau) {
    const float other = p.other * against;
    const float inverse = 1.0f / (p.u + other);
    return (p.u * inverse) * (other * inverse);
  }
  const float odds = exp_(-(logit + log_(p.u / p.other)) * inverse_tau);
  const float soft = 1.0f / (1.0f + odds);
  return soft * (odds * soft) * inverse_tau;
}

// d penalty / d e of an edit, apart from 1 / elements: -sign(e) e^-|e|.
static DWM_INLINE float edit_penalty_slope(float edit) {
  const float decay = exp_(edit < 0.0f ? edit : -edit);
  const float signed_decay = edit > 0.0f ? -decay : decay;
  return edit == 0.0f ? 0.0f : signed_decay;
}

struct RunRule {
  float threshold;  // kScaledSoft: kappa
  float inverse_tau;
};

constexpr bool draws_noise(int mode) { return mode <= kGumbelSoft; }
constexpr bool has_penalty(int mode) { return draws_noise(mode) || mode == kEdit; }

// out = masked weight, keep = keep bits (where kBits), terms = each element's share of the penalty (where it has one).
template <int kMode, bool kBits, bool kUnitTau>
DWM_NOINLINE static void sample_run(const RunRule& rule, const float* __restrict l, const float* __restrict weight,
                                    float* __restrict out, const uint32_t* __restrict words,
                                    uint8_t* __restrict keep, float* __restrict terms, int n) {
  const float threshold = rule.threshold, inverse_tau = rule.inverse_tau;
  for (int i = 0; i < n; ++i) {
    const float logit = l[i], w = weight[i];
    bool keeps;
    float value;
    if constexpr (kMode == kScaledSoft) {
      const float u = signed_uniform(words[i]), scaled = logit * threshold;
      const float soft = soft_value<false>(scaled, u, inverse_tau);
      terms[i] = soft;
      keeps = kBits && kept(odds_of(scaled), u);
      value = w * soft;
    } else if constexpr (kMode == kGumbelHard || kMode == kGumbelSoft) {
      const float u = signed_uniform(words[i]);
      const Odds odds = odds_of(logit);
      terms[i] = odds.keep;
      keeps = kept(odds, u);
      value = kMode == kGumbelHard ? (keeps ? w : 0.0f) : w * soft_value<kUnitTau>(logit, u, inverse_tau);
    } else if constexpr (kMode == kKeep) {
      keeps = logit >= 0.0f;
      value = keeps ? w : 0.0f;
    } else if constexpr (kMode == kThreshold) {
      keeps = logit > threshold;
      value = keeps ? w : 0.0f;
    } else if constexpr (kMode == kTernary) {
      const float sign = (logit > threshold ? 1.0f : 0.0f) - (logit < 0.0f ? 1.0f : 0.0f);
      keeps = sign != 0.0f;
      value = w * sign;
    } else {
      const float magnitude = logit < 0.0f ? -logit : logit;
      terms[i] = exp_(-magnitude);
      keeps = magnitude <= 1.0f;
      value = w + threshold * logit;
    }
    out[i] = value;
    if constexpr (kBits) keep[i] = keeps ? 1 : 0;
  }
}

// In sixteen lanes, whatever a register holds: the same bits from every instruction set.
DWM_NOINLINE static float sum_run(const float* terms, int n) {
  constexpr int kSumLanes = 16;
  alignas(64) float sums[kSumLanes] = {};
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) sums[lane] += terms[i + lane];
  }
  for (int lane = 0; i + lane < n; ++lane) sums[lane] += terms[i + lane];
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <int kMode, bool kBits>
static double sample_range(const SampleRule& rule, const SampleTensor& t, int64_t begin, int64_t end) {
  constexpr Wanted kWanted{.words = draws_noise(kMode), .bits_out = kBits};
  const TileSource source{.layer = t.layer, .noise = rule.noise, .bits_out = t.bits};
  const RunRule run_rule{t.threshold, rule.inverse_tau};
  alignas(64) float weight[kTile], result[kTile], terms[kTile], logit[kTile];
  double penalty = 0.0;
  walk<kWanted>(t.shape, source, begin, end, [&](int64_t at, int64_t n, const uint32_t* words, uint8_t* keep) {
    const int count = static_cast<int>(n);
    const float* w = load_run(rule.weight, t.weight, at, n, weight);
    const float* l = load_run(rule.logits, t.logits, at, n, logit);
    float* out = result_run(rule.out, t.out, at, result);
    if (kMode == kGumbelSoft && rule.inverse_tau == 1.0f) {
      sample_run<kMode, kBits, kMode == kGumbelSoft>(run_rule, l, w, out, words, keep, terms, count);
    } else {
      sample_run<kMode, kBits, false>(run_rule, l, w, out, words, keep, terms, count);
    }
    if constexpr (has_penalty(kMode)) penalty += sum_run(terms, count);
    store_run(rule.out, result, t.out, at, n);
  });
  return penalty;
}

template <int kMode>
static double sample_mode(const SampleRule& rule, const SampleTensor& t, int64_t begin, int64_t end) {
  return t.bits ? sample_range<kMode, true>(rule, t, begin, end) : sample_range<kMode, false>(rule, t, begin, end);
}

static double sample(const SampleRule& rule, const SampleTensor& t, int64_t begin, int64_t end) {
  switch (rule.mode) {
    case kScaledSoft: return sample_mode<kScaledSoft>(rule, t, begin, end);
    case kGumbelHard: return sample_mode<kGumbelHard>(rule, t, begin, end);
    case kGumbelSoft: return sample_mode<kGumbelSoft>(rule, t, begin, end);
    case kKeep: return sample_mode<kKeep>(rule, t, begin, end);
    case kThreshold: return sample_mode<kThreshold>(rule, t, begin, end);
    case kTernary: return sample_mode<kTernary>(rule, t, begin, end);
    default: return sample_mode<kEdit>(rule, t, begin, end);
  }
}

struct ChainRule {
  float threshold;
  float inverse_tau;
  float penalty;  // gradient of the penalty over the number of elements of the network
};

// Gradient of logits: chain rule from the masked weight's gradient g, plus the penalty's where kPenalty.
template <int kMode, bool kPenalty, bool kUnitTau>
DWM_NOINLINE static void chain_run(const ChainRule& rule, const float* __restrict grad, const float* __restrict weight,
                                   const float* __restrict l, const uint32_t* __restrict words,
                                   float* __restrict out, int n) {
  const float threshold = rule.threshold, inverse_tau = rule.inverse_tau, penalty = rule.penalty;
  for (int i = 0; i < n; ++i) {
    const float g = grad[i], w = weight[i], logit = l[i];
    if constexpr (kMode == kScaledSoft) {
      const float slope = soft_slope<false>(logit * threshold, 0.0f, signed_uniform(words[i]), inverse_tau) * threshold;
      out[i] = (kPenalty ? g * w + penalty : g * w) * slope;  // the penalty is the mean of the mask itself
    } else if constexpr (kMode == kGumbelHard || kMode == kGumbelSoft) {
      const Odds odds = odds_of(logit);
      const float chain = g * w * soft_slope<kUnitTau>(logit, odds.against, signed_uniform(words[i]), inverse_tau);
      out[i] = kPenalty ? chain + penalty * (odds.keep * (odds.against * odds.keep)) : chain;
    } else if constexpr (kMode == kThreshold || kMode == kTernary) {
      out[i] = g * w;
    } else if constexpr (kMode == kEdit) {
      out[i] = kPenalty ? g * threshold + penalty * edit_penalty_slope(logit) : g * threshold;
    } else {
      out[i] = 0.0f;
    }
  }
}

template <int kMode>
static inline void logit_slopes(const ChainRule& rule, const float* g, const float* w, const float* l,
                                const uint32_t* words, float* out, int n) {
  constexpr bool kReadsTau = kMode == kGumbelHard || kMode == kGumbelSoft;
  constexpr bool kHasPenalty = has_penalty(kMode);
  const bool unit_tau = rule.inverse_tau == 1.0f, penalty = rule.penalty != 0.0f;
  if (kReadsTau && unit_tau) {
    return kHasPenalty && penalty ? chain_run<kMode, kHasPenalty, kReadsTau>(rule, g, w, l, words, out, n)
                                  : chain_run<kMode, false, kReadsTau>(rule, g, w, l, words, out, n);
  }
  return kHasPenalty && penalty ? chain_run<kMode, kHasPenalty, false>(rule, g, w, l, words, out, n)
                                : chain_run<kMode, false, false>(rule, g, w, l, words, out, n);
}

// Gradient of weights: the masked weight's gradient times the mask.
template <int kMode>
DWM_NOINLINE static void weight_run(const ChainRule& rule, const float* __restrict grad, const float* __restrict l,
                                    const uint32_t* __restrict words, float* __restrict out, int n) {
  const float threshold = rule.threshold, inverse_tau = rule.inverse_tau;
  for (int i = 0; i < n; ++i) {
    const float g = grad[i], logit = l[i];
    if constexpr (kMode == kScaledSoft) {
      out[i] = g * soft_value<false>(logit * threshold, signed_uniform(words[i]), inverse_tau);
    } else if constexpr (kMode == kGumbelHard) {
      out[i] = kept(odds_of(logit), signed_uniform(words[i])) ? g : 0.0f;
    } else if constexpr (kMode == kGumbelSoft) {
      out[i] = g * soft_value<false>(logit, signed_uniform(words[i]), inverse_tau);
    } else if constexpr (kMode == kKeep) {
      out[i] = logit >= 0.0f ? g : 0.0f;
    } else if constexpr (kMode == kThreshold) {
      out[i] = logit > threshold ? g : 0.0f;
    } else if constexpr (kMode == kTernary) {
      out[i] = g * ((logit > threshold ? 1.0f : 0.0f) - (logit < 0.0f ? 1.0f : 0.0f));
    } else {
      out[i] = g;
    }
  }
}

template <int kMode>
static void backward_range(const BackwardRule& rule, const BackwardTensor& t, int64_t begin, int64_t end) {
  constexpr Wanted kWanted{.words = draws_noise(kMode)};
  const TileSource source{.layer = t.layer, .noise = rule.noise};
  const ChainRule chain{t.threshold, rule.inverse_tau, rule.penalty};
  alignas(64) float grad[kTile], weight[kTile], result[kTile], logit[kTile];
  walk<kWanted>(t.shape, source, begin, end, [&](int64_t at, int64_t n, const uint32_t* words, uint8_t*) {
    const float* g = load_run(rule.grad, t.grad, at, n, grad);
    const float* l = load_run(rule.logits, t.logits, at, n, logit);
    const int count = static_cast<int>(n);
    if (t.dlogits) {
      const float* w = load_run(rule.weight, t.weight, at, n, weight);
      logit_slopes<kMode>(chain, g, w, l, words, t.dlogits + at, count);
    }
    if (t.dweight) {
      float* out = result_run(rule.weight, t.dweight, at, result);
      weight_run<kMode>(chain, g, l, words, out, count);
      store_run(rule.weight, result, t.dweight, at, n);
    }
  });
}

static void sample_backward(const BackwardRule& rule, const BackwardTensor& t, int64_t begin, int64_t end) {
  switch (rule.mode) {
    case kScaledSoft: return backward_range<kScaledSoft>(rule, t, begin, end);
    case kGumbelHard: return backward_range<kGumbelHard>(rule, t, begin, end);
    case kGumbelSoft: return backward_range<kGumbelSoft>(rule, t, begin, end);
    case kKeep: return backward_range<kKeep>(rule, t, begin, end);
    case kThreshold: return backward_range<kThreshold>(rule, t, begin, end);
    case kTernary: return backward_range<kTernary>(rule, t, begin, end);
    default: return backward_range<kEdit>(rule, t, begin, end);
  }
}

}  // namespace dwm::DWM_ISA
