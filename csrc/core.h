// What the kernels and their callers agree on: tensors as plain pointers, and the table of kernels of one instruction
// set. No torch here: the sanitizer test compiles the core on its own.
#pragma once

#include <cstddef>
#include <cstdint>

// A call of its own: inlining it into every rule would only make compiling slow.
#if defined(__GNUC__)
#define DWM_NOINLINE __attribute__((noinline))
// Part of a lane loop: a call left in one keeps it from vectors, and whether the compiler leaves it hangs on the file's
// size.
#define DWM_INLINE inline __attribute__((always_inline))
#else
#define DWM_NOINLINE
#define DWM_INLINE inline
#endif

namespace dwm {

// Rules by number, as in dwm_fast/ops/_modes.py.
enum Mode : int { kScaledSoft = -1, kGumbelHard = 0, kGumbelSoft = 1, kKeep = 2, kThreshold = 3, kTernary = 4, kEdit = 5 };

// i16: logits in units of 2^-11. i8: moments in blocks, int8 and uint8 (dwm_fast/ops/coding.py).
enum class Type : int { f32 = 0, bf16 = 1, f16 = 2, i16 = 3, i8 = 4 };

// Memory order of a dense tensor. Logical order is [outer][inner][spatial]. spatial == 1: memory is in logical order.
// spatial > 1: memory is [outer][spatial][inner] (channels_last); at most kMaxSpatial.
struct Shape {
  int64_t numel = 0;
  int64_t inner = 1;
  int64_t spatial = 1;
};

constexpr int64_t kMaxSpatial = 64;

// Elements that a kernel holds in its first-level cache at a time.
constexpr int64_t kTile = 2304;

// Elements handed to one thread at a time: a few microseconds of work, and 128 divides it.
constexpr int64_t kChunk = 32768;

// Elements of a moment in 8 bits that share a scale; kTile and kChunk are multiples of it.
constexpr int64_t kCodeBlock = 128;

constexpr int64_t packed_nbytes(int64_t numel) { return (numel + 127) / 128 * 16; }

struct Noise {
  uint64_t seed = 0;
  uint32_t step = 0;
};

// sample: logits, weight -> out, bits.
struct SampleTensor {
  Shape shape;
  const void* logits;
  const void* weight;
  void* out;
  uint8_t* bits;  // nullptr: not wanted
  uint32_t layer;
  float threshold;  // kScaledSoft: kappa, the scale of the logits; of the structs below too
};

struct SampleRule {
  int mode;
  Type weight;
  Type out;
  Noise noise;
  float inverse_tau;
  Type logits = Type::f32;  // or bf16, i16
};

// sample_backward: grad of the masked weight -> grad of logits and of the weight.
struct BackwardTensor {
  Shape shape;
  const void* grad;
  const void* logits;
  const void* weight;
  float* dlogits;  // nullptr: not wanted
  void* dweight;   // nullptr: not wanted
  uint32_t layer;
  float threshold;
};

struct BackwardRule {
  int mode;
  Type grad;
  Type weight;
  Noise noise;
  float inverse_tau;
  float penalty;  // gradient of the penalty over the number of elements of the network
  Type logits = Type::f32;  // or bf16, i16
};

// How pack reads "nonzero" from an element.
struct Element {
  int size;        // bytes: 1, 2, 4, 8
  bool floating;   // -0.0 counts as zero
};

struct PackTensor {
  Shape shape;
  const void* mask;
  uint8_t* bits;
};

struct UnpackTensor {
  int64_t numel;
  const uint8_t* bits;
  uint8_t* mask;
};

struct ApplyTensor {
  Shape shape;
  const uint8_t* bits;
  const void* weight;
  void* out;
  int size;  // bytes of an element
};

// Optimiser steps. Lanes whose bit is 1 keep weight and state as they are. Every tensor has its own step count, so its
// own rule. Where `ranks` is given, state is compact: one entry per free lane in logical order, ranks[b] of them before
// lane 128 b.
struct UpdateTypes {
  Type weight;
  Type grad;
};

struct AdamRule {
  float beta1_complement;    // 1 - beta1
  float beta2;
  float beta2_complement;    // 1 - beta2
  float step_size;           // lr / (1 - beta1^t)
  float inverse_correction;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float shrink;  // 1 - lr * weight_decay when decoupled, else 1
  float decay;   // weight_decay when it is part of the gradient, else 0
  float sign;    // -1: maximise
};

struct AdamWTensor {
  Shape shape;
  void* weight;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const uint8_t* bits;
  const int64_t* ranks;
  AdamRule rule;
};

struct SgdRule {
  float lr;
  float momentum;
  float dampening_complement;  // 1 - dampening
  float shrink;
  float decay;
  float sign;
  bool nesterov;
  bool first;  // the momentum buffer starts as the gradient
};

struct SgdTensor {
  Shape shape;
  void* weight;
  const void* grad;
  float* momentum;  // nullptr: momentum is 0
  const uint8_t* bits;
  const int64_t* ranks;
  SgdRule rule;
};

struct MaskAdamTensor {
  Shape shape;
  float* logits;
  const void* weight;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  uint32_t layer;
  float threshold;
  AdamRule rule;
};

// coded_adam: what is stored in which format, and the scalars of one tensor's step.
struct CodedTypes {
  Type logits;   // f32, bf16, i16
  Type moments;  // f32, bf16, i8
};

struct CodedRule {
  float rate;       // 1 - beta1
  bool near;        // 1 - beta1 < 1/2
  float beta2;
  float rate2;      // 1 - beta2
  float step_size;  // -lr / (1 - beta1^t)
  float root;       // sqrt(1 - beta2^t)
  float eps;
  float shrink;     // 1 - lr * weight_decay when decoupled, else 1
  float decay;      // weight_decay when it is part of the gradient, else 0
  uint32_t step;    // of rounding's noise
};

// All of it in logical order.
struct CodedTensor {
  Shape shape;
  void* logits;
  const float* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;  // of i8, one a block; else nullptr
  float* exp_avg_sq_scale;
  uint32_t layer;
  uint64_t seed;
  CodedRule rule;
};

// KSM: one number a kernel of `taps`. Memory of weight, grad and the masked weight is in logical order
// [outer][inner][taps], or with `last` [outer][taps][inner] (channels_last).
struct FilterTensor {
  int64_t outer, inner, taps;
  bool last;
  const float* real;  // [outer][inner]
  const float* weight;
  const float* grad;  // backward only
  float* out;         // the masked weight; backward: the gradient of real
};

// Minimum and maximum of a over a tensor.
struct FilterRange {
  float low, high;
};

// SPG's step. gamma holds one number a lane, or with `whole` one for the tensor.
struct SoftTensor {
  Shape shape;
  void* weight;
  const void* grad;
  const float* gamma;
  bool whole;
};

// Rows [begin, end) of x that belong to one domain.
struct LinearPart {
  const uint8_t* bits;  // n * k bits
  const float* bias;    // (n,) or nullptr
  int64_t begin, end;
};

struct LinearPacked {
  const float* x;       // (m, k)
  const float* weight;  // (n, k)
  float* out;           // (m, n)
  const LinearPart* parts;
  int64_t part_count;
  int64_t n, k;
};

constexpr int kTurned = 16;  // rows of x that lie side by side

struct KeptLinear {
  const void* x;          // (m, pitch), fp32 or bf16, zero from column k on
  const void* values;     // kept weights in logical order
  const int64_t* starts;  // (n + 1,): the first value of every row
  const uint8_t* bits;    // n * k bits
  const float* bias;      // (n,) or nullptr
  float* out;             // (m, n)
  int64_t m, n, k, pitch;
  Type type;  // of the values
  // Of x in fp32, or nullptr: its first `turned_rows` rows, all finite, in groups of kTurned: (group, k, kTurned).
  const float* turned = nullptr;
  int64_t turned_rows = 0;
};

struct KeptUnion {
  const float* x;           // (m, k)
  const float* values;      // weights that at least one domain keeps, in logical order
  const int64_t* starts;    // (n + 1,): the first value of every row
  const uint8_t* bits;      // n * k bits of every domain, `bits_stride` bytes apart
  int64_t domains, bits_stride;
  float* out;               // (m, n)
  const LinearPart* parts;  // their bits are among these
  int64_t part_count;
  int64_t n, k;
};

// Every function works on elements [begin, end) of one tensor in logical order; begin is a multiple of 128 and, for
// channels_last, of shape.spatial; end is too, or is numel.
struct Kernels {
  const char* name;
  void (*random_words)(uint64_t first, int64_t count, uint32_t layer, Noise noise, uint32_t* out);
  double (*sample)(const SampleRule& rule, const SampleTensor& t, int64_t begin, int64_t end);
  void (*sample_backward)(const BackwardRule& rule, const BackwardTensor& t, int64_t begin, int64_t end);
  void (*pack)(Element element, const PackTensor& t, int64_t begin, int64_t end);
  void (*unpack)(const UnpackTensor& t, int64_t begin, int64_t end);
  void (*apply)(const ApplyTensor& t, int64_t begin, int64_t end);
  int64_t (*count)(const uint8_t* a, int64_t nbytes);
  void (*overlap)(const uint8_t* a, const uint8_t* b, int64_t nbytes, int64_t* both, int64_t* either);
  void (*frozen_adamw)(UpdateTypes types, const AdamWTensor& t, int64_t begin, int64_t end);
  void (*frozen_sgd)(UpdateTypes types, const SgdTensor& t, int64_t begin, int64_t end);
  void (*mask_adam)(const BackwardRule& chain, const MaskAdamTensor& t, int64_t begin, int64_t end);
  void (*coded_adam)(CodedTypes types, const CodedTensor& t, int64_t begin, int64_t end);
  void (*linear_packed)(const LinearPacked& job, int64_t first_row, int64_t last_row);
  bool turns;  // whether linear_kept gains by `turned` where few weights are kept
  bool (*linear_kept)(const KeptLinear& job, int64_t first_row, int64_t last_row);       // x in fp32
  bool (*linear_kept_bf16)(const KeptLinear& job, int64_t first_row, int64_t last_row);  // x and values in bf16
  bool (*linear_union)(const KeptUnion& job, int64_t first_row, int64_t last_row);
  // The filter kernels work on rows [begin, end) of outer; soft_masked_sgd on lanes in memory order.
  FilterRange (*filter_range)(float threshold, const FilterTensor& t);
  void (*kernel_soft)(float threshold, const FilterRange& range, const FilterTensor& t, int64_t begin, int64_t end);
  void (*kernel_soft_backward)(float threshold, const FilterTensor& t, int64_t begin, int64_t end);
  void (*soft_masked_sgd)(UpdateTypes types, float lr, const SoftTensor& t, int64_t begin, int64_t end);
};

// Combinations of `combine`, by number.
enum Combination : int { kAnd = 0, kOr = 1, kXor = 2, kAndNot = 3 };

// Elements of one chunk of a tensor: 128 divides it, and shape.spatial does.
constexpr int64_t chunk_elements(const Shape& shape) {
  if (shape.spatial == 1) return kChunk;
  const int64_t columns = kChunk / shape.spatial / 128 * 128;
  return (columns > 0 ? columns : 128) * shape.spatial;
}

extern const Kernels kKernelsBaseline;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Bf16;

}  // namespace dwm
