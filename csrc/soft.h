// Soft masks: KSM's, one number a kernel of a filter (dwm_fast/ops/kernel_soft.py), and SPG's step (ops/soft_mask.py).
#pragma once

#include "sample.h"

namespace dwm::DWM_ISA {

// Kernels of one row that are worked on at a time.
constexpr int64_t kFilters = 512;

// a of one kernel: 0 where it is kept.
static inline float dropped(float real, float threshold) { return real >= threshold ? 0.0f : real; }

static FilterRange filter_range(float threshold, const FilterTensor& t) {
  const int64_t count = t.outer * t.inner;
  FilterRange range{dropped(t.real[0], threshold), dropped(t.real[0], threshold)};
  for (int64_t i = 1; i < count; ++i) {
    const float a = dropped(t.real[i], threshold);
    range.low = a < range.low ? a : range.low;
    range.high = a > range.high ? a : range.high;
  }
  return range;
}

// M of n kernels: 1 where kept, else a / 2 scaled by the tensor's range, 0 where that is 0.
DWM_NOINLINE static void filter_values(float threshold, const FilterRange& range, const float* __restrict real,
                                       float* __restrict value, int n) {
  const float spread = range.high - range.low;
  const float divisor = spread > 0.0f ? spread : 1.0f;
  const float half = spread > 0.0f ? 0.5f : 0.0f;
  for (int i = 0; i < n; ++i) {
    const float scaled = real[i] == 0.0f ? 0.0f : half * ((real[i] - range.low) / divisor);
    value[i] = real[i] >= threshold ? 1.0f : scaled;
  }
}

// kTaps: taps of a kernel, known when compiling; 0: `taps`.
template <int64_t kTaps>
DWM_NOINLINE static void spread_values(const float* __restrict weight, const float* __restrict value,
                                       float* __restrict out, int64_t n, int64_t taps) {
  const int64_t count = kTaps ? kTaps : taps;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t s = 0; s < count; ++s) out[i * count + s] = weight[i * count + s] * value[i];
  }
}

template <int64_t kTaps>
DWM_NOINLINE static void gather_products(const float* __restrict weight, const float* __restrict grad,
                                         float* __restrict total, int64_t n, int64_t taps) {
  const int64_t count = kTaps ? kTaps : taps;
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < count; ++s) sum += weight[i * count + s] * grad[i * count + s];
    total[i] = sum;
  }
}

DWM_NOINLINE static void multiply_run(const float* __restrict weight, const float* __restrict value,
                                      float* __restrict out, int n) {
  for (int i = 0; i < n; ++i) out[i] = weight[i] * value[i];
}

DWM_NOINLINE static void add_products(const float* __restrict weight, const float* __restrict grad,
                                      float* __restrict total, int n) {
  for (int i = 0; i < n; ++i) total[i] += weight[i] * grad[i];
}

// body(kernel, n, first, step): n kernels from number `kernel` on, whose first tap lies at memory offset `first`; taps
// are `step` apart where memory is [outer][taps][inner], and kernels are whole where it is in logical order (step 1).
template <typename Body>
static inline void for_filters(const FilterTensor& t, int64_t begin, int64_t end, Body&& body) {
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t i = 0; i < t.inner; i += kFilters) {
      const int64_t n = t.inner - i < kFilters ? t.inner - i : kFilters;
      const int64_t kernel = o * t.inner + i;
      body(kernel, n, t.last ? o * t.taps * t.inner + i : kernel * t.taps, t.last ? t.inner : 1);
    }
  }
}

static void kernel_soft(float threshold, const FilterRange& range, const FilterTensor& t, int64_t begin, int64_t end) {
  alignas(64) float value[kFilters];
  for_filters(t, begin, end, [&](int64_t kernel, int64_t n, int64_t first, int64_t step) {
    filter_values(threshold, range, t.real + kernel, value, static_cast<int>(n));
    if (!t.last) {
      switch (t.taps) {
        case 1: return multiply_run(t.weight + first, value, t.out + first, static_cast<int>(n));
        case 9: return spread_values<9>(t.weight + first, value, t.out + first, n, 9);
        default: return spread_values<0>(t.weight + first, value, t.out + first, n, t.taps);
      }
    }
    for (int64_t s = 0; s < t.taps; ++s) {
      multiply_run(t.weight + first + s * step, value, t.out + first + s * step, static_cast<int>(n));
    }
  });
}

DWM_NOINLINE static void filter_slopes(float threshold, const float* __restrict real, const float* __restrict total,
                                       float* __restrict out, int n) {
  for (int i = 0; i < n; ++i) {
    const float s = 1.0f / (1.0f + exp_((real[i] - threshold) * -12.0f));
    out[i] = total[i] * (12.0f * (s * (1.0f - s)));
  }
}

static void kernel_soft_backward(float threshold, const FilterTensor& t, int64_t begin, int64_t end) {
  alignas(64) float total[kFilters];
  for_filters(t, begin, end, [&](int64_t kernel, int64_t n, int64_t first, int64_t step) {
    const int count = static_cast<int>(n);
    if (!t.last) {
      switch (t.taps) {
        case 1: gather_products<1>(t.weight + first, t.grad + first, total, n, 1); break;
        case 9: gather_products<9>(t.weight + first, t.grad + first, total, n, 9); break;
        default: gather_products<0>(t.weight + first, t.grad + first, total, n, t.taps);
      }
    } else {
      for (int i = 0; i < count; ++i) total[i] = 0.0f;
      for (int64_t s = 0; s < t.taps; ++s) {
        add_products(t.weight + first + s * step, t.grad + first + s * step, total, count);
      }
    }
    filter_slopes(threshold, t.real + kernel, total, t.out + kernel, count);
  });
}

// w - lr ((1 - gamma) g), lane by lane in memory order.
DWM_NOINLINE static void soft_run(float lr, const float* __restrict grad, const float* __restrict gamma,
                                  float* __restrict weight, int n) {
  for (int i = 0; i < n; ++i) weight[i] -= lr * ((1.0f - gamma[i]) * grad[i]);
}

DWM_NOINLINE static void soft_run_whole(float lr, const float* __restrict grad, float free, float* __restrict weight,
                                        int n) {
  for (int i = 0; i < n; ++i) weight[i] -= lr * (free * grad[i]);
}

static void soft_masked_sgd(UpdateTypes types, float lr, const SoftTensor& t, int64_t begin, int64_t end) {
  alignas(64) float weight[kTile], grad[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    const float* g = load_run(types.grad, t.grad, at, n, grad);
    const bool direct = types.weight == Type::f32;
    float* w = direct ? static_cast<float*>(t.weight) + at : weight;
    if (!direct) load_run(types.weight, t.weight, at, n, weight);
    if (t.whole) {
      soft_run_whole(lr, g, 1.0f - *t.gamma, w, static_cast<int>(n));
    } else {
      soft_run(lr, g, t.gamma + at, w, static_cast<int>(n));
    }
    if (!direct) store_run(types.weight, weight, t.weight, at, n);
  }
}

}  // namespace dwm::DWM_ISA
