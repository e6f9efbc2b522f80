// The CPU operations on the LibTorch stable ABI: checks what Python hands over, cuts the work into chunks, and lets
// torch's own thread pool take them. Private namespace dwm_fast_cpu; the public operations are dwm_fast.ops.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"

namespace {

using namespace dwm;
using Numbers = std::vector<double>;

const Kernels& kernels() {
#if defined(DWM_WITH_AVX2)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  return avx2 ? kKernelsAvx2 : kKernelsBaseline;
#else
  return kKernelsBaseline;
#endif
}

// Chunks of all tensors of a network, taken by threads in turn: a slow core takes fewer.
struct Piece {
  int64_t tensor, begin, end;
};

template <typename List>
std::vector<Piece> pieces_of(const List& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Shape& shape = tensors[i].shape;
    const int64_t step = chunk_elements(shape);
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
void check_state(const Tensors& list, const Tensors& weights, const char* name) {
  check_count(list, weights.size(), name);
  for (size_t i = 0; i < list.size(); ++i) {
    check_float(list[i], name);
    check_like(list[i], shape_of(weights[i]), name);
  }
}

Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::f32;
  if (type == ScalarType::BFloat16) return Type::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "dwm_fast: expected float32, bfloat16 or float16");
  return Type::f16;
}

Type common_type(const Tensors& list, const char* name) {
  if (list.empty()) return Type::f32;
  const Type type = type_of(list[0]);
  for (const Tensor& t : list) {
    STD_TORCH_CHECK(type_of(t) == type, "dwm_fast: ", name, " must have one dtype");
  }
  return type;
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Noise noise_of(const Tensor& rng_state, int64_t step_offset) {
  STD_TORCH_CHECK(rng_state.scalar_type() == ScalarType::Long && rng_state.numel() == 2 && rng_state.is_contiguous(),
                  "dwm_fast: rng_state must be a contiguous int64 tensor of seed and step");
  const int64_t* state = static_cast<const int64_t*>(rng_state.data_ptr());
  const uint64_t step = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(step_offset);
  return {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(step)};
}

float scalar_of(const Tensor& t, const char* name) {
  check_float(t, name);
  STD_TORCH_CHECK(t.numel() == 1, "dwm_fast: ", name, " must have one element");
  return *floats(t);
}

int64_t total_of(const Tensors& list) {
  int64_t total = 0;
  for (const Tensor& t : list) total += t.numel();
  return total;
}

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
  check_state(logits, weights, "logits");
  STD_TORCH_CHECK(layers.size() == count && thresholds.size() == count && mode >= 0 && mode <= kEdit,
                  "dwm_fast: sample got wrong layers, thresholds or mode");
  const bool pack = bits.numel() > 0;
  const Integers offsets = pack ? offsets_of(bits, numels_of(weights)) : Integers(count, 0);
  const SampleRule rule{static_cast<int>(mode), common_type(weights, "weights"), common_type(masked, "masked"),
                             noise_of(rng_state, step_offset), 1.0f / scalar_of(tau, "tau")};
  std::vector<SampleTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(masked[i], shape, "masked");
    tensors.push_back({shape, floats(logits[i]), weights[i].data_ptr(), masked[i].data_ptr(),
                       pack ? bytes(bits) + offsets[i] : nullptr, static_cast<uint32_t>(layers[i]),
                       static_cast<float>(thresholds[i])});
  }
  const std::vector<Piece> pieces = pieces_of(tensors);
  // One sum a chunk, added in order: the same penalty on any number of threads.
  std::vector<double> sums(pieces.size());
  const int64_t chunks = static_cast<int64_t>(pieces.size());
  parallel(chunks, chunks, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    sums[static_cast<size_t>(i)] =
        kernels().sample(rule, tensors[static_cast<size_t>(piece.tensor)], piece.begin, piece.end);
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  check_float(penalty, "penalty");
  *floats(penalty) = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, total_of(weights))));
}

BackwardRule backward_rule(const Tensors& grads, const Tensors& weights, const Tensor& rng_state,
                                const Tensor& tau, int64_t mode, int64_t step_offset) {
  STD_TORCH_CHECK(mode >= 0 && mode <= kEdit, "dwm_fast: unknown mode");
  return {static_cast<int>(mode),
          common_type(grads, "grads"),
          common_type(weights, "weights"),
          noise_of(rng_state, step_offset),
          1.0f / scalar_of(tau, "tau"),
          0.0f};
}

void sample_backward(Tensors dlogits, Tensors dweights, Tensors grads, Tensor grad_penalty, Tensors logits,
                     Tensors weights, Tensor rng_state, Tensor tau, Integers layers, Numbers thresholds, int64_t mode,
                     int64_t step_offset) {
  const size_t count = weights.size();
  check_count(grads, count, "grads");
  check_state(logits, weights, "logits");
  if (!dlogits.empty()) check_state(dlogits, weights, "dlogits");
  if (!dweights.empty()) check_count(dweights, count, "dweights");
  STD_TORCH_CHECK(layers.size() == count && thresholds.size() == count,
                  "dwm_fast: sample_backward got wrong layers or thresholds");
  BackwardRule rule = backward_rule(grads, weights, rng_state, tau, mode, step_offset);
  rule.penalty = scalar_of(grad_penalty, "grad_penalty") / static_cast<float>(std::max<int64_t>(1, total_of(weights)));
  if (!dweights.empty()) {
    STD_TORCH_CHECK(common_type(dweights, "dweights") == rule.weight, "dwm_fast: dweights have another dtype");
  }
  std::vector<BackwardTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(grads[i], shape, "grads");
    if (!dweights.empty()) check_like(dweights[i], shape, "dweights");
    tensors.push_back({shape, grads[i].data_ptr(), floats(logits[i]), weights[i].data_ptr(),
                       dlogits.empty() ? nullptr : floats(dlogits[i]),
                       dweights.empty() ? nullptr : dweights[i].data_ptr(), static_cast<uint32_t>(layers[i]),
                       static_cast<float>(thresholds[i])});
  }
  for_pieces(tensors, [&](int64_t, const BackwardTensor& t, int64_t begin, int64_t end) {
    kernels().sample_backward(rule, t, begin, end);
  });
}

void pack(Tensors masks, Tensor bits) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  std::vector<PackTensor> tensors;
  std::vector<Element> elements;
  for (size_t i = 0; i < masks.size(); ++i) {
    tensors.push_back({shape_of(masks[i]), masks[i].data_ptr(), bytes(bits) + offsets[i]});
    elements.push_back(element_of(masks[i]));
  }
  for_pieces(tensors, [&](int64_t, const PackTensor& t, int64_t begin, int64_t end) {
    kernels().pack(elements[static_cast<size_t>(&t - tensors.data())], t, begin, end);
  });
}

struct FlatMask {
  Shape shape;
  UnpackTensor mask;
};

void unpack(Tensor bits, Tensors masks) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  std::vector<FlatMask> tensors;
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(masks[i].scalar_type() == ScalarType::Bool && masks[i].is_contiguous(),
                    "dwm_fast: masks must be contiguous bool tensors");
    tensors.push_back({shape_of(masks[i]), {masks[i].numel(), bytes(bits) + offsets[i], bytes(masks[i])}});
  }
  for_pieces(tensors, [&](int64_t, const FlatMask& t, int64_t begin, int64_t end) {
    kernels().unpack(t.mask, begin, end);
  });
}

void apply(Tensor bits, Tensors weights, Tensors masked) {
  const Integers offsets = offsets_of(bits, numels_of(weights));
  check_count(masked, weights.size(), "masked");
  std::vector<ApplyTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(masked[i], shape, "masked");
    STD_TORCH_CHECK(masked[i].scalar_type() == weights[i].scalar_type(), "dwm_fast: masked has another dtype");
    tensors.push_back({shape, bytes(bits) + offsets[i], weights[i].data_ptr(), masked[i].data_ptr(),
                       static_cast<int>(weights[i].element_size())});
  }
  for_pieces(tensors, [&](int64_t, const ApplyTensor& t, int64_t begin, int64_t end) {
    kernels().apply(t, begin, end);
  });
}

// Bytes of one piece of a set operation, and bytes that make a second thread worth waking: below, it costs more than
// the work, and on a busy machine a hundred times more.
constexpr int64_t kByteChunk = 1 << 16;
constexpr int64_t kBytesPerThread = 1 << 21;

struct BytePiece {
  int64_t tensor, begin, nbytes;
};

std::vector<BytePiece> byte_pieces(const Integers& offsets, int64_t nbytes) {
  std::vector<BytePiece> pieces;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t end = i + 1 < offsets.size() ? offsets[i + 1] : nbytes;
    for (int64_t begin = offsets[i]; begin < end; begin += kByteChunk) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(kByteChunk, end - begin)});
    }
  }
  return pieces;
}

void count(Tensor bits, Integers numels, Tensor out) {
  const Integers offsets = offsets_of(bits, numels);
  const std::vector<BytePiece> pieces = byte_pieces(offsets, bits.numel());
  int64_t* ones = counts_of(out, numels.size());
  std::fill(ones, ones + numels.size(), 0);
  std::vector<int64_t> parts(pieces.size());
  parallel(static_cast<int64_t>(pieces.size()), bits.numel() / kBytesPerThread, [&](int64_t i) {
    const BytePiece& piece = pieces[static_cast<size_t>(i)];
    parts[static_cast<size_t>(i)] = kernels().count(bytes(bits) + piece.begin, piece.nbytes);
  });
  for (size_t i = 0; i < pieces.size(); ++i) ones[pieces[i].tensor] += parts[i];
}

void overlap(Tensor a, Tensor b, Integers numels, Tensor out) {
  const Integers offsets = offsets_of(a, numels);
  offsets_of(b, numels);
  const std::vector<BytePiece> pieces = byte_pieces(offsets, a.numel());
  int64_t* sizes = counts_of(out, 2 * numels.size());
  std::fill(sizes, sizes + 2 * numels.size(), 0);
  std::vector<int64_t> both(pieces.size()), either(pieces.size());
  parallel(static_cast<int64_t>(pieces.size()), a.numel() / kBytesPerThread, [&](int64_t i) {
    const size_t j = static_cast<size_t>(i);
    kernels().overlap(bytes(a) + pieces[j].begin, bytes(b) + pieces[j].begin, pieces[j].nbytes, &both[j], &either[j]);
  });
  for (size_t i = 0; i < pieces.size(); ++i) {
    sizes[2 * pieces[i].tensor] += both[i];
    sizes[2 * pieces[i].tensor + 1] += either[i];
  }
}

void combine(Tensor a, Tensor b, int64_t op, Tensor out) {
  for (const Tensor* t : {&a, &b, &out}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Byte && t->is_contiguous() && t->numel() == a.numel(),
                    "dwm_fast: combine takes contiguous uint8 buffers of equal length");
  }
  STD_TORCH_CHECK(op >= kAnd && op <= kAndNot, "dwm_fast: unknown set operation");
  const std::vector<BytePiece> pieces = byte_pieces({0}, a.numel());
  parallel(static_cast<int64_t>(pieces.size()), a.numel() / kBytesPerThread, [&](int64_t i) {
    const BytePiece& piece = pieces[static_cast<size_t>(i)];
    kernels().combine(static_cast<int>(op), bytes(a) + piece.begin, bytes(b) + piece.begin, bytes(out) + piece.begin,
                      piece.nbytes);
  });
}

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

void check_gradients(const Tensors& grads, const Tensors& weights) {
  check_count(grads, weights.size(), "grads");
  for (size_t i = 0; i < grads.size(); ++i) check_like(grads[i], shape_of(weights[i]), "grads");
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
                       static_cast<float>(thresholds[i]),
                       adam_rule(schedule.steps[i], schedule.lr, beta1, beta2, eps, weight_decay, decoupled, false)});
  }
  for_pieces(tensors, [&](int64_t, const MaskAdamTensor& t, int64_t begin, int64_t end) {
    kernels().mask_adam(chain, t, begin, end);
  });
}

// bits: (domains, nbytes), rows may lie apart. bias: (n,), or (domains, n). parts: (domain, begin, end) rows of x, flat.
void linear_packed(Tensor x, Tensor weight, Tensor bits, std::optional<Tensor> bias, Integers parts, Tensor out) {
  for (const Tensor* t : {&x, &weight, &out}) {
    check_float(*t, "linear_packed's operand");
    STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous(), "dwm_fast: linear_packed takes contiguous matrices");
  }
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(x.size(1) == k && out.size(0) == m && out.size(1) == n,
                  "dwm_fast: linear_packed got matrices that do not fit each other");
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 2 && bits.size(1) == packed_nbytes(n * k) &&
                      (bits.size(1) == 0 || bits.stride(1) == 1),
                  "dwm_fast: bits must be uint8 of one packed row per domain");
  const int64_t domains = bits.size(0);
  const bool own_bias = bias && bias->dim() == 2;
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == (own_bias ? domains * n : n) && bias->is_contiguous(),
                    "dwm_fast: bias has another length");
  }
  std::vector<LinearPart> jobs;
  STD_TORCH_CHECK(parts.size() % 3 == 0, "dwm_fast: parts come as domain, begin, end");
  for (size_t i = 0; i < parts.size(); i += 3) {
    const int64_t domain = parts[i], begin = parts[i + 1], end = parts[i + 2];
    STD_TORCH_CHECK(domain >= 0 && domain < domains && begin >= 0 && begin <= end && end <= m,
                    "dwm_fast: a part lies outside of the matrices");
    const float* shift = bias ? floats(*bias) + (own_bias ? domain * n : 0) : nullptr;
    jobs.push_back({bytes(bits) + domain * bits.stride(0), shift, begin, end});
  }
  const LinearPacked job{floats(x), floats(weight), floats(out), jobs.data(), static_cast<int64_t>(jobs.size()), n, k};
  constexpr int64_t kRows = 16;  // of the weight, handed to one thread at a time
  const int64_t count = (n + kRows - 1) / kRows;
  parallel(count, count, [&](int64_t i) {
    kernels().linear_packed(job, i * kRows, std::min(n, (i + 1) * kRows));
  });
}

// Weights (out, in, ...) in contiguous or channels_last order, with one number a kernel.
std::vector<FilterTensor> filters_of(const Tensors& reals, const Tensors& weights, const Tensors& grads,
                                     const Tensors& out) {
  check_count(reals, weights.size(), "reals");
  check_count(out, weights.size(), "out");
  std::vector<FilterTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const Shape shape = shape_of(weight);
    STD_TORCH_CHECK(weight.dim() >= 2, "dwm_fast: a weight needs two dimensions");
    check_float(weight, "weights");
    check_float(reals[i], "reals");
    check_float(out[i], "out");
    const int64_t outer = weight.size(0), inner = weight.size(1), kernels = outer * inner;
    STD_TORCH_CHECK(reals[i].is_contiguous() && reals[i].numel() == kernels, "dwm_fast: reals have another shape");
    if (!grads.empty()) {
      check_float(grads[i], "grads");
      check_like(grads[i], shape, "grads");
      STD_TORCH_CHECK(out[i].is_contiguous() && out[i].numel() == kernels, "dwm_fast: out has another shape");
    } else {
      check_like(out[i], shape, "out");
    }
    tensors.push_back({outer, inner, kernels ? shape.numel / kernels : 0, shape.spatial > 1, floats(reals[i]),
                       floats(weight), grads.empty() ? nullptr : floats(grads[i]), floats(out[i])});
  }
  return tensors;
}

// body(index, tensor, begin, end): rows of every tensor that has elements, about a chunk of elements at a time.
template <typename Body>
void for_rows(const std::vector<FilterTensor>& tensors, const Body& body) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const FilterTensor& t = tensors[i];
    const int64_t width = t.inner * t.taps;
    if (width == 0) continue;
    const int64_t step = std::max<int64_t>(1, kChunk / width);
    for (int64_t begin = 0; begin < t.outer; begin += step) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(begin + step, t.outer)});
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel(count, count, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    body(static_cast<size_t>(piece.tensor), tensors[static_cast<size_t>(piece.tensor)], piece.begin, piece.end);
  });
}

void kernel_soft(Tensors masked, Tensors reals, Tensors weights, double threshold) {
  const std::vector<FilterTensor> tensors = filters_of(reals, weights, {}, masked);
  const float border = static_cast<float>(threshold);
  std::vector<FilterRange> ranges(tensors.size());
  const int64_t count = static_cast<int64_t>(tensors.size());
  parallel(count, count, [&](int64_t i) {
    const FilterTensor& t = tensors[static_cast<size_t>(i)];
    if (t.outer * t.inner > 0) ranges[static_cast<size_t>(i)] = kernels().filter_range(border, t);
  });
  for_rows(tensors, [&](size_t i, const FilterTensor& t, int64_t begin, int64_t end) {
    kernels().kernel_soft(border, ranges[i], t, begin, end);
  });
}

void kernel_soft_backward(Tensors dreals, Tensors grads, Tensors reals, Tensors weights, double threshold) {
  check_count(grads, weights.size(), "grads");
  const float border = static_cast<float>(threshold);
  for_rows(filters_of(reals, weights, grads, dreals), [&](size_t, const FilterTensor& t, int64_t begin, int64_t end) {
    kernels().kernel_soft_backward(border, t, begin, end);
  });
}

void soft_masked_sgd(Tensors weights, Tensors grads, Tensors gammas, Tensor lr) {
  check_gradients(grads, weights);
  check_count(gammas, weights.size(), "gammas");
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Double && lr.numel() == 1, "dwm_fast: lr must be one float64");
  const float rate = static_cast<float>(*static_cast<const double*>(lr.data_ptr()));
  const UpdateTypes types{common_type(weights, "weights"), common_type(grads, "grads")};
  std::vector<SoftTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool whole = gammas[i].dim() == 0;
    check_float(gammas[i], "gammas");
    if (!whole) check_like(gammas[i], shape_of(weights[i]), "gammas");
    tensors.push_back({Shape{weights[i].numel()}, weights[i].data_ptr(), grads[i].data_ptr(), floats(gammas[i]), whole});
  }
  for_pieces(tensors, [&](int64_t, const SoftTensor& t, int64_t begin, int64_t end) {
    kernels().soft_masked_sgd(types, rate, t, begin, end);
  });
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(dwm_fast_cpu, m) {
  m.def("random_words(Tensor(a!) out, int first, int layer, Tensor rng_state, int step_offset) -> ()");
  m.def(
      "sample(Tensor(a!)[] masked, Tensor(b!) bits, Tensor(c!) penalty, Tensor[] logits, Tensor[] weights, "
      "Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mode, int step_offset) -> ()");
  m.def(
      "sample_backward(Tensor(a!)[] dlogits, Tensor(b!)[] dweights, Tensor[] grads, Tensor grad_penalty, "
      "Tensor[] logits, Tensor[] weights, Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mode, "
      "int step_offset) -> ()");
  m.def("pack(Tensor[] masks, Tensor(a!) bits) -> ()");
  m.def("unpack(Tensor bits, Tensor(a!)[] masks) -> ()");
  m.def("apply(Tensor bits, Tensor[] weights, Tensor(a!)[] masked) -> ()");
  m.def("count(Tensor bits, int[] numels, Tensor(a!) out) -> ()");
  m.def("overlap(Tensor a, Tensor b, int[] numels, Tensor(a!) out) -> ()");
  m.def("combine(Tensor a, Tensor b, int op, Tensor(a!) out) -> ()");
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
  m.def("linear_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, int[] parts, Tensor(a!) out) -> ()");
  m.def("kernel_soft(Tensor(a!)[] masked, Tensor[] reals, Tensor[] weights, float threshold) -> ()");
  m.def(
      "kernel_soft_backward(Tensor(a!)[] dreals, Tensor[] grads, Tensor[] reals, Tensor[] weights, float threshold) "
      "-> ()");
  m.def("soft_masked_sgd(Tensor(a!)[] weights, Tensor[] grads, Tensor[] gammas, Tensor lr) -> ()");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("random_words", TORCH_BOX(&random_words));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_backward", TORCH_BOX(&sample_backward));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("count", TORCH_BOX(&count));
  m.impl("overlap", TORCH_BOX(&overlap));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("frozen_adamw", TORCH_BOX(&frozen_adamw));
  m.impl("frozen_sgd", TORCH_BOX(&frozen_sgd));
  m.impl("mask_adam", TORCH_BOX(&mask_adam));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("kernel_soft", TORCH_BOX(&kernel_soft));
  m.impl("kernel_soft_backward", TORCH_BOX(&kernel_soft_backward));
  m.impl("soft_masked_sgd", TORCH_BOX(&soft_masked_sgd));
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
