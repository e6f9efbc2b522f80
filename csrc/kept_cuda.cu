// linear_kept on NVIDIA GPUs: y = x (W * m)^T + b from kept weights of two bytes, for few rows of x.
//
// A block owns 16 or 32 rows of the weight; its four warps share the columns out in runs. Each warp stages kept values by
// asynchronous copies, three steps deep or two, expands them under the bits into the left operand of matrix instructions, and
// reads x as the right one. A matrix instruction sums over 16 columns in any order that both operands share: lane t of
// four takes eight neighbours, 16 bytes of x. The warps' sums are added in order: results do not depend on timing.
#include "bind_cuda.h"

#include <algorithm>
#include <optional>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kept_tile.h"

namespace {

using namespace dwm;
using kept::kColumns;
using kept::kEach;
using kept::kLine;
using kept::kPairs;
using kept::kWords;

constexpr int kWarps = 4;
constexpr int kMostShared = 99 * 1024;  // bytes a block may have on the GPUs that have least, sm_86 and sm_89
constexpr int kTile = 16;  // rows of the weight in a matrix instruction
constexpr int kSide = 8;   // rows of x in one

struct Job {
  const void* x;
  const uint16_t* values;
  const uint16_t* end;  // of the values and their padding
  const int64_t* starts;
  const uint32_t* words;
  const float* bias;
  void* y;
  int m, n, k;
};

// Places in shared memory are byte addresses there, of 32 bits: half the arithmetic of pointers.
__device__ __forceinline__ void copy16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ uint32_t value_at(uint32_t shared) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
  return value;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int NEWEST>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// Steps whose values a warp holds, in use or on their way.
__host__ __device__ constexpr int stages_of(int tiles) { return tiles == 1 ? 3 : 2; }

// As __byte_perm, for a selector whose bits above the lowest 16 are anything.
__device__ __forceinline__ uint32_t chosen_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }

// One row of the weight as a lane sees it: its words, how many values are copied, where its lines lie in shared memory,
// and where in a line the next values begin.
struct Row {
  const uint32_t* words;
  int64_t copied;
  uint32_t lines;
  uint32_t base;
};

// Starts the copies of one row and step; lane t of the row's four takes every fourth piece.
__device__ __forceinline__ void stage(const Job& job, Row& row, int step, int t, uint32_t line) {
  const int first = step * kWords, all = job.k / 32;
  int found = 0;
#pragma unroll
  for (int j = 0; j < kWords; ++j) found += first + j < all ? __popc(__ldg(row.words + first + j)) : 0;
  const kept::Span span = kept::span_of(row.copied, found);
  const uint16_t* from = job.values + span.first;
  const int pieces = from + span.pieces * kEach <= job.end ? span.pieces : 0;
#pragma unroll 1
  for (int piece = t; piece < pieces; piece += 4) copy16(row.lines + line + 16 * piece, from + piece * kEach);
  row.copied += found;
}

// TILES of 16 rows of the weight a warp, up to 8 SIDES rows of x.
template <typename T, int TILES, int SIDES>
__global__ void __launch_bounds__(32 * kWarps) linear_kept_kernel(const Job job) {
  constexpr int kRows = kTile * TILES, kStages = stages_of(TILES);
  constexpr uint32_t kStage = kRows * kLine * 2;  // bytes
  extern __shared__ __align__(16) uint16_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const int all = job.k / 32, steps = (all + kWords - 1) / kWords;
  const int begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;

  const uint32_t staged = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + warp * kStages * kStage;
  Row rows[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    const int number = min(static_cast<int>(blockIdx.x) * kRows + 8 * i + group, job.n - 1);  // repeated, never stored
    rows[i].words = job.words + static_cast<int64_t>(number) * all;
    int before = 0;
    for (int at = t; at < begin * kWords; at += 4) before += __popc(__ldg(rows[i].words + at));
    before += __shfl_xor_sync(0xFFFFFFFFu, before, 1);
    before += __shfl_xor_sync(0xFFFFFFFFu, before, 2);
    rows[i].copied = job.starts[number] + before;
    rows[i].lines = staged + (8 * i + group) * kLine * 2;
    rows[i].base = static_cast<uint32_t>(rows[i].copied) % kEach;
  }

  const T* x = static_cast<const T*>(job.x);
  float sums[TILES][SIDES][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (begin + ahead < end) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) stage(job, rows[i], begin + ahead, t, ahead * kStage);
    }
    commit();
  }
  for (int step = begin; step < end; ++step) {
    wait_for_all_but<kStages - 2>();
    __syncwarp();
    if (step + kStages - 1 < end) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i)
        stage(job, rows[i], step + kStages - 1, t, (step - begin + kStages - 1) % kStages * kStage);
    }
    commit();
    const uint32_t line = (step - begin) % kStages * kStage;
    uint32_t values[2 * TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) values[i] = rows[i].lines + line + 2 * rows[i].base;
#pragma unroll (SIDES > 4 ? 1 : kWords)  // the widest has no registers to look ahead
    for (int j = 0; j < kWords; ++j) {
      const int word = step * kWords + j;
      uint32_t left[2 * TILES][kPairs];
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) {
        const uint32_t bits = word < all ? __ldg(rows[i].words + word) : 0;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const uint32_t at = values[i] + 2 * __popc(bits & kept::below(t, pair));
          left[i][pair] = chosen_bytes(value_at(at), value_at(at + 2), kept::selector_of(bits, t, pair));
        }
        values[i] += 2 * __popc(bits);
        rows[i].base += __popc(bits);
      }
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        const int row = kSide * side + group;
        const T* from = x + static_cast<int64_t>(row) * job.k + 32 * word + 8 * t;
        const bool inside = row < job.m && word < all;
        const uint4 right = inside ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const auto &top = left[2 * tile], &low = left[2 * tile + 1];
          const uint32_t first[4] = {top[0], low[0], top[1], low[1]}, second[4] = {top[2], low[2], top[3], low[3]};
          multiply<T>(sums[tile][side], first, right.x, right.y);
          multiply<T>(sums[tile][side], second, right.z, right.w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) rows[i].base %= kEach;
  }

  // The staged values have been read by their warp; what lies there now are sums, (warp, row of x, row of the weight).
  __syncthreads();
  float* parts = reinterpret_cast<float*>(shared);
  constexpr int kMost = kSide * SIDES;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = kTile * tile + group + 8 * (i / 2), column = kSide * side + 2 * t + i % 2;
        parts[(warp * kMost + column) * kRows + row] = sums[tile][side][i];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < job.m * kRows; at += 32 * kWarps) {
    const int row = blockIdx.x * kRows + at % kRows, column = at / kRows;
    if (row >= job.n) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[(w * kMost + column) * kRows + at % kRows];
    if (job.bias != nullptr) sum += job.bias[row];
    store(static_cast<T*>(job.y) + static_cast<int64_t>(column) * job.n + row, sum);
  }
}

template <typename T, int TILES, int SIDES>
void launch(const Job& job, cudaStream_t stream) {
  constexpr int kRows = kTile * TILES;
  constexpr int kStaged = kWarps * stages_of(TILES) * kRows * kLine * static_cast<int>(sizeof(uint16_t));
  static_assert(kStaged >= kWarps * kSide * SIDES * kRows * static_cast<int>(sizeof(float)));
  static_assert(kStaged <= kMostShared);
  const auto kernel = linear_kept_kernel<T, TILES, SIDES>;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStaged));
  kernel<<<(job.n + kRows - 1) / kRows, 32 * kWarps, kStaged, stream>>>(job);
  check_launch();
}

template <typename T>
void launch_for(const Job& job, cudaStream_t stream) {
  if (job.m <= 8) return launch<T, 1, 1>(job, stream);
  if (job.m <= 16) return launch<T, 1, 2>(job, stream);
  if (job.m <= 32) return launch<T, 2, 4>(job, stream);
  return launch<T, 2, 8>(job, stream);
}

bool aligned(const Tensor& t, size_t to) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % to == 0; }

// x: (m, k), k a multiple of 32, m at most 64. values: two bytes each, of x's dtype. out: (m, n).
void linear_kept(Tensor x, Tensor values, Tensor starts, Tensor bits, std::optional<Tensor> bias, Tensor out) {
  for (const Tensor* t : {&values, &starts, &bits, &out}) {
    check_device(*t, x);
    STD_TORCH_CHECK(t->is_contiguous(), "dwm_fast: linear_kept takes contiguous tensors");
  }
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "dwm_fast: linear_kept takes bfloat16 and float16 on a GPU");
  STD_TORCH_CHECK(values.scalar_type() == type && out.scalar_type() == type && starts.scalar_type() == ScalarType::Long,
                  "dwm_fast: linear_kept got dtypes that do not fit each other");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && out.dim() == 2, "dwm_fast: linear_kept takes matrices");
  const int64_t m = x.size(0), k = x.size(1), n = starts.numel() - 1;
  STD_TORCH_CHECK(m <= kSide * 8 && k % 32 == 0 && k < (int64_t{1} << 31) && n >= 0 && n < (int64_t{1} << 31) &&
                      out.size(0) == m && out.size(1) == n,
                  "dwm_fast: linear_kept got sizes that do not fit each other");
  STD_TORCH_CHECK(aligned(x, 16) && aligned(values, 16) && aligned(bits, 4), "dwm_fast: linear_kept got unaligned data");
  offsets_of(bits, {n * k});
  if (bias) {
    check_device(*bias, x);
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == n && bias->is_contiguous(), "dwm_fast: bias has another length");
  }
  if (m == 0 || n == 0) return;
  const Place place(x);
  const auto* first = static_cast<const uint16_t*>(values.data_ptr());
  const Job job{x.data_ptr(), first, first + values.numel(), static_cast<const int64_t*>(starts.data_ptr()),
                reinterpret_cast<const uint32_t*>(bits.data_ptr()),
                bias ? static_cast<const float*>(bias->data_ptr()) : nullptr, out.data_ptr(),
                static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)};
  if (type == ScalarType::BFloat16) return launch_for<__nv_bfloat16>(job, place.stream());
  return launch_for<__half>(job, place.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cuda, m) {
  m.def("linear_kept(Tensor x, Tensor values, Tensor row_starts, Tensor bits, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cuda, CUDA, m) {
  m.impl("linear_kept", TORCH_BOX(&linear_kept));
}
