// The core, compiled once for every instruction set: DWM_ISA names the set, DWM_TABLE the table it exports.
#if defined(__AVX512BF16__)
#pragma GCC diagnostic ignored "-Wunused-function"  // most of what the headers hold
#include "kept.h"
#else
#include "coded_adam.h"
#include "kept.h"
#include "linear.h"
#include "masks.h"
#include "sample.h"
#include "soft.h"
#include "union.h"
#include "update.h"
#endif

#define DWM_TEXT_(x) #x
#define DWM_TEXT(x) DWM_TEXT_(x)

#if defined(__AVX512BF16__)

namespace dwm {

// One instruction more: all that does not use it is the AVX-512 copy's.
static Kernels with_pairs() {
  Kernels kernels = kKernelsAvx512;
  kernels.name = DWM_TEXT(DWM_ISA);
  kernels.linear_kept_bf16 = DWM_ISA::linear_kept_bf16;
  return kernels;
}

const Kernels DWM_TABLE = with_pairs();

}  // namespace dwm

#else

namespace dwm::DWM_ISA {

static void random_words(uint64_t first, int64_t count, uint32_t layer, Noise noise, uint32_t* out) {
  const Keys keys = round_keys(noise.seed);
  uint32_t buffer[kWordBuffer];
  for (int64_t i = 0; i < count; i += kTile) {
    const int64_t n = count - i < kTile ? count - i : kTile;
    const uint32_t* words = tile_words(first + static_cast<uint64_t>(i), n, layer, noise.step, keys, buffer);
    std::memcpy(out + i, words, static_cast<size_t>(n) * sizeof(uint32_t));
  }
}

}  // namespace dwm::DWM_ISA

namespace dwm {

const Kernels DWM_TABLE = {
    .name = DWM_TEXT(DWM_ISA),
    .random_words = DWM_ISA::random_words,
    .sample = DWM_ISA::sample,
    .sample_backward = DWM_ISA::sample_backward,
    .pack = DWM_ISA::pack,
    .unpack = DWM_ISA::unpack,
    .apply = DWM_ISA::apply,
    .count = DWM_ISA::count_bits,
    .overlap = DWM_ISA::overlap_bits,
    .frozen_adamw = DWM_ISA::frozen_adamw,
    .frozen_sgd = DWM_ISA::frozen_sgd,
    .mask_adam = DWM_ISA::mask_adam,
    .coded_adam = DWM_ISA::coded_adam,
    .linear_packed = DWM_ISA::linear_packed,
    .turns = DWM_ISA::kTurns,
    .linear_kept = DWM_ISA::linear_kept,
    .linear_kept_bf16 = DWM_ISA::linear_kept_bf16,
    .linear_union = DWM_ISA::linear_union,
    .filter_range = DWM_ISA::filter_range,
    .kernel_soft = DWM_ISA::kernel_soft,
    .kernel_soft_backward = DWM_ISA::kernel_soft_backward,
    .soft_masked_sgd = DWM_ISA::soft_masked_sgd,
};

}  // namespace dwm

#endif
