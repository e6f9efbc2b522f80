// How a launch on packed bits takes many tensors: by value, as one kernel parameter, and how a block finds its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dwm {

constexpr int kThreads = 256;
constexpr int kBatch = 48;                // tensors a launch: the parameter stays below 4 KB on every GPU
constexpr int64_t kPerBlock = 16384;      // elements a block: 16 rounds of 4 bytes or 4 rounds of 16 bytes a thread
constexpr int64_t kBytesPerBlock = 8192;  // bytes of packed bits a block of count and overlap

struct Item {
  const void* source;
  const uint8_t* bits;
  void* target;
  int64_t numel;
  int64_t inner;
  int64_t spatial;
};

struct Batch {
  int count;
  int64_t first_block[kBatch + 1];
  Item items[kBatch];
};

// Tensor of this block, and the block's number inside it.
__device__ inline int find_item(const Batch& batch, int64_t* block) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_block[middle] <= static_cast<int64_t>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  *block = static_cast<int64_t>(blockIdx.x) - batch.first_block[low];
  return low;
}

__device__ inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace dwm
