// Packed bits on NVIDIA GPUs, many tensors a launch: pack (ballot), unpack, apply, count, overlap and combine.
// Tensors travel to the device by value, as a kernel parameter: nothing is copied, and a CUDA graph can replay it.
#include "bind_cuda.h"

#include "bits_batch.h"

namespace {

using namespace dwm;

// A warp reads 32 neighbouring elements and ballots them into one word; eight words a round keep loads in flight.
template <typename T>
__global__ void pack_kernel(const __grid_constant__ Batch batch, const T magnitude) {
  int64_t block;
  const Item item = batch.items[find_item(batch, &block)];
  const T* mask = static_cast<const T*>(item.source);
  uint32_t* words = static_cast<uint32_t*>(item.target);
  const int64_t end = min(item.numel, (block + 1) * kPerBlock);
  const int lane = threadIdx.x % 32;
  constexpr int kWords = 8;
  for (int64_t base = block * kPerBlock + (threadIdx.x / 32) * 32 * kWords; base < end; base += kThreads * kWords) {
    bool kept[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int64_t e = base + 32 * j + lane;
      kept[j] = e < end && (mask[e] & magnitude) != 0;
    }
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const uint32_t word = __ballot_sync(0xFFFFFFFFu, kept[j]);
      if (lane == j) mine = word;
    }
    if (lane < kWords && base + 32 * lane < end) words[base / 32 + lane] = mine;
  }
}

// Eight bytes (nonzero = 1) -> one byte.
__device__ uint32_t pack8(uint64_t bytes) {
  constexpr uint64_t k7F = 0x7F7F7F7F7F7F7F7Full;
  bytes = ((((bytes & k7F) + k7F) | bytes) >> 7) & 0x0101010101010101ull;
  return static_cast<uint32_t>((bytes * 0x0102040810204080ull) >> 56);
}

// One byte -> eight bytes of 0 or 1.
__device__ uint64_t unpack8(uint32_t byte) {
  const uint64_t spread = (byte * 0x0101010101010101ull) & 0x8040201008040201ull;
  return ((spread + 0x7F7F7F7F7F7F7F7Full) | spread) >> 7 & 0x0101010101010101ull;
}

// Masks of one byte an element: sixteen a load, no ballot needed.
__global__ void pack_bytes_kernel(const __grid_constant__ Batch batch) {
  int64_t block;
  const Item item = batch.items[find_item(batch, &block)];
  const uint8_t* mask = static_cast<const uint8_t*>(item.source);
  uint16_t* halves = static_cast<uint16_t*>(item.target);
  const int64_t end = min(item.numel, (block + 1) * kPerBlock);
  const bool vector = aligned16(mask);
#pragma unroll 4
  for (int64_t e = block * kPerBlock + threadIdx.x * 16; e < end; e += kThreads * 16) {
    uint64_t low = 0, high = 0;
    if (vector && e + 16 <= end) {
      const ulonglong2 sixteen = *reinterpret_cast<const ulonglong2*>(mask + e);
      low = sixteen.x;
      high = sixteen.y;
    } else {
      for (int j = 0; j < 8 && e + j < end; ++j) low |= static_cast<uint64_t>(mask[e + j]) << (8 * j);
      for (int j = 0; j < 8 && e + 8 + j < end; ++j) high |= static_cast<uint64_t>(mask[e + 8 + j]) << (8 * j);
    }
    halves[e / 16] = static_cast<uint16_t>(pack8(low) | pack8(high) << 8);
  }
}

__global__ void unpack_kernel(const __grid_constant__ Batch batch) {
  int64_t block;
  const Item item = batch.items[find_item(batch, &block)];
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(item.bits);
  uint8_t* mask = static_cast<uint8_t*>(item.target);
  const int64_t end = min(item.numel, (block + 1) * kPerBlock);
  const bool vector = aligned16(mask);
#pragma unroll 4
  for (int64_t e = block * kPerBlock + threadIdx.x * 16; e < end; e += kThreads * 16) {
    const uint32_t half = halves[e / 16];
    if (vector && e + 16 <= end) {
      *reinterpret_cast<ulonglong2*>(mask + e) = make_ulonglong2(unpack8(half & 0xFF), unpack8(half >> 8));
    } else {
      for (int j = 0; j < 16 && e + j < end; ++j) mask[e + j] = half >> j & 1;
    }
  }
}

// Logical index of the element at memory index m of a channels_last tensor.
__device__ int64_t logical_index(int64_t m, int64_t inner, int64_t spatial) {
  const int64_t row = m / inner, i = m - row * inner;
  const int64_t outer = row / spatial, s = row - outer * spatial;
  return (outer * inner + i) * spatial + s;
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kLength = 16 / sizeof(T);
  T lanes[kLength];
};

template <typename T>
__global__ void apply_kernel(const __grid_constant__ Batch batch) {
  int64_t block;
  const Item item = batch.items[find_item(batch, &block)];
  const T* weight = static_cast<const T*>(item.source);
  T* out = static_cast<T*>(item.target);
  const int64_t end = min(item.numel, (block + 1) * kPerBlock);
  constexpr int kLength = Vector<T>::kLength;
  const bool vector = aligned16(weight) && aligned16(out);
  for (int64_t m = block * kPerBlock + threadIdx.x * kLength; m < end; m += kThreads * kLength) {
    if (item.spatial == 1 && vector && m + kLength <= end) {
      Vector<T> lanes = *reinterpret_cast<const Vector<T>*>(weight + m);
      uint32_t bits = item.bits[m / 8] >> (m % 8);
      if constexpr (kLength == 16) bits |= static_cast<uint32_t>(item.bits[m / 8 + 1]) << 8;
#pragma unroll
      for (int j = 0; j < kLength; ++j) lanes.lanes[j] = bits >> j & 1 ? lanes.lanes[j] : T{0};
      *reinterpret_cast<Vector<T>*>(out + m) = lanes;
    } else {
      for (int j = 0; j < kLength && m + j < end; ++j) {
        const int64_t e = item.spatial == 1 ? m + j : logical_index(m + j, item.inner, item.spatial);
        out[m + j] = item.bits[e / 8] >> (e % 8) & 1 ? weight[m + j] : T{0};
      }
    }
  }
}

__device__ int64_t block_sum(int64_t value) {
  __shared__ int64_t parts[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
  if (threadIdx.x == 0) {
    for (const int64_t part : parts) sum += part;
  }
  __syncthreads();
  return sum;
}

__device__ int ones(uint4 x) { return __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w); }

__device__ uint4 both(uint4 a, uint4 b) { return make_uint4(a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w); }

__device__ uint4 either(uint4 a, uint4 b) { return make_uint4(a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w); }

// numel is in bytes here. Integer sums: the order of the additions does not matter.
template <bool kTwo>
__global__ void count_kernel(const __grid_constant__ Batch batch) {
  int64_t block;
  const Item item = batch.items[find_item(batch, &block)];
  const uint4* a = reinterpret_cast<const uint4*>(item.bits);
  const uint4* b = static_cast<const uint4*>(item.source);
  const int64_t end = min(item.numel, (block + 1) * kBytesPerBlock) / 16;
  int64_t first = 0, second = 0;
  for (int64_t i = block * kBytesPerBlock / 16 + threadIdx.x; i < end; i += kThreads) {
    if constexpr (kTwo) {
      const uint4 x = a[i], y = b[i];
      first += ones(both(x, y));
      second += ones(either(x, y));
    } else {
      first += ones(a[i]);
    }
  }
  unsigned long long* sums = static_cast<unsigned long long*>(item.target);
  first = block_sum(first);
  if (threadIdx.x == 0) atomicAdd(sums, static_cast<unsigned long long>(first));
  if constexpr (kTwo) {
    second = block_sum(second);
    if (threadIdx.x == 0) atomicAdd(sums + 1, static_cast<unsigned long long>(second));
  }
}

__device__ uint32_t combined(int op, uint32_t x, uint32_t y) {
  return op == kAnd ? x & y : op == kOr ? x | y : op == kXor ? x ^ y : x & ~y;
}

__global__ void combine_kernel(int op, const uint8_t* a, const uint8_t* b, uint8_t* out, int64_t nbytes, bool vector) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 16;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16; i < nbytes; i += stride) {
    if (vector && i + 16 <= nbytes) {
      const uint4 x = *reinterpret_cast<const uint4*>(a + i), y = *reinterpret_cast<const uint4*>(b + i);
      *reinterpret_cast<uint4*>(out + i) =
          make_uint4(combined(op, x.x, y.x), combined(op, x.y, y.y), combined(op, x.z, y.z), combined(op, x.w, y.w));
    } else {
      for (int j = 0; j < 16 && i + j < nbytes; ++j) out[i + j] = static_cast<uint8_t>(combined(op, a[i + j], b[i + j]));
    }
  }
}

// launch(batch, blocks) for as many items as one launch takes.
template <typename Launch>
void for_batches(const std::vector<Item>& items, int64_t per_block, const Launch& launch) {
  Batch batch;
  batch.count = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) {
      batch.first_block[batch.count] = blocks;
      launch(batch, static_cast<unsigned>(blocks));
      check_launch();
    }
    batch.count = 0;
    blocks = 0;
  };
  for (const Item& item : items) {
    const int64_t needed = (item.numel + per_block - 1) / per_block;
    STD_TORCH_CHECK(needed < (int64_t{1} << 31), "dwm_fast: a tensor has too many elements for one launch");
    if (batch.count == kBatch || blocks + needed >= (int64_t{1} << 31)) flush();
    if (needed == 0) continue;
    batch.first_block[batch.count] = blocks;
    batch.items[batch.count++] = item;
    blocks += needed;
  }
  flush();
}

// Slot of an element size: 1, 2, 4, 8 bytes.
size_t slot_of(size_t size) { return size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3; }

template <typename T>
void launch_pack(const std::vector<Item> (&items)[2], cudaStream_t stream) {
  for (const int floating : {0, 1}) {
    const T magnitude = static_cast<T>(static_cast<T>(~T{0}) >> floating);
    for_batches(items[floating], kPerBlock, [&](const Batch& batch, unsigned blocks) {
      pack_kernel<T><<<blocks, kThreads, 0, stream>>>(batch, magnitude);
    });
  }
}

void pack(Tensors masks, Tensor bits) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  const Place place(bits);
  std::vector<Item> items[4][2];  // by element size, integers and floats: a launch reads one type
  for (size_t i = 0; i < masks.size(); ++i) {
    check_device(masks[i], bits);
    STD_TORCH_CHECK(masks[i].is_contiguous(), "dwm_fast: masks must be contiguous");
    const Element element = element_of(masks[i]);
    items[slot_of(masks[i].element_size())][element.floating].push_back(
        {masks[i].data_ptr(), nullptr, bytes(bits) + offsets[i], masks[i].numel(), 1, 1});
  }
  for_batches(items[0][0], kPerBlock, [&](const Batch& batch, unsigned blocks) {
    pack_bytes_kernel<<<blocks, kThreads, 0, place.stream()>>>(batch);
  });
  launch_pack<uint16_t>(items[1], place.stream());
  launch_pack<uint32_t>(items[2], place.stream());
  launch_pack<uint64_t>(items[3], place.stream());
}

void unpack(Tensor bits, Tensors masks) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  const Place place(bits);
  std::vector<Item> items;
  for (size_t i = 0; i < masks.size(); ++i) {
    check_device(masks[i], bits);
    STD_TORCH_CHECK(masks[i].scalar_type() == ScalarType::Bool && masks[i].is_contiguous(),
                    "dwm_fast: masks must be contiguous bool tensors");
    items.push_back({nullptr, bytes(bits) + offsets[i], masks[i].data_ptr(), masks[i].numel(), 1, 1});
  }
  for_batches(items, kPerBlock, [&](const Batch& batch, unsigned blocks) {
    unpack_kernel<<<blocks, kThreads, 0, place.stream()>>>(batch);
  });
}

template <typename T>
void launch_apply(const std::vector<Item>& items, cudaStream_t stream) {
  for_batches(items, kPerBlock, [&](const Batch& batch, unsigned blocks) {
    apply_kernel<T><<<blocks, kThreads, 0, stream>>>(batch);
  });
}

void apply(Tensor bits, Tensors weights, Tensors masked) {
  const Integers offsets = offsets_of(bits, numels_of(weights));
  check_count(masked, weights.size(), "masked");
  const Place place(bits);
  std::vector<Item> by_size[4];
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(weights[i], bits);
    check_device(masked[i], bits);
    const Shape shape = shape_of(weights[i]);
    check_like(masked[i], shape, "masked");
    STD_TORCH_CHECK(masked[i].scalar_type() == weights[i].scalar_type(), "dwm_fast: masked has another dtype");
    by_size[slot_of(weights[i].element_size())].push_back(
        {weights[i].data_ptr(), bytes(bits) + offsets[i], masked[i].data_ptr(), shape.numel, shape.inner,
         shape.spatial});
  }
  launch_apply<uint8_t>(by_size[0], place.stream());
  launch_apply<uint16_t>(by_size[1], place.stream());
  launch_apply<uint32_t>(by_size[2], place.stream());
  launch_apply<uint64_t>(by_size[3], place.stream());
}

// Items of `numels` tensors whose bits are in `a` (and `b`), each with `per_tensor` sums in `sums`.
std::vector<Item> count_items(const Tensor& a, const Tensor* b, const Integers& numels, int64_t* sums,
                              int64_t per_tensor) {
  const Integers offsets = offsets_of(a, numels);
  std::vector<Item> items;
  for (size_t i = 0; i < numels.size(); ++i) {
    items.push_back({b ? bytes(*b) + offsets[i] : nullptr, bytes(a) + offsets[i],
                     sums + static_cast<int64_t>(i) * per_tensor, packed_nbytes(numels[i]), 1, 1});
  }
  return items;
}

void count(Tensor bits, Integers numels, Tensor out) {
  check_device(out, bits);
  const Place place(bits);
  const auto items = count_items(bits, nullptr, numels, counts_of(out, numels.size()), 1);
  for_batches(items, kBytesPerBlock, [&](const Batch& batch, unsigned blocks) {
    count_kernel<false><<<blocks, kThreads, 0, place.stream()>>>(batch);
  });
}

void overlap(Tensor a, Tensor b, Integers numels, Tensor out) {
  check_device(b, a);
  check_device(out, a);
  offsets_of(b, numels);
  const Place place(a);
  const auto items = count_items(a, &b, numels, counts_of(out, 2 * numels.size()), 2);
  for_batches(items, kBytesPerBlock, [&](const Batch& batch, unsigned blocks) {
    count_kernel<true><<<blocks, kThreads, 0, place.stream()>>>(batch);
  });
}

void combine(Tensor a, Tensor b, int64_t op, Tensor out) {
  for (const Tensor* t : {&a, &b, &out}) {
    check_device(*t, a);
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Byte && t->is_contiguous() && t->numel() == a.numel(),
                    "dwm_fast: combine takes contiguous uint8 buffers of equal length");
  }
  const int64_t nbytes = a.numel();
  if (nbytes == 0) return;
  const Place place(a);
  const int64_t blocks = std::min<int64_t>((nbytes + kThreads * 16 - 1) / (kThreads * 16), 1 << 20);
  bool vector = true;
  for (const Tensor* t : {&a, &b, &out}) vector = vector && reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0;
  combine_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, place.stream()>>>(
      static_cast<int>(op), bytes(a), bytes(b), bytes(out), nbytes, vector);
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY(dwm_fast_cuda, m) {
  m.def("pack(Tensor[] masks, Tensor(a!) bits) -> ()");
  m.def("unpack(Tensor bits, Tensor(a!)[] masks) -> ()");
  m.def("apply(Tensor bits, Tensor[] weights, Tensor(a!)[] masked) -> ()");
  m.def("count(Tensor bits, int[] numels, Tensor(a!) out) -> ()");
  m.def("overlap(Tensor a, Tensor b, int[] numels, Tensor(a!) out) -> ()");
  m.def("combine(Tensor a, Tensor b, int op, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cuda, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("count", TORCH_BOX(&count));
  m.impl("overlap", TORCH_BOX(&overlap));
  m.impl("combine", TORCH_BOX(&combine));
}
