// coded_adam: decode logits and moments, Adam in fp32, encode. Formats, order of operations and rounding, held to the
// last bit: dwm_fast/ops/coding.py and coded_adam.py.
#pragma once

#include "update.h"

namespace dwm::DWM_ISA {

// u of rounding from the half of a word that begins at bit `shift`.
static DWM_INLINE float half_uniform(uint32_t word, int shift) {
  return static_cast<float>(static_cast<int32_t>((word >> shift) & 0xFFFFu)) * 0x1p-16f + 0x1p-17f;
}

static DWM_INLINE uint16_t round_bf16(float x, uint32_t noise) {
  const uint32_t cut = (as_bits(x) + noise) >> 16;
  return static_cast<uint16_t>(x == x ? cut : 0x7FC0u);
}

DWM_NOINLINE static void encode_bf16_run(const float* __restrict x, const uint32_t* __restrict words, int shift,
                                         uint16_t* __restrict codes, int n) {
  for (int i = 0; i < n; ++i) codes[i] = round_bf16(x[i], (words[i] >> shift) & 0xFFFFu);
}

DWM_NOINLINE static void encode_fixed_run(const float* __restrict x, const uint32_t* __restrict words,
                                          int16_t* __restrict codes, int n) {
  for (int i = 0; i < n; ++i) {
    const float size = magnitude_of(x[i] * 0x1p11f);
    const float cut = size < 32767.0f ? size : 32767.0f;  // NaN too: its code is chosen below
    const float scaled = as_float(as_bits(cut) | (as_bits(x[i]) & 0x80000000u));
    const float whole = static_cast<float>(static_cast<int32_t>(scaled));
    const float low = whole - static_cast<float>(whole > scaled);
    const int32_t up = half_uniform(words[i], 0) < scaled - low;
    const int32_t number = -static_cast<int32_t>(x[i] == x[i]);  // all ones but for NaN: no branch, or no vectors
    codes[i] = static_cast<int16_t>(((static_cast<int32_t>(low) + up) & number) | (-32768 & ~number));
  }
}

// sqrt|x|, of a second moment once more, and infinity for what is not finite.
template <bool kSecond>
static DWM_INLINE float root_of(float x) {
  float root = sqrt_(magnitude_of(x));
  root = kSecond ? sqrt_(root) : root;
  return root < __builtin_inff() ? root : __builtin_inff();
}

template <bool kSecond>
static DWM_INLINE int32_t code_of(float x, float root, float scale, bool usable, uint32_t word) {
  constexpr float kLevels = kSecond ? 255.0f : 127.0f;
  const float z = usable ? root / scale : 0.0f;
  const float low = static_cast<float>(static_cast<int32_t>(z));
  float rise = (z - low) * (z + low), gap = 2.0f * low + 1.0f;
  if constexpr (kSecond) {
    rise = rise * (z * z + low * low);
    gap = gap * (2.0f * low * low + gap);
  }
  const float u = half_uniform(word, kSecond ? 16 : 0);
  float code = u * gap < rise ? low + 1.0f : low;
  code = code > kLevels ? kLevels : code;
  if constexpr (kSecond) return static_cast<int32_t>(z > 0.0f && code < 1.0f ? 1.0f : code);
  return static_cast<int32_t>(x < 0.0f ? -code : code);
}

template <bool kSecond, typename Code>
DWM_NOINLINE static void encode_blocks_run(const float* __restrict x, const uint32_t* __restrict words,
                                           Code* __restrict codes, float* __restrict scales, int n) {
  constexpr float kLevels = kSecond ? 255.0f : 127.0f;
  alignas(64) float roots[kCodeBlock];
  for (int first = 0; first < n; first += kCodeBlock) {
    const int count = n - first < kCodeBlock ? n - first : kCodeBlock;
    float top = 0.0f;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < count; ++i) {
      roots[i] = root_of<kSecond>(x[first + i]);
      top = top > roots[i] ? top : roots[i];
    }
    const float scale = top < __builtin_inff() ? top / kLevels : as_float(0x7FC00000u);
    scales[first / kCodeBlock] = scale;
    const bool usable = scale > 0.0f;
    for (int i = 0; i < count; ++i) {
      codes[first + i] = static_cast<Code>(code_of<kSecond>(x[first + i], roots[i], scale, usable, words[first + i]));
    }
  }
}

template <bool kSecond, typename Code>
DWM_NOINLINE static void decode_blocks_run(const Code* __restrict codes, const float* __restrict scales,
                                           float* __restrict x, int n) {
  for (int first = 0; first < n; first += kCodeBlock) {
    const int count = n - first < kCodeBlock ? n - first : kCodeBlock;
    const float scale = scales[first / kCodeBlock];
    for (int i = first; i < first + count; ++i) {
      const float root = static_cast<float>(codes[i]) * scale;
      const float square = root * root;
      x[i] = kSecond ? square * square : root * magnitude_of(root);
    }
  }
}

DWM_NOINLINE static void coded_adam_run(const CodedRule& rule, float* __restrict l, const float* __restrict grad,
                                        float* __restrict m, float* __restrict v, int n) {
  const CodedRule local = rule;
  const float rest = 1.0f - local.rate;
  for (int i = 0; i < n; ++i) {
    const float g = grad[i] + pull(local.decay, l[i]);
    const float near = m[i] + local.rate * (g - m[i]), far = g - (g - m[i]) * rest;
    const float first = local.near ? near : far;
    const float second = v[i] * local.beta2 + local.rate2 * g * g;
    l[i] = l[i] * local.shrink + local.step_size * first / (sqrt_(second) / local.root + local.eps);
    m[i] = first;
    v[i] = second;
  }
}

// As load_run, into `out` whatever the type.
static inline void load_copy(Type type, const void* base, int64_t at, int n, float* out) {
  const float* values = load_run(type, base, at, n, out);
  if (values != out) std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
}

struct Moments {
  alignas(64) float first[kTile];
  alignas(64) float second[kTile];
};

static inline void load_moments(Type type, const CodedTensor& t, int64_t at, int n, Moments& out) {
  if (type == Type::i8) {
    const int64_t block = at / kCodeBlock;
    decode_blocks_run<false>(static_cast<const int8_t*>(t.exp_avg) + at, t.exp_avg_scale + block, out.first, n);
    decode_blocks_run<true>(static_cast<const uint8_t*>(t.exp_avg_sq) + at, t.exp_avg_sq_scale + block, out.second, n);
    return;
  }
  load_copy(type, t.exp_avg, at, n, out.first);
  load_copy(type, t.exp_avg_sq, at, n, out.second);
}

static inline void store_moments(Type type, const CodedTensor& t, int64_t at, int n, const Moments& in,
                                 const uint32_t* words) {
  if (type == Type::i8) {
    const int64_t block = at / kCodeBlock;
    encode_blocks_run<false>(in.first, words, static_cast<int8_t*>(t.exp_avg) + at, t.exp_avg_scale + block, n);
    encode_blocks_run<true>(in.second, words, static_cast<uint8_t*>(t.exp_avg_sq) + at, t.exp_avg_sq_scale + block, n);
  } else if (type == Type::bf16) {
    encode_bf16_run(in.first, words, 0, static_cast<uint16_t*>(t.exp_avg) + at, n);
    encode_bf16_run(in.second, words, 16, static_cast<uint16_t*>(t.exp_avg_sq) + at, n);
  } else {
    std::memcpy(static_cast<float*>(t.exp_avg) + at, in.first, static_cast<size_t>(n) * sizeof(float));
    std::memcpy(static_cast<float*>(t.exp_avg_sq) + at, in.second, static_cast<size_t>(n) * sizeof(float));
  }
}

static inline void store_logits(Type type, void* logits, int64_t at, int n, const float* values,
                                const uint32_t* words) {
  if (type == Type::bf16) return encode_bf16_run(values, words, 0, static_cast<uint16_t*>(logits) + at, n);
  if (type == Type::i16) return encode_fixed_run(values, words, static_cast<int16_t*>(logits) + at, n);
  std::memcpy(static_cast<float*>(logits) + at, values, static_cast<size_t>(n) * sizeof(float));
}

static void coded_adam(CodedTypes types, const CodedTensor& t, int64_t begin, int64_t end) {
  const Keys keys = round_keys(t.seed);
  alignas(64) float logit[kTile];
  alignas(64) uint32_t words[kWordBuffer];
  Moments moments;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    const int count = static_cast<int>(n);
    const auto draw = [&](uint64_t stream) {
      philox_blocks(stream | static_cast<uint64_t>(at) / 4, (n + 3) / 4, t.layer, t.rule.step, keys, words);
    };
    load_copy(types.logits, t.logits, at, count, logit);
    load_moments(types.moments, t, at, count, moments);
    coded_adam_run(t.rule, logit, t.grad + at, moments.first, moments.second, count);
    if (types.moments != Type::f32) draw(kMomentRounding);
    store_moments(types.moments, t, at, count, moments, words);
    if (types.logits != Type::f32) draw(kLogitRounding);
    store_logits(types.logits, t.logits, at, count, logit, words);
  }
}

}  // namespace dwm::DWM_ISA
