// The core without torch, under AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is a heap block of exactly
// the promised size, so that a byte read or written beyond it stops the run. Prints "ok" or the broken promise.
#include "core.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

// The functions of one draw, beside the tables that hide them: a table makes its own words and takes nobody's.
#define DWM_ISA drawn
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "sample.h"
#pragma GCC diagnostic pop

namespace {

using namespace dwm;

void require(bool holds, const char* promise, const char* table) {
  if (holds) return;
  std::printf("broken on %s: %s\n", table, promise);
  std::exit(1);
}

template <typename T>
struct Block {
  explicit Block(int64_t n) : data(new T[static_cast<size_t>(n)]()), size(n) {}
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
  std::unique_ptr<T[]> data;
  int64_t size;
};

uint32_t naive_word(uint64_t element, uint32_t layer, Noise noise) {
  uint32_t c[4] = {static_cast<uint32_t>(element / 4), static_cast<uint32_t>((element / 4) >> 32), layer, noise.step};
  uint32_t k0 = static_cast<uint32_t>(noise.seed), k1 = static_cast<uint32_t>(noise.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[element % 4];
}

float next_float() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) * 8.0f - 4.0f; }

// The ranges that callers may ask for: whole chunks.
template <typename Body>
void for_chunks(const Shape& shape, const Body& body) {
  const int64_t step = chunk_elements(shape);
  for (int64_t begin = 0; begin < shape.numel; begin += step) {
    body(begin, begin + step < shape.numel ? begin + step : shape.numel);
  }
}

int64_t memory_index(const Shape& shape, int64_t e) {
  if (shape.spatial == 1) return e;
  const int64_t s = e % shape.spatial, column = e / shape.spatial;
  return (column / shape.inner * shape.spatial + s) * shape.inner + column % shape.inner;
}

bool bit(const Block<uint8_t>& bits, int64_t e) { return bits[e / 8] >> (e % 8) & 1; }

void check_words(const Kernels& k) {
  const Noise noise{0x123456789ABCDEFull, 77};
  for (const uint64_t first : {uint64_t{0}, uint64_t{3}, (uint64_t{1} << 34) - 5}) {
    for (const int64_t count : {1, 5, 64, 2303, 5000}) {
      Block<uint32_t> words(count);
      k.random_words(first, count, 9, noise, words.get());
      for (int64_t i = 0; i < count; ++i) {
        require(words[i] == naive_word(first + static_cast<uint64_t>(i), 9, noise), "words follow Philox4x32-10", k.name);
      }
    }
  }
}

// Every word that decides an event rarer than 2^-16: those of both tails.
template <typename Body>
void for_tails(const Body& body) {
  for (uint32_t w = 0; w < 65536; ++w) {
    body(w);
    body(~w);
  }
}

void check_rare_events() {
  for (const double p : {1e-5, 1e-6, 1e-7, 1e-8, 1e-9}) {
    const float logit = static_cast<float>(std::log(p / (1.0 - p)));
    int64_t kept = 0, lost = 0;
    for_tails([&](uint32_t w) {
      kept += drawn::kept(drawn::odds_of(logit), drawn::signed_uniform(w));
      lost += !drawn::kept(drawn::odds_of(-logit), drawn::signed_uniform(w));
    });
    // A half for the last word; a logit in fp32 and its exponential are good to 2^-19 of at most 2^16 words.
    const double words = p * 4294967296.0, allowed = 0.5 + 8192.0 * p;
    require(std::fabs(static_cast<double>(kept) - words) <= allowed, "rare masks keep as often as they should", "draw");
    require(std::fabs(static_cast<double>(lost) - words) <= allowed, "rare masks drop as often as they should", "draw");
  }
  for_tails([&](uint32_t w) {
    for (const float logit : {-10.0f, -1.0f, 0.0f, 1.0f, 10.0f}) {
      const bool keeps = drawn::kept(drawn::odds_of(logit), drawn::signed_uniform(w));
      require(keeps == (w > 65535u), "tails decide nothing of an ordinary logit", "draw");
    }
  });
}

void check_bits(const Kernels& k, const Shape& shape) {
  const int64_t n = shape.numel;
  Block<uint8_t> mask(n), bits(packed_nbytes(n)), back(n);
  for (int64_t i = 0; i < n; ++i) mask[i] = std::rand() % 3 == 0 ? 0 : static_cast<uint8_t>(1 + std::rand() % 255);
  for_chunks(shape, [&](int64_t b, int64_t e) { k.pack({1, false}, {shape, mask.get(), bits.get()}, b, e); });
  int64_t ones = 0;
  for (int64_t e = 0; e < 8 * bits.size; ++e) {
    const bool expected = e < n && mask[memory_index(shape, e)] != 0;
    ones += expected;
    require(bit(bits, e) == expected, "pack sets the bit of every nonzero element and no other", k.name);
  }
  require(k.count(bits.get(), bits.size) == ones, "count is the number of ones", k.name);
  const Shape flat{n, 1, 1};
  for_chunks(flat, [&](int64_t b, int64_t e) { k.unpack({n, bits.get(), back.get()}, b, e); });
  for (int64_t e = 0; e < n; ++e) require(back[e] == bit(bits, e), "unpack writes 0 or 1", k.name);

  Block<double> wide(n), kept(n);
  for (int64_t i = 0; i < n; ++i) wide[i] = next_float();
  for_chunks(shape, [&](int64_t b, int64_t e) {
    k.apply({shape, bits.get(), wide.get(), kept.get(), 8}, b, e);
  });
  for (int64_t e = 0; e < n; ++e) {
    const int64_t m = memory_index(shape, e);
    require(kept[m] == (bit(bits, e) ? wide[m] : 0.0) && !std::signbit(kept[m]) == !(bit(bits, e) && wide[m] < 0),
            "apply keeps a weight or writes +0", k.name);
  }
  Block<uint8_t> other(bits.size);
  for (int64_t i = 0; i < other.size; ++i) other[i] = static_cast<uint8_t>(std::rand());
  int64_t both = 0, either = 0, expected_both = 0, expected_either = 0;
  k.overlap(bits.get(), other.get(), bits.size, &both, &either);
  for (int64_t e = 0; e < 8 * bits.size; ++e) {
    expected_both += bit(bits, e) && bit(other, e);
    expected_either += bit(bits, e) || bit(other, e);
  }
  require(both == expected_both && either == expected_either, "overlap counts both and either", k.name);
}

// All results of one table for one shape, rule and dtype: tables must agree bit for bit.
std::vector<uint8_t> results(const Kernels& k, const Shape& shape, int mode, Type type, float inverse_tau) {
  std::srand(5);
  const int64_t n = shape.numel;
  const int64_t width = type == Type::f32 ? 4 : 2;
  Block<float> logits(n), dlogits(n), exp_avg(n), exp_avg_sq(n);
  Block<uint8_t> weight(n * width), out(n * width), grad(n * width), dweight(n * width), bits(packed_nbytes(n));
  for (int64_t i = 0; i < n; ++i) {
    logits[i] = next_float();
    exp_avg[i] = next_float();
    exp_avg_sq[i] = std::fabs(next_float());
    for (const Block<uint8_t>* block : {&weight, &grad}) {
      const float value = next_float();
      uint32_t raw;
      std::memcpy(&raw, &value, 4);
      if (type != Type::f32) raw >>= 16;
      std::memcpy(block->get() + i * width, &raw, static_cast<size_t>(width));
    }
  }
  const Noise noise{42, 7};
  const SampleRule rule{mode, type, type, noise, inverse_tau};
  const SampleTensor sample{shape, logits.get(), weight.get(), out.get(), bits.get(), 3, 0.25f};
  const BackwardRule back_rule{mode, type, type, noise, inverse_tau, 1e-3f};
  const BackwardTensor back{shape, grad.get(), logits.get(), weight.get(), dlogits.get(), dweight.get(), 3, 0.25f};
  const AdamRule adam{0.1f, 0.999f, 0.001f, 0.01f, 1.5f, 1e-8f, 0.99f, 0.0f, 1.0f};
  double penalty = 0.0;
  for_chunks(shape, [&](int64_t b, int64_t e) { penalty += k.sample(rule, sample, b, e); });
  require(std::isfinite(penalty) && penalty >= 0.0, "the penalty is a finite sum of probabilities", k.name);
  for_chunks(shape, [&](int64_t b, int64_t e) { k.sample_backward(back_rule, back, b, e); });
  const MaskAdamTensor masks{shape, logits.get(), weight.get(), grad.get(), exp_avg.get(), exp_avg_sq.get(), 3, 0.25f, adam};
  for_chunks(shape, [&](int64_t b, int64_t e) { k.mask_adam(back_rule, masks, b, e); });
  const AdamWTensor adamw{shape, weight.get(), grad.get(), exp_avg.get(), exp_avg_sq.get(), bits.get(), nullptr, adam};
  for_chunks(shape, [&](int64_t b, int64_t e) { k.frozen_adamw({type, type}, adamw, b, e); });
  const SgdTensor sgd{shape, weight.get(), grad.get(), exp_avg.get(), bits.get(), nullptr,
                      {0.1f, 0.9f, 1.0f, 1.0f, 0.01f, 1.0f, true, false}};
  for_chunks(shape, [&](int64_t b, int64_t e) { k.frozen_sgd({type, type}, sgd, b, e); });

  std::vector<uint8_t> all;
  const auto add = [&](const void* data, int64_t nbytes) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    all.insert(all.end(), p, p + nbytes);
  };
  add(&penalty, sizeof penalty);
  for (const Block<uint8_t>* block : {&out, &bits, &dweight, &weight}) add(block->get(), block->size);
  for (const Block<float>* block : {&dlogits, &logits, &exp_avg, &exp_avg_sq}) add(block->get(), 4 * n);
  return all;
}

// Compact state after two steps of each optimiser is dense state without the kept lanes; weights are the same.
void check_compact(const Kernels& k, const Shape& shape, Type type) {
  std::srand(6);
  const int64_t n = shape.numel, width = type == Type::f32 ? 4 : 2;
  Block<uint8_t> bits(packed_nbytes(n));
  Block<int64_t> ranks(packed_nbytes(n) / 16), place(n);
  int64_t free = 0;
  for (int64_t e = 0; e < n; ++e) {
    if (e % 128 == 0) ranks[e / 128] = free;
    const bool keep = std::rand() % 3 == 0;
    bits[e / 8] = static_cast<uint8_t>(bits[e / 8] | keep << (e % 8));
    place[e] = keep ? -1 : free++;
  }
  Block<float> grad(n), m(n), v(n), compact_m(free), compact_v(free);
  Block<uint8_t> weight(n * width), compact_weight(n * width);
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = next_float();
    const float value = next_float();
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    if (type != Type::f32) raw >>= 16;
    for (const Block<uint8_t>* block : {&weight, &compact_weight}) {
      std::memcpy(block->get() + i * width, &raw, static_cast<size_t>(width));
    }
  }
  const AdamRule adam{0.1f, 0.999f, 0.001f, 0.01f, 1.5f, 1e-8f, 0.99f, 0.0f, 1.0f};
  const SgdRule rule{0.1f, 0.9f, 1.0f, 1.0f, 0.01f, 1.0f, true, false};
  const UpdateTypes types{type, Type::f32};
  for (int step = 0; step < 2; ++step) {
    for_chunks(shape, [&](int64_t b, int64_t e) {
      k.frozen_adamw(types, {shape, weight.get(), grad.get(), m.get(), v.get(), bits.get(), nullptr, adam}, b, e);
      k.frozen_adamw(types, {shape, compact_weight.get(), grad.get(), compact_m.get(), compact_v.get(), bits.get(),
                             ranks.get(), adam}, b, e);
      k.frozen_sgd(types, {shape, weight.get(), grad.get(), m.get(), bits.get(), nullptr, rule}, b, e);
      k.frozen_sgd(types, {shape, compact_weight.get(), grad.get(), compact_m.get(), bits.get(), ranks.get(), rule}, b, e);
    });
  }
  require(std::memcmp(weight.get(), compact_weight.get(), static_cast<size_t>(n * width)) == 0,
          "compact state moves weights as dense state does", k.name);
  for (int64_t e = 0; e < n; ++e) {
    const int64_t i = memory_index(shape, e), j = place[e];
    if (j < 0) continue;
    require(compact_m[j] == m[i] && compact_v[j] == v[i], "compact state is dense state's free lanes in order", k.name);
  }
}

// Rows of three domains, and x and W of small integers (products are exact) or of any numbers; returns the outputs.
std::vector<float> check_linear(const Kernels& k, int64_t n, int64_t width, bool integers) {
  std::srand(7);
  const int64_t rows[] = {5, 1, 66}, m = 72;
  Block<float> x(m * width), w(n * width), bias(n), out(m * n), alone(m * n);
  std::vector<Block<uint8_t>> bits;
  std::vector<LinearPart> parts;
  const auto number = [&] { return integers ? static_cast<float>(std::rand() % 7 - 3) : next_float(); };
  for (int64_t i = 0; i < x.size; ++i) x[i] = number();
  for (int64_t i = 0; i < w.size; ++i) w[i] = number();
  for (int64_t i = 0; i < n; ++i) bias[i] = static_cast<float>(i);
  int64_t begin = 0;
  for (const int64_t count : rows) {
    bits.emplace_back(packed_nbytes(n * width));
    for (int64_t e = 0; e < n * width; ++e) {
      bits.back()[e / 8] = static_cast<uint8_t>(bits.back()[e / 8] | (std::rand() % 2) << (e % 8));
    }
    parts.push_back({bits.back().get(), parts.empty() ? nullptr : bias.get(), begin, begin + count});
    begin += count;
  }
  k.linear_packed({x.get(), w.get(), out.get(), parts.data(), 3, n, width}, 0, n);
  for (size_t p = 0; p < 3; ++p) {
    for (int64_t i = parts[p].begin; i < parts[p].end; ++i) {
      const LinearPart one{parts[p].bits, parts[p].bias, i, i + 1};
      k.linear_packed({x.get(), w.get(), alone.get(), &one, 1, n, width}, 0, n);
      for (int64_t j = 0; j < n; ++j) {
        require(out[i * n + j] == alone[i * n + j], "a row's outputs do not depend on other rows", k.name);
        if (!integers) continue;
        float expected = p == 0 ? 0.0f : bias[j];
        for (int64_t c = 0; c < width; ++c) {
          expected += bit(bits[p], j * width + c) ? x[i * width + c] * w[j * width + c] : 0.0f;
        }
        require(out[i * n + j] == expected, "linear from bits is exact on small integers", k.name);
      }
    }
  }
  return {out.get(), out.get() + out.size};
}

// Kept weights give bit for bit what all weights and bits give; bits that do not fit the values compute nothing.
void check_kept(const Kernels& k, int64_t m, int64_t n, int64_t width, int keep, Type type) {
  std::srand(8);
  const int64_t pitch = (width + 15) / 16 * 16;
  Block<float> x(m * width), padded(m * pitch), w(n * width), bias(n), expected(m * n), out(m * n);
  Block<uint8_t> bits(packed_nbytes(n * width));
  Block<int64_t> starts(n + 1);
  std::vector<float> kept;
  for (int64_t i = 0; i < m * width; ++i) x[i] = padded[i / width * pitch + i % width] = next_float();
  for (int64_t i = 0; i < n; ++i) bias[i] = next_float();
  for (int64_t e = 0; e < n * width; ++e) {
    w[e] = static_cast<float>(std::rand() % 64 - 32) * 0.25f;  // the same in 16 bits
    const bool one = std::rand() % 10 < keep;
    bits[e / 8] = static_cast<uint8_t>(bits[e / 8] | (one ? 1 : 0) << (e % 8));
    if (one) kept.push_back(w[e]);
    starts[e / width + 1] = static_cast<int64_t>(kept.size());
  }
  const int64_t count = static_cast<int64_t>(kept.size()), bytes = type == Type::f32 ? 4 : 2;
  Block<uint8_t> values((count + 16) * bytes);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, &kept[static_cast<size_t>(i)], 4);
    uint16_t half = static_cast<uint16_t>(word >> 16);
    if (type == Type::f16) half = static_cast<uint16_t>((half & 0x8000u) | (word << 1 ? ((word & 0x7FFFFFFFu) - 0x38000000u) >> 13 : 0u));
    std::memcpy(values.get() + i * bytes, type == Type::f32 ? static_cast<void*>(&word) : &half, static_cast<size_t>(bytes));
  }
  const LinearPart part{bits.get(), bias.get(), 0, m};
  k.linear_packed({x.get(), w.get(), expected.get(), &part, 1, n, width}, 0, n);
  KeptLinear job{padded.get(), values.get(), starts.get(), bits.get(), bias.get(), out.get(), m, n, width, pitch, type};
  const int64_t middle = n / 2;
  require(k.linear_kept(job, 0, middle) && k.linear_kept(job, middle, n), "bits that fit are taken", k.name);
  require(std::memcmp(out.get(), expected.get(), static_cast<size_t>(m * n) * 4) == 0, "kept weights are enough", k.name);
  for (const int64_t turned_rows : {m, m / kTurned * kTurned}) {
    if (!k.turns || turned_rows == 0) continue;
    Block<float> turned((turned_rows + kTurned - 1) / kTurned * kTurned * width);
    for (int64_t i = 0; i < turned_rows * width; ++i) {
      const int64_t r = i / width, c = i % width;
      turned[(r / kTurned * width + c) * kTurned + r % kTurned] = x[i];
    }
    std::fill_n(out.get(), m * n, 7.0f);
    KeptLinear by_column = job;
    by_column.turned = turned.get(), by_column.turned_rows = turned_rows;
    require(k.linear_kept(by_column, 0, middle) && k.linear_kept(by_column, middle, n), "bits that fit are taken", k.name);
    require(std::memcmp(out.get(), expected.get(), static_cast<size_t>(m * n) * 4) == 0, "columns are enough", k.name);
  }
  bits[0] = static_cast<uint8_t>(bits[0] ^ 1);
  require(!k.linear_kept(job, 0, n), "bits that do not fit the values are refused", k.name);
  bits[0] = static_cast<uint8_t>(bits[0] ^ 1);
  std::memset(values.get() + starts[n - 1] * bytes, 0xFF, static_cast<size_t>((count - starts[n - 1]) * bytes));
  require(k.linear_kept(job, 0, n), "NaN is a weight like others", k.name);
  for (int64_t i = 0; i < m * n; ++i) {
    require(i % n == n - 1 || out[i] == expected[i], "a row's NaN stays in its row", k.name);
  }
}

// x and values in bf16: the order of pairs.h, where no denormal is met. `wild`: any bits but NaN, rows apart by size, so that
// denormals, overflows and infinities are met. Returns the outputs.
std::vector<float> check_pairs(const Kernels& k, int64_t m, int64_t n, int64_t width, int keep, bool wild) {
  std::srand(10);
  const int64_t pitch = (width + 31) / 32 * 32;
  Block<uint16_t> x(m * pitch);
  Block<uint8_t> bits(packed_nbytes(n * width));
  Block<int64_t> starts(n + 1);
  Block<float> bias(n), out(m * n);
  std::vector<uint16_t> kept;
  const auto number = [&](int64_t row) {
    constexpr int kLowest[] = {0, 56, 187, 120};
    const int exponent = wild ? kLowest[row % 4] + std::rand() % 16 : 120 + std::rand() % 8;
    const bool infinite = wild && row % 5 == 4 && std::rand() % 64 == 0;
    return static_cast<uint16_t>((std::rand() % 2) << 15 | (infinite ? 255 << 7 : exponent << 7 | std::rand() % 128));
  };
  for (int64_t i = 0; i < m * width; ++i) x[i / width * pitch + i % width] = number(i / width);
  for (int64_t i = 0; i < n; ++i) bias[i] = wild ? 0.0f : next_float();
  std::vector<float> w(static_cast<size_t>(n * width));
  const auto wide = [](uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); };
  for (int64_t e = 0; e < n * width; ++e) {
    const bool one = std::rand() % 10 < keep;
    bits[e / 8] = static_cast<uint8_t>(bits[e / 8] | (one ? 1 : 0) << (e % 8));
    if (one) kept.push_back(number(e / width)), w[static_cast<size_t>(e)] = wide(kept.back());
    starts[e / width + 1] = static_cast<int64_t>(kept.size());
  }
  const int64_t count = static_cast<int64_t>(kept.size());
  Block<uint16_t> values(count + 32);
  std::copy(kept.begin(), kept.end(), values.get());
  const KeptLinear job{x.get(), values.get(), starts.get(), bits.get(), bias.get(), out.get(), m, n, width, pitch,
                       Type::bf16};
  const int64_t middle = n / 2;
  require(k.linear_kept_bf16(job, 0, middle) && k.linear_kept_bf16(job, middle, n), "bits that fit are taken", k.name);
  for (int64_t i = 0; !wild && i < m * n; ++i) {
    float lanes[16] = {};
    for (int64_t step = 0; step < width; step += 32) {
      for (int64_t j = 0; j < 16; ++j) {
        for (const int64_t c : {step + 2 * j + 1, step + 2 * j}) {
          if (c >= width) continue;
          lanes[j] = std::fma(wide(x[i / n * pitch + c]), w[static_cast<size_t>(i % n * width + c)], lanes[j]);
        }
      }
    }
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    require(out[i] == lanes[0] + bias[i % n], "pairs are added odd, then even, in one rounding each", k.name);
  }
  bits[0] = static_cast<uint8_t>(bits[0] ^ 1);
  require(!k.linear_kept_bf16(job, 0, n), "bits that do not fit the values are refused", k.name);
  for (int64_t i = 0; i < m * n; ++i) out[i] = out[i] == out[i] ? out[i] : 0x1p-140f;  // whose NaN is not told
  return {out.get(), out.get() + out.size};
}

// The weights that one of three domains keeps give bit for bit what all weights give; what does not fit is refused.
void check_union(const Kernels& k, int64_t m, int64_t n, int64_t width, int keep) {
  std::srand(9);
  Block<float> x(3 * m * width), w(n * width), bias(n), expected(3 * m * n), out(3 * m * n);
  const int64_t stride = packed_nbytes(n * width);
  Block<uint8_t> bits(3 * stride);
  Block<int64_t> starts(n + 1);
  std::vector<float> kept;
  for (int64_t i = 0; i < x.size; ++i) x[i] = next_float();
  for (int64_t i = 0; i < n; ++i) bias[i] = next_float();
  for (int64_t e = 0; e < n * width; ++e) {
    w[e] = next_float();
    bool any = false;
    for (int64_t d = 0; d < 3; ++d) {
      const bool one = std::rand() % 10 < keep;
      bits[d * stride + e / 8] = static_cast<uint8_t>(bits[d * stride + e / 8] | (one ? 1 : 0) << (e % 8));
      any = any || one;
    }
    if (any) kept.push_back(w[e]);
    starts[e / width + 1] = static_cast<int64_t>(kept.size());
  }
  Block<float> values(static_cast<int64_t>(kept.size()) + 16);
  for (size_t i = 0; i < kept.size(); ++i) values[static_cast<int64_t>(i)] = kept[i];
  const LinearPart parts[] = {{bits.get(), bias.get(), 0, m},
                              {bits.get() + stride, nullptr, m, 2 * m},
                              {bits.get() + 2 * stride, bias.get(), 2 * m, 3 * m}};
  k.linear_packed({x.get(), w.get(), expected.get(), parts, 3, n, width}, 0, n);
  const KeptUnion job{x.get(), values.get(), starts.get(), bits.get(), 3, stride, out.get(), parts, 3, n, width};
  const int64_t middle = n / 2;
  require(k.linear_union(job, 0, middle) && k.linear_union(job, middle, n), "bits that fit are taken", k.name);
  require(std::memcmp(out.get(), expected.get(), static_cast<size_t>(3 * m * n) * 4) == 0, "a union is enough", k.name);
  const int64_t last = starts[n]--;
  require(!k.linear_union(job, 0, n) || last == starts[n - 1], "bits that do not fit the values are refused", k.name);
}

// Small integers: products and sums are exact, in whatever order they are formed.
void check_filters(const Kernels& k, int64_t outer, int64_t inner, int64_t taps, bool last) {
  const int64_t kernels = outer * inner, numel = kernels * taps;
  Block<float> real(kernels), w(numel), g(numel), out(numel), slopes(kernels);
  for (int64_t i = 0; i < kernels; ++i) real[i] = static_cast<float>(std::rand() % 9 - 4) * 0.125f;
  for (int64_t i = 0; i < numel; ++i) w[i] = static_cast<float>(std::rand() % 7 - 3);
  for (int64_t i = 0; i < numel; ++i) g[i] = static_cast<float>(std::rand() % 7 - 3);
  float low = 0.0f;
  for (int64_t i = 0; i < kernels; ++i) low = real[i] < low ? real[i] : low;
  FilterTensor t{outer, inner, taps, last, real.get(), w.get(), nullptr, out.get()};
  const FilterRange range = k.filter_range(0.0f, t);
  const int64_t half = outer / 2;
  k.kernel_soft(0.0f, range, t, 0, half);
  k.kernel_soft(0.0f, range, t, half, outer);
  t.grad = g.get();
  t.out = slopes.get();
  k.kernel_soft_backward(0.0f, t, 0, half);
  k.kernel_soft_backward(0.0f, t, half, outer);
  for (int64_t i = 0; i < kernels; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < taps; ++s) {
      const int64_t at = last ? (i / inner * taps + s) * inner + i % inner : i * taps + s;
      const float spread = range.high - range.low;
      const float dropped = spread > 0.0f ? 0.5f * ((real[i] - range.low) / spread) : 0.0f;
      require(out[at] == w[at] * (real[i] >= 0.0f ? 1.0f : dropped), "a kernel's taps share its value", k.name);
      sum += w[at] * g[at];
    }
    if (real[i] == 0.0f) require(slopes[i] == sum * 3.0f, "slope is 12 / 4 at the threshold", k.name);
    require((slopes[i] == 0.0f) == (sum == 0.0f), "the gradient is the sum over the taps", k.name);
  }
  require(kernels == 1 || range.low == low, "the range is the tensor's", k.name);
}

std::vector<float> soft_step(const Kernels& k, int64_t n, bool whole) {
  std::srand(7);
  Block<float> w(n), g(n), gamma(whole ? 1 : n);
  for (int64_t i = 0; i < n; ++i) w[i] = next_float(), g[i] = next_float();
  for (int64_t i = 0; i < gamma.size; ++i) gamma[i] = static_cast<float>(std::rand() % 2);
  const Block<float> before(n);
  std::memcpy(before.get(), w.get(), static_cast<size_t>(n) * sizeof(float));
  const SoftTensor t{Shape{n, 1, 1}, w.get(), g.get(), gamma.get(), whole};
  for_chunks(t.shape, [&](int64_t b, int64_t e) { k.soft_masked_sgd({Type::f32, Type::f32}, 0.5f, t, b, e); });
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = gamma[whole ? 0 : i] == 1.0f;
    require(w[i] == (kept ? before[i] : before[i] - 0.5f * g[i]), "importance 1 keeps, 0 is plain SGD", k.name);
  }
  return {w.get(), w.get() + n};
}

// Logits, moments and scales after three steps of coded_adam.
std::vector<uint8_t> coded_steps(const Kernels& k, int64_t n, CodedTypes types) {
  std::srand(9);
  const int64_t wide = types.logits == Type::f32 ? 4 : 2;
  const int64_t moment = types.moments == Type::f32 ? 4 : types.moments == Type::bf16 ? 2 : 1;
  const int64_t blocks = (n + kCodeBlock - 1) / kCodeBlock;
  Block<uint8_t> logits(n * wide), first(n * moment), second(n * moment);
  Block<float> grad(n), scale(blocks), scale_sq(blocks);
  CodedTensor t{{n, 1, 1}, logits.get(), grad.get(), first.get(), second.get(), scale.get(), scale_sq.get(), 3, 42,
                {0.1f, true, 0.999f, 0.001f, -0.01f, 0.5f, 1e-15f, 0.99f, 0.0f, 1}};
  for (; t.rule.step <= 3; ++t.rule.step) {
    for (int64_t i = 0; i < n; ++i) grad[i] = next_float();
    for_chunks(t.shape, [&](int64_t b, int64_t e) { k.coded_adam(types, t, b, e); });
  }
  std::vector<uint8_t> all;
  for (const Block<uint8_t>* block : {&logits, &first, &second}) {
    all.insert(all.end(), block->get(), block->get() + block->size);
  }
  require(std::count(all.begin(), all.end(), 0) < static_cast<int64_t>(all.size()), "coded_adam steps", k.name);
  return all;
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {{1, 1, 1},        {37, 1, 1},       {2304, 1, 1},     {40001, 1, 1},
                                     {27, 3, 9},       {5 * 7 * 9, 7, 9}, {64 * 3 * 49, 3, 49}, {130 * 33 * 9, 33, 9},
                                     {3 * 2 * 64, 2, 64}};
  std::vector<const Kernels*> tables = {&kKernelsBaseline};
#if defined(DWM_WITH_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kKernelsAvx2);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq")) {
    tables.push_back(&kKernelsAvx512);
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&kKernelsAvx512Bf16);
  }
#endif
  check_rare_events();
  for (const Kernels* k : tables) {
    check_words(*k);
    for (const Shape& shape : shapes) check_bits(*k, shape);
    for (const int64_t width : {1, 7, 33, 2050}) check_linear(*k, 3, width, true);
    for (const int64_t width : {1, 7, 33, 1100}) {
      for (const int64_t m : {1, 2, 3, 4, 7, 35}) {
        check_kept(*k, m, 19, width, 4, Type::f32);
        check_kept(*k, m, 13, width, 10, Type::bf16);
        check_kept(*k, m, 2, width, 0, Type::f16);
        check_kept(*k, m, 3, width, 7, Type::f16);
        check_pairs(*k, m, 19, width, 4, false);
        const auto wild = check_pairs(*tables.front(), m, 21, width, 6, true);
        require(wild == check_pairs(*k, m, 21, width, 6, true), "sets agree on denormals and infinities", k->name);
      }
    }
    for (const int64_t m : {1, 3, 6}) {
      for (const int64_t width : {5, 24, 4101}) check_union(*k, m, 9, width, 3);
    }
    check_union(*k, 23, 21, 33, 2);  // more slots than are worked on at a time
    check_pairs(*k, 1, 16, 24, 4, false);
    check_pairs(*k, 6, 3, 64, 10, false);     // values to the last of their padding
    check_kept(*k, 1, 16, 24, 4, Type::f32);  // bits that end with the last row's last byte
    for (const int64_t taps : {1, 4, 9, 49}) {
      for (const bool last : {false, true}) {
        check_filters(*k, 3, 33, taps, last);
        check_filters(*k, 1, 1, taps, last);
        check_filters(*k, 2, 1100, taps, last);
      }
    }
    for (const bool whole : {false, true}) {
      require(soft_step(*k, 40001, whole) == soft_step(*tables.front(), 40001, whole), "sets agree on SPG", k->name);
    }
  }
  for (const int64_t n : {1, 3, 18}) {
    for (const int64_t width : {5, 16, 1027, 4112}) {
      const auto first = check_linear(*tables.front(), n, width, false);
      require(first == check_linear(*tables.back(), n, width, false), "instruction sets multiply alike", "linear");
    }
  }
  for (const int64_t n : {1, 127, 129, 2305, 40001}) {
    for (const Type logits : {Type::f32, Type::bf16, Type::i16}) {
      for (const Type moments : {Type::f32, Type::bf16, Type::i8}) {
        require(coded_steps(*tables.front(), n, {logits, moments}) == coded_steps(*tables.back(), n, {logits, moments}),
                "instruction sets code alike", "coded_adam");
      }
    }
  }
  for (const Shape& shape : shapes) {
    for (const Kernels* k : tables) {
      for (const Type type : {Type::f32, Type::bf16}) check_compact(*k, shape, type);
    }
    for (int mode = kGumbelHard; mode <= kEdit; ++mode) {
      for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
        for (const float inverse_tau : {1.0f, 1.7f}) {
          const auto first = results(*tables.front(), shape, mode, type, inverse_tau);
          const auto last = results(*tables.back(), shape, mode, type, inverse_tau);
          require(first == last, "instruction sets agree bit for bit", tables.back()->name);
        }
      }
    }
  }
  std::printf("ok\n");
  return 0;
}
