// Where a warp finds the kept weights of its tile: index arithmetic alone, one code for the GPU and for tests on a CPU.
//
// A warp walks steps of kColumns columns. Of each row it copies the pieces of 16 bytes that hold the step's kept values
// into a line of shared memory; values begin anywhere in the first piece. Lane 4g + t reads byte t of every word of row g:
// eight columns, in four pairs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DWM_BOTH __host__ __device__ __forceinline__
#else
#define DWM_BOTH inline
#endif

namespace dwm::kept {

constexpr int kWords = 4;                // of bits, a row and step
constexpr int kColumns = 32 * kWords;    // a step
constexpr int kEach = 8;                 // values of two bytes a piece
constexpr int kPieces = kColumns / kEach + 1;
constexpr int kLine = kPieces * kEach;   // values a line of shared memory holds
constexpr int kPairs = 4;                // a lane and word

// What is copied of a row in a step: `pieces` pieces from value number `first`, whose value number `base` is the step's.
struct Span {
  int64_t first;
  int base;
  int pieces;
};

// kept: values of the step, which begin at number `start`. A pair is read as two neighbours, whichever of its bits is
// set, so one more value than there are is copied, and no more than a full step needs.
DWM_BOTH Span span_of(int64_t start, int kept) {
  const int base = static_cast<int>(start & (kEach - 1));
  const int needed = base + (kept + 2 < kColumns ? kept + 2 : kColumns);
  return {start - base, base, (needed + kEach - 1) / kEach};
}

// Bits of a word below those of pair `pair` of lane byte `t`.
DWM_BOTH uint32_t below(int t, int pair) { return (uint32_t{1} << (8 * t + 2 * pair)) - 1; }

// How two values that lie one after the other become the pair under its two bits: a selector of bytes for prmt, with
// bytes 0, 1 the first value, 4, 5 the second, and byte 2, which is 0. Its lowest 16 bits count.
DWM_BOTH uint32_t selector_of(uint32_t word, int t, int pair) {
  const uint32_t byte = word >> (8 * t);
  const uint32_t sixteenfold = (pair < 2 ? byte << (4 - 2 * pair) : byte >> (2 * pair - 4)) & 48;
  return static_cast<uint32_t>(0x5410'1022'2210'2222ull >> sixteenfold);
}

}  // namespace dwm::kept
