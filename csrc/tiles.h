// Walks a range of one tensor tile by tile: makes random words, reads bits or writes bits in logical order, and hands
// out runs that are contiguous in memory, whatever the memory order.
#pragma once

#include "bits.h"
#include "philox.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dwm::DWM_ISA {

struct Wanted {
  bool words = false;     // random words for every element
  bool bits_in = false;   // keep bytes (0 or 1) read from packed bits
  bool bits_out = false;  // keep bytes written by the body become packed bits
};

struct TileSource {
  uint32_t layer = 0;
  Noise noise = {};
  const uint8_t* bits_in = nullptr;
  uint8_t* bits_out = nullptr;
};

// logical [column][spatial] -> [spatial][pitch]: each row a run in memory.
template <typename T>
DWM_NOINLINE static void to_memory_order(const T* logical, int64_t columns, int64_t spatial, int64_t pitch, T* rows) {
  for (int64_t q = 0; q < columns; ++q) {
    for (int64_t s = 0; s < spatial; ++s) rows[s * pitch + q] = logical[q * spatial + s];
  }
}

#if defined(__SSE2__)

// Words in squares of four by four: 0.5 cycles an element where the plain loop takes 2.6.
DWM_NOINLINE static void to_memory_order(const uint32_t* logical, int64_t columns, int64_t spatial, int64_t pitch,
                                   uint32_t* rows) {
  int64_t q = 0;
  for (; q + 4 <= columns; q += 4) {
    const uint32_t* from = logical + q * spatial;
    uint32_t* to = rows + q;
    int64_t s = 0;
    for (; s + 4 <= spatial; s += 4) {
      __m128 a = _mm_loadu_ps(reinterpret_cast<const float*>(from + s));
      __m128 b = _mm_loadu_ps(reinterpret_cast<const float*>(from + spatial + s));
      __m128 c = _mm_loadu_ps(reinterpret_cast<const float*>(from + 2 * spatial + s));
      __m128 d = _mm_loadu_ps(reinterpret_cast<const float*>(from + 3 * spatial + s));
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(reinterpret_cast<float*>(to + s * pitch), a);
      _mm_storeu_ps(reinterpret_cast<float*>(to + (s + 1) * pitch), b);
      _mm_storeu_ps(reinterpret_cast<float*>(to + (s + 2) * pitch), c);
      _mm_storeu_ps(reinterpret_cast<float*>(to + (s + 3) * pitch), d);
    }
    for (; s < spatial; ++s) {
      for (int64_t j = 0; j < 4; ++j) to[s * pitch + j] = from[j * spatial + s];
    }
  }
  for (; q < columns; ++q) {
    for (int64_t s = 0; s < spatial; ++s) rows[s * pitch + q] = logical[q * spatial + s];
  }
}

#endif

template <typename T>
DWM_NOINLINE static void to_logical_order(const T* rows, int64_t columns, int64_t spatial, int64_t pitch, T* logical) {
  for (int64_t q = 0; q < columns; ++q) {
    for (int64_t s = 0; s < spatial; ++s) logical[q * spatial + s] = rows[s * pitch + q];
  }
}

// Packed bits of whole columns of a 3 x 3 window <-> rows of keep bytes. Eight columns are nine bytes; row s of them is
// every ninth bit from s on: the first 64 bits hold all of it but column 7's, which lies in the ninth byte where s > 0.
constexpr uint64_t kDiagonal = 0x8040201008040201u;  // bits 0, 9, 18, ..., 63
constexpr uint64_t kEveryByte = 0x0101010101010101u;

DWM_NOINLINE static void nine_bits_to_rows(const uint8_t* bits, int64_t columns, int64_t pitch, uint8_t* rows) {
  for (int64_t q = 0; q < columns; q += 8, bits += 9) {
    const uint64_t low = load64(bits);
    const uint64_t last = static_cast<uint64_t>(bits[8]) << 1;
    for (int s = 0; s < 9; ++s) {
      const uint64_t row = (((low >> s) & kDiagonal) * kEveryByte) >> 56;
      store64(rows + s * pitch + q, kUnpack[row | ((last >> s) & 1u) << 7]);
    }
  }
}

DWM_NOINLINE static void rows_to_nine_bits(const uint8_t* rows, int64_t columns, int64_t pitch, uint8_t* bits) {
  for (int64_t q = 0; q < columns; q += 8, bits += 9) {
    uint64_t low = 0, last = 0;
    for (int s = 0; s < 9; ++s) {
      const uint64_t row = pack8(load64(rows + s * pitch + q));
      low |= ((row * kEveryByte) & kDiagonal) << s;
      last |= (row >> 7) << s;
    }
    store64(bits, low);
    bits[8] = static_cast<uint8_t>(last >> 1);
  }
}

// Bits of a tile's columns, from `bits` on -> rows of keep bytes, through `keep` in logical order where there is no
// faster way.
static inline void bits_to_rows(const uint8_t* bits, int64_t columns, int64_t spatial, int64_t pitch, uint8_t* keep,
                                uint8_t* rows) {
  const int64_t fast = spatial == 9 ? columns / 8 * 8 : 0, left = columns - fast;
  nine_bits_to_rows(bits, fast, pitch, rows);
  unpack_bytes(bits + fast / 8 * 9, left * spatial, keep);
  to_memory_order(keep, left, spatial, pitch, rows + fast);
}

static inline void rows_to_bits(const uint8_t* rows, int64_t columns, int64_t spatial, int64_t pitch, uint8_t* keep,
                                uint8_t* bits) {
  const int64_t fast = spatial == 9 ? columns / 8 * 8 : 0, left = columns - fast;
  rows_to_nine_bits(rows, fast, pitch, bits);
  to_logical_order(rows + fast, left, spatial, pitch, keep);
  pack_bytes(keep, left * spatial, bits + fast / 8 * 9);
}

// body(offset, n, words, keep): n elements at memory offset `offset`; words and keep point at theirs, where wanted.
template <Wanted kWanted, typename Body>
static inline void walk(const Shape& shape, const TileSource& source, int64_t begin, int64_t end, Body&& body) {
  alignas(64) uint32_t words[kWordBuffer];
  alignas(64) uint8_t keep[kTile];
  const Keys keys = kWanted.words ? round_keys(source.noise.seed) : Keys{};
  const uint32_t* drawn = words;

  if (shape.spatial == 1) {
    for (int64_t e = begin; e < end; e += kTile) {
      const int64_t n = end - e < kTile ? end - e : kTile;
      if constexpr (kWanted.words) {
        drawn = tile_words(static_cast<uint64_t>(e), n, source.layer, source.noise.step, keys, words);
      }
      if constexpr (kWanted.bits_in) unpack_bytes(source.bits_in + e / 8, n, keep);
      body(e, n, drawn, keep);
      if constexpr (kWanted.bits_out) pack_bytes(keep, n, source.bits_out + e / 8);
    }
    return;
  }

  alignas(64) uint32_t word_rows[kTile];
  alignas(64) uint8_t keep_rows[kTile];
  const int64_t spatial = shape.spatial, inner = shape.inner;
  const int64_t pitch = kTile / spatial / 8 * 8;  // columns of a tile: a multiple of 8, so tiles meet between bytes
  for (int64_t first = begin / spatial; first < end / spatial; first += pitch) {
    const int64_t left = end / spatial - first;
    const int64_t columns = left < pitch ? left : pitch;
    const int64_t e = first * spatial;
    if constexpr (kWanted.words) {
      drawn = tile_words(static_cast<uint64_t>(e), columns * spatial, source.layer, source.noise.step, keys, words);
      to_memory_order(drawn, columns, spatial, pitch, word_rows);
    }
    if constexpr (kWanted.bits_in) {
      bits_to_rows(source.bits_in + e / 8, columns, spatial, pitch, keep, keep_rows);
    }
    for (int64_t done = 0; done < columns;) {
      const int64_t outer = (first + done) / inner, i = (first + done) % inner;
      const int64_t run = inner - i < columns - done ? inner - i : columns - done;
      for (int64_t s = 0; s < spatial; ++s) {
        body((outer * spatial + s) * inner + i, run, word_rows + s * pitch + done, keep_rows + s * pitch + done);
      }
      done += run;
    }
    if constexpr (kWanted.bits_out) {
      rows_to_bits(keep_rows, columns, spatial, pitch, keep, source.bits_out + e / 8);
    }
  }
}

}  // namespace dwm::DWM_ISA
