// exp, log and 16-bit conversions without branches or calls, so that the compiler turns loops over them into vectors.
// Multiplications and additions are written out and compiled without contraction: results do not depend on whether
// the processor has a fused multiply-add.
#pragma once

#include <bit>

#include "core.h"

namespace dwm::DWM_ISA {

static DWM_INLINE float as_float(uint32_t x) { return std::bit_cast<float>(x); }
static DWM_INLINE uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

// e^x for |x| <= 87, clamped beyond. Minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, relative error
// 3e-9 before rounding.
static DWM_INLINE float exp_(float x) {
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 0.0013814599f;
  p = p * r + 0.008368717f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  return p * as_float((as_bits(shifted) + 127u) << 23);
}

// ln x for normal positive x. Minimax polynomial of (ln(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2), sqrt(2)],
// relative error 3e-8 before rounding.
static DWM_INLINE float log_(float x) {
  const uint32_t bits = as_bits(x) - 0x3F3504F3u;  // mantissa in [sqrt(1/2), sqrt(2))
  const float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = as_float((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 0.087004304f;
  p = p * f - 0.14267486f;
  p = p * f + 0.14914769f;
  p = p * f - 0.16577585f;
  p = p * f + 0.19963063f;
  p = p * f - 0.25001338f;
  p = p * f + 0.3333391f;
  const float square = f * f;
  return (p * f * square - 0.5f * square) + f + n * 0.693147181f;
}

static DWM_INLINE float magnitude_of(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }

// u of a random word as dwm_fast/ops/philox.py's signed_uniform: u itself, and -(1 - u) in the upper tail.
static DWM_INLINE float signed_uniform(uint32_t word) {
  const float ordinary = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f + 0x1p-25f;
  const float tail = (static_cast<float>(static_cast<int32_t>(word)) + 0.5f) * 0x1p-32f;
  return magnitude_of(tail) < 0x1p-16f ? tail : ordinary;
}

static DWM_INLINE float from_bf16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

static DWM_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
}

static DWM_INLINE float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  // Normal: the exponent's bias moves from 15 to 127. Subnormal: integer times 2^-24. Infinite, NaN: exponent all ones.
  const float subnormal = static_cast<float>(static_cast<int32_t>(h & 0x03FFu)) * 0x1p-24f;
  const uint32_t normal = magnitude + (magnitude >= 0x0F800000u ? 0x70000000u : 0x38000000u);
  const uint32_t value = magnitude < 0x00800000u ? as_bits(subnormal) : normal;
  return as_float(value | sign);
}

static DWM_INLINE uint16_t to_f16(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded to nearest even.
  const uint32_t subnormal = as_bits(as_float(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x477FF000u ? 0x7C00u : value;  // from 65520 on: infinite
  value = magnitude > 0x7F800000u ? 0x7E00u : value;
  return static_cast<uint16_t>(value | sign);
}

// A logit in units of 2^-11; -32768 stands for NaN.
static DWM_INLINE float from_fixed(int16_t code) {
  const float value = static_cast<float>(code) * 0x1p-11f;
  return code == -32768 ? as_float(0x7FC00000u) : value;
}

// A run of n <= kTile values as fp32: the memory itself when it is fp32, else converted into `staging`.
static inline const float* load_run(Type type, const void* base, int64_t offset, int64_t n, float* staging) {
  if (type == Type::f32) return static_cast<const float*>(base) + offset;
  const uint16_t* source = static_cast<const uint16_t*>(base) + offset;
  if (type == Type::bf16) {
    for (int64_t i = 0; i < n; ++i) staging[i] = from_bf16(source[i]);
  } else if (type == Type::i16) {
    for (int64_t i = 0; i < n; ++i) staging[i] = from_fixed(static_cast<int16_t>(source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) staging[i] = from_f16(source[i]);
  }
  return staging;
}

// Where a run of fp32 results goes: the memory itself when it is fp32, else `staging`; store_run finishes it.
static inline float* result_run(Type type, void* base, int64_t offset, float* staging) {
  return type == Type::f32 ? static_cast<float*>(base) + offset : staging;
}

DWM_NOINLINE static void store_run(Type type, const float* staging, void* base, int64_t offset, int64_t n) {
  if (type == Type::f32) return;
  uint16_t* target = static_cast<uint16_t*>(base) + offset;
  if (type == Type::bf16) {
    for (int64_t i = 0; i < n; ++i) target[i] = to_bf16(staging[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = to_f16(staging[i]);
  }
}

}  // namespace dwm::DWM_ISA
