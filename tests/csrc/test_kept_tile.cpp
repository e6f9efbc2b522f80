// The index arithmetic of the GPU's linear_kept, walked on a CPU as its warps walk it: every weight of a row comes out as
// it was under its bit, from no value that was not copied. Prints "ok" or the broken promise.
#include "kept_tile.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using namespace dwm::kept;

void require(bool holds, const char* promise) {
  if (holds) return;
  std::printf("broken: %s\n", promise);
  std::exit(1);
}

// What __byte_perm does with a selector without sign bits.
uint32_t chosen_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}

// One row of `words` words whose kept values begin at number `start` of `values`; values are numbered from 1.
void walk(const std::vector<uint32_t>& words, int64_t start, const std::vector<uint16_t>& values) {
  int64_t copied = start;
  uint16_t expected = static_cast<uint16_t>(start);
  for (size_t step = 0; step * kWords < words.size(); ++step) {
    uint32_t bits[kWords];
    int found = 0;
    for (size_t j = 0; j < kWords; ++j) {
      bits[j] = step * kWords + j < words.size() ? words[step * kWords + j] : 0;
      found += std::popcount(bits[j]);
    }
    const Span span = span_of(copied, found);
    require(span.first % kEach == 0 && span.pieces <= kPieces, "pieces are whole, and a line holds them");
    require(span.first + span.pieces * kEach <= static_cast<int64_t>(values.size()), "copies end in the padding");
    std::vector<uint16_t> line;  // exactly what is copied: a sanitizer sees a read beyond it
    for (int piece = 0; piece < span.pieces; ++piece)
      for (int i = 0; i < kEach; ++i) line.push_back(values[static_cast<size_t>(span.first + piece * kEach + i)]);
    size_t base = static_cast<size_t>(span.base);
    for (const uint32_t word : bits) {
      for (int t = 0; t < 4; ++t) {
        for (int pair = 0; pair < kPairs; ++pair) {
          const size_t at = base + static_cast<size_t>(std::popcount(word & below(t, pair)));
          const uint32_t got = chosen_bytes(line.at(at), line.at(at + 1), selector_of(word, t, pair));
          for (int i = 0; i < 2; ++i) {
            const bool keeps = word >> (8 * t + 2 * pair + i) & 1;
            const uint16_t weight = static_cast<uint16_t>(got >> (16 * i));
            require(weight == (keeps ? ++expected : 0), "a weight is its value under a bit, 0 elsewhere");
          }
        }
      }
      base += static_cast<size_t>(std::popcount(word));
    }
    copied += found;
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const double share : {0.0, 0.03, 0.3, 0.5, 0.97, 1.0}) {
    for (size_t size = 1; size <= 9; ++size) {
      for (int64_t start = 0; start < 9; ++start) {
        std::vector<uint32_t> words(size);
        int64_t all = start;
        for (uint32_t& word : words) {
          for (int i = 0; i < 32; ++i) word |= uint32_t{random() < share * 4294967296.0} << i;
          all += std::popcount(word);
        }
        std::vector<uint16_t> values(static_cast<size_t>(all) + 32, 0xDEAD);
        for (size_t i = 0; i < static_cast<size_t>(all); ++i) values[i] = static_cast<uint16_t>(i + 1);
        walk(words, start, values);
      }
    }
  }
  std::puts("ok");
}
