// pack, unpack and apply: masks and weights of any element size against packed bits.
#pragma once

#include "tiles.h"

namespace dwm::DWM_ISA {

// n elements -> n bytes of 0 or 1. `magnitude` drops the sign of a floating zero.
template <typename T>
DWM_NOINLINE static void nonzero_run(const T* __restrict mask, T magnitude, uint8_t* __restrict keep, int n) {
  for (int i = 0; i < n; ++i) keep[i] = (mask[i] & magnitude) != 0 ? 1 : 0;
}

template <typename T>
static void pack_range(bool floating, const PackTensor& t, int64_t begin, int64_t end) {
  const T all = static_cast<T>(~T{0});
  const T magnitude = floating ? static_cast<T>(all >> 1) : all;
  walk<Wanted{.bits_out = true}>(
      t.shape, TileSource{.bits_out = t.bits}, begin, end, [&](int64_t at, int64_t n, const uint32_t*, uint8_t* keep) {
        nonzero_run(static_cast<const T*>(t.mask) + at, magnitude, keep, static_cast<int>(n));
      });
}

static void pack(Element element, const PackTensor& t, int64_t begin, int64_t end) {
  if (element.size == 1 && !element.floating && t.shape.spatial == 1) {
    pack_bytes(static_cast<const uint8_t*>(t.mask) + begin, end - begin, t.bits + begin / 8);
    return;
  }
  switch (element.size) {
    case 1: return pack_range<uint8_t>(element.floating, t, begin, end);
    case 2: return pack_range<uint16_t>(element.floating, t, begin, end);
    case 4: return pack_range<uint32_t>(element.floating, t, begin, end);
    default: return pack_range<uint64_t>(element.floating, t, begin, end);
  }
}

static void unpack(const UnpackTensor& t, int64_t begin, int64_t end) {
  unpack_bytes(t.bits + begin / 8, end - begin, t.mask + begin);
}

template <typename T>
DWM_NOINLINE static void apply_run(const T* __restrict weight, const uint8_t* __restrict keep, T* __restrict out, int n) {
  for (int i = 0; i < n; ++i) out[i] = keep[i] ? weight[i] : T{0};
}

template <typename T>
static void apply_range(const ApplyTensor& t, int64_t begin, int64_t end) {
  walk<Wanted{.bits_in = true}>(
      t.shape, TileSource{.bits_in = t.bits}, begin, end, [&](int64_t at, int64_t n, const uint32_t*, uint8_t* keep) {
        apply_run(static_cast<const T*>(t.weight) + at, keep, static_cast<T*>(t.out) + at, static_cast<int>(n));
      });
}

static void apply(const ApplyTensor& t, int64_t begin, int64_t end) {
  switch (t.size) {
    case 1: return apply_range<uint8_t>(t, begin, end);
    case 2: return apply_range<uint16_t>(t, begin, end);
    case 4: return apply_range<uint32_t>(t, begin, end);
    default: return apply_range<uint64_t>(t, begin, end);
  }
}

}  // namespace dwm::DWM_ISA
