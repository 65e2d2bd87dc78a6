// The CUDA kernels for torch, through its stable ABI. The only CUDA file that knows torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <tuple>

#include "kernels.cuh"

namespace {

constexpr bool kHost = false;  // values of device memory: qtool/ops/checks.py looks at them

// On the tensor's device and on torch's current stream there; nothing waits for the kernel.
template <class Launch, class... Arguments>
void run(const torch::stable::Tensor& like, Launch launch, int64_t rows, Arguments... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const cudaError_t error = launch(arguments..., rows, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "a qtool kernel did not start: ", cudaGetErrorString(error));
}

bool is_e4m3(const float*, int64_t) { return false; }  // device memory; threads search the levels, whichever they are

}  // namespace

#define KERNEL(name) cuda_##name
#include "../qtool/csrc/bindings.inc"

STABLE_TORCH_LIBRARY_IMPL(qtool, CUDA, library) { QTOOL_REGISTER(library); }
