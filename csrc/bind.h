// What both bindings ask of the tensors that Python hands over. A failed check is a fault of dwm_fast, not of the user:
// the public operations check their arguments first.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "core.h"

namespace dwm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// Contiguous or channels_last (4-D, 5-D); Python makes anything else contiguous first.
inline Shape shape_of(const Tensor& t) {
  Shape shape;
  shape.numel = t.numel();
  if (t.is_contiguous()) return shape;
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims == 4 || dims == 5, "dwm_fast: a tensor is neither contiguous nor channels_last");
  int64_t stride = 1;
  const auto expect = [&](int64_t dim) {
    STD_TORCH_CHECK(sizes[dim] == 1 || strides[dim] == stride,
                    "dwm_fast: a tensor is neither contiguous nor channels_last");
    stride *= sizes[dim];
  };
  expect(1);
  for (int64_t dim = dims - 1; dim >= 2; --dim) expect(dim);
  expect(0);
  shape.inner = sizes[1];
  for (int64_t dim = 2; dim < dims; ++dim) shape.spatial *= sizes[dim];
  STD_TORCH_CHECK(shape.spatial <= kMaxSpatial, "dwm_fast: a channels_last kernel window is too large");
  return shape;
}

inline bool same(const Shape& a, const Shape& b) {
  return a.numel == b.numel && a.spatial == b.spatial && a.inner == b.inner;
}

inline void check_count(const Tensors& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.size() == count, "dwm_fast: ", name, " has another number of tensors than the weights");
}

inline void check_like(const Tensor& t, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(same(shape_of(t), shape), "dwm_fast: ", name, " has another shape or memory order");
}

inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "dwm_fast: ", name, " must be float32");
}

inline uint8_t* bytes(const Tensor& t) { return static_cast<uint8_t*>(t.data_ptr()); }

// First byte of each tensor in a network buffer; checks the buffer's length.
inline Integers offsets_of(const Tensor& bits, const Integers& numels) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous(),
                  "dwm_fast: bits must be a contiguous uint8 tensor");
  Integers offsets;
  int64_t offset = 0;
  for (const int64_t numel : numels) {
    STD_TORCH_CHECK(numel >= 0, "dwm_fast: a number of elements is negative");
    offsets.push_back(offset);
    offset += packed_nbytes(numel);
  }
  STD_TORCH_CHECK(bits.numel() == offset, "dwm_fast: bits have ", bits.numel(), " bytes, expected ", offset);
  return offsets;
}

inline Integers numels_of(const Tensors& list) {
  Integers numels;
  for (const Tensor& t : list) numels.push_back(t.numel());
  return numels;
}

inline Element element_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                        type == ScalarType::BFloat16;
  return {static_cast<int>(t.element_size()), floating};
}

inline int64_t* counts_of(const Tensor& out, size_t count) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() &&
                      out.numel() == static_cast<int64_t>(count),
                  "dwm_fast: counts go into a contiguous int64 tensor");
  return static_cast<int64_t*>(out.data_ptr());
}

}  // namespace dwm
