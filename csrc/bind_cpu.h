// What the CPU operations share: checks of what Python hands over, and the cutting of work into chunks that torch's own
// thread pool takes. Private namespace dwm_fast_cpu; the public operations are dwm_fast.ops.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "bind.h"

namespace dwm {

using Numbers = std::vector<double>;

// The widest copy that the processor can run. DWM_FAST_ISA=baseline insists on the portable one, avx2 and avx512 on no
// wider one.
inline const Kernels& best_kernels() {
#if defined(DWM_WITH_AVX2)
  const char* set = std::getenv("DWM_FAST_ISA");
  const std::string_view asked = set ? set : "";
  const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  if (asked == "baseline" || !narrow) return kKernelsBaseline;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq");
  if (asked == "avx2" || !wide) return kKernelsAvx2;
  return asked != "avx512" && __builtin_cpu_supports("avx512bf16") ? kKernelsAvx512Bf16 : kKernelsAvx512;
#else
  return kKernelsBaseline;
#endif
}

// Chosen once.
inline const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

// Pieces of all tensors of a network, taken by threads in turn: a slow core takes fewer. A piece is one to four chunks:
// memory is read faster in long pieces, as long as there are eight for every thread.
struct Piece {
  int64_t tensor, begin, end;
};
constexpr int64_t kMostChunks = 4;  // of a piece

template <typename List>
std::vector<Piece> pieces_of(const List& tensors) {
  int64_t total = 0;
  for (const auto& t : tensors) total += t.shape.numel;
  const int64_t shares = kChunk * 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t chunks = std::clamp<int64_t>(total / shares, 1, kMostChunks);
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Shape& shape = tensors[i].shape;
    const int64_t step = chunks * chunk_elements(shape);
    for (int64_t begin = 0; begin < shape.numel; begin += step) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(begin + step, shape.numel)});
    }
  }
  return pieces;
}

// body(index) for every index in [0, count), on at most `most` threads.
template <typename Body>
void parallel(int64_t count, int64_t most, const Body& body) {
  if (count <= 0) return;
  const int64_t threads = std::min({count, most, static_cast<int64_t>(torch::stable::get_num_threads())});
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  };
  if (threads <= 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, work);
}

template <typename List, typename Body>
void for_pieces(const List& tensors, const Body& body) {
  const std::vector<Piece> pieces = pieces_of(tensors);
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel(count, count, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    body(i, tensors[static_cast<size_t>(piece.tensor)], piece.begin, piece.end);
  });
}

// A list of fp32 tensors of the weights' shapes and memory order.
inline void check_state(const Tensors& list, const Tensors& weights, const char* name) {
  check_count(list, weights.size(), name);
  for (size_t i = 0; i < list.size(); ++i) {
    check_float(list[i], name);
    check_like(list[i], shape_of(weights[i]), name);
  }
}

// The one dtype of logits: fp32, bf16 or fixed point.
inline Type logits_type(const Tensors& logits) {
  Type type = Type::f32;
  for (size_t i = 0; i < logits.size(); ++i) {
    const ScalarType scalar = logits[i].scalar_type();
    const Type own = scalar == ScalarType::Float      ? Type::f32
                     : scalar == ScalarType::BFloat16 ? Type::bf16
                                                      : Type::i16;
    STD_TORCH_CHECK(own != Type::i16 || scalar == ScalarType::Short, "dwm_fast: unknown dtype of logits");
    STD_TORCH_CHECK(i == 0 || own == type, "dwm_fast: logits must have one dtype");
    type = own;
  }
  return type;
}

inline void check_logits(const Tensors& logits, const Tensors& weights) {
  check_count(logits, weights.size(), "logits");
  for (size_t i = 0; i < logits.size(); ++i) check_like(logits[i], shape_of(weights[i]), "logits");
}

inline Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::f32;
  if (type == ScalarType::BFloat16) return Type::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "dwm_fast: expected float32, bfloat16 or float16");
  return Type::f16;
}

inline Type common_type(const Tensors& list, const char* name) {
  if (list.empty()) return Type::f32;
  const Type type = type_of(list[0]);
  for (const Tensor& t : list) {
    STD_TORCH_CHECK(type_of(t) == type, "dwm_fast: ", name, " must have one dtype");
  }
  return type;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline Noise noise_of(const Tensor& rng_state, int64_t step_offset) {
  STD_TORCH_CHECK(rng_state.scalar_type() == ScalarType::Long && rng_state.numel() == 2 && rng_state.is_contiguous(),
                  "dwm_fast: rng_state must be a contiguous int64 tensor of seed and step");
  const int64_t* state = static_cast<const int64_t*>(rng_state.data_ptr());
  const uint64_t step = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(step_offset);
  return {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(step)};
}

inline float scalar_of(const Tensor& t, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(t.numel() == 1, "dwm_fast: ", name, " must have one element");
  return *floats(t);
}

// tau, and behind it the scale of the logits where the mode has one.
inline const float* tau_of(const Tensor& tau, int64_t mode) {
  STD_TORCH_CHECK(mode >= kScaledSoft && mode <= kEdit, "dwm_fast: unknown mode");
  check_float(tau, "tau");
  STD_TORCH_CHECK(tau.is_contiguous() && tau.numel() == (mode == kScaledSoft ? 2 : 1),
                  "dwm_fast: tau must have one element, two of a scaled mask");
  return floats(tau);
}

// A layer's number for its rule: the threshold, or the scale of the logits.
inline float number_of(const Numbers& thresholds, size_t layer, const Tensor& tau, int64_t mode) {
  return mode == kScaledSoft ? tau_of(tau, mode)[1] : static_cast<float>(thresholds[layer]);
}

inline int64_t total_of(const Tensors& list) {
  int64_t total = 0;
  for (const Tensor& t : list) total += t.numel();
  return total;
}

inline BackwardRule backward_rule(const Tensors& grads, const Tensors& weights, const Tensor& rng_state,
                                const Tensor& tau, int64_t mode, int64_t step_offset) {
  return {static_cast<int>(mode),
          common_type(grads, "grads"),
          common_type(weights, "weights"),
          noise_of(rng_state, step_offset),
          1.0f / tau_of(tau, mode)[0],
          0.0f};
}

inline void check_gradients(const Tensors& grads, const Tensors& weights) {
  check_count(grads, weights.size(), "grads");
  for (size_t i = 0; i < grads.size(); ++i) check_like(grads[i], shape_of(weights[i]), "grads");
}

}  // namespace dwm
