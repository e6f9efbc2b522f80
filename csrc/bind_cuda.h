// What every binding of the CUDA part needs: the device and stream of a call, and checks of launches and devices.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "bind.h"

namespace dwm {

// The tensor's device and torch's current stream on it.
class Place {
 public:
  explicit Place(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(cudaError_t error = cudaGetLastError()) {
  STD_TORCH_CHECK(error == cudaSuccess, "dwm_fast: a CUDA kernel was not launched: ", cudaGetErrorString(error));
}

inline void check_device(const Tensor& t, const Tensor& home) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == home.get_device_index(),
                  "dwm_fast: tensors of one call must be on one GPU");
}

}  // namespace dwm
