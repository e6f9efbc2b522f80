// Operations on packed bits.
#pragma once
#include <algorithm>
#include <vector>

#include "bind_cpu.h"

namespace {

using namespace dwm;

void pack(Tensors masks, Tensor bits) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  std::vector<PackTensor> tensors;
  std::vector<Element> elements;
  for (size_t i = 0; i < masks.size(); ++i) {
    tensors.push_back({shape_of(masks[i]), masks[i].data_ptr(), bytes(bits) + offsets[i]});
    elements.push_back(element_of(masks[i]));
  }
  for_pieces(tensors, [&](int64_t, const PackTensor& t, int64_t begin, int64_t end) {
    kernels().pack(elements[static_cast<size_t>(&t - tensors.data())], t, begin, end);
  });
}

struct FlatMask {
  Shape shape;
  UnpackTensor mask;
};

void unpack(Tensor bits, Tensors masks) {
  const Integers offsets = offsets_of(bits, numels_of(masks));
  std::vector<FlatMask> tensors;
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(masks[i].scalar_type() == ScalarType::Bool && masks[i].is_contiguous(),
                    "dwm_fast: masks must be contiguous bool tensors");
    tensors.push_back({shape_of(masks[i]), {masks[i].numel(), bytes(bits) + offsets[i], bytes(masks[i])}});
  }
  for_pieces(tensors, [&](int64_t, const FlatMask& t, int64_t begin, int64_t end) {
    kernels().unpack(t.mask, begin, end);
  });
}

void apply(Tensor bits, Tensors weights, Tensors masked) {
  const Integers offsets = offsets_of(bits, numels_of(weights));
  check_count(masked, weights.size(), "masked");
  std::vector<ApplyTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Shape shape = shape_of(weights[i]);
    check_like(masked[i], shape, "masked");
    STD_TORCH_CHECK(masked[i].scalar_type() == weights[i].scalar_type(), "dwm_fast: masked has another dtype");
    tensors.push_back({shape, bytes(bits) + offsets[i], weights[i].data_ptr(), masked[i].data_ptr(),
                       static_cast<int>(weights[i].element_size())});
  }
  for_pieces(tensors, [&](int64_t, const ApplyTensor& t, int64_t begin, int64_t end) {
    kernels().apply(t, begin, end);
  });
}

// Bytes of one piece of a set operation, and bytes that make a second thread worth waking: below, it costs more than
// the work, and on a busy machine a hundred times more.
constexpr int64_t kByteChunk = 1 << 16;
constexpr int64_t kBytesPerThread = 1 << 21;

struct BytePiece {
  int64_t tensor, begin, nbytes;
};

std::vector<BytePiece> byte_pieces(const Integers& offsets, int64_t nbytes) {
  std::vector<BytePiece> pieces;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t end = i + 1 < offsets.size() ? offsets[i + 1] : nbytes;
    for (int64_t begin = offsets[i]; begin < end; begin += kByteChunk) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(kByteChunk, end - begin)});
    }
  }
  return pieces;
}

void count(Tensor bits, Integers numels, Tensor out) {
  const Integers offsets = offsets_of(bits, numels);
  const std::vector<BytePiece> pieces = byte_pieces(offsets, bits.numel());
  int64_t* ones = counts_of(out, numels.size());
  std::fill(ones, ones + numels.size(), 0);
  std::vector<int64_t> parts(pieces.size());
  parallel(static_cast<int64_t>(pieces.size()), bits.numel() / kBytesPerThread, [&](int64_t i) {
    const BytePiece& piece = pieces[static_cast<size_t>(i)];
    parts[static_cast<size_t>(i)] = kernels().count(bytes(bits) + piece.begin, piece.nbytes);
  });
  for (size_t i = 0; i < pieces.size(); ++i) ones[pieces[i].tensor] += parts[i];
}

void overlap(Tensor a, Tensor b, Integers numels, Tensor out) {
  const Integers offsets = offsets_of(a, numels);
  offsets_of(b, numels);
  const std::vector<BytePiece> pieces = byte_pieces(offsets, a.numel());
  int64_t* sizes = counts_of(out, 2 * numels.size());
  std::fill(sizes, sizes + 2 * numels.size(), 0);
  std::vector<int64_t> both(pieces.size()), either(pieces.size());
  parallel(static_cast<int64_t>(pieces.size()), a.numel() / kBytesPerThread, [&](int64_t i) {
    const size_t j = static_cast<size_t>(i);
    kernels().overlap(bytes(a) + pieces[j].begin, bytes(b) + pieces[j].begin, pieces[j].nbytes, &both[j], &either[j]);
  });
  for (size_t i = 0; i < pieces.size(); ++i) {
    sizes[2 * pieces[i].tensor] += both[i];
    sizes[2 * pieces[i].tensor + 1] += either[i];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dwm_fast_cpu, m) {
  m.def("pack(Tensor[] masks, Tensor(a!) bits) -> ()");
  m.def("unpack(Tensor bits, Tensor(a!)[] masks) -> ()");
  m.def("apply(Tensor bits, Tensor[] weights, Tensor(a!)[] masked) -> ()");
  m.def("count(Tensor bits, int[] numels, Tensor(a!) out) -> ()");
  m.def("overlap(Tensor a, Tensor b, int[] numels, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("count", TORCH_BOX(&count));
  m.impl("overlap", TORCH_BOX(&overlap));
}
