// The CPU kernels for torch, through its stable ABI: one build serves several PyTorch versions. This file and
// bindings.inc are the only ones here that know torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "kernels.h"

namespace {

const Kernels* active = choose_kernels("");

constexpr int64_t kGrain = 16;  // rows per thread at least: the width of the widest tile

// Rows are split over torch's threads in whole tiles, so that the number of threads cannot matter.
template <class Kernel, class... Arguments>
void run(const torch::stable::Tensor&, Kernel kernel, int64_t rows, Arguments... arguments) {
  torch::stable::parallel_for(0, (rows + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    kernel(arguments..., begin * kGrain, end * kGrain < rows ? end * kGrain : rows);
  });
}

// Whether these are FP8's levels: -448 .. 448, with three bits of mantissa.
bool is_e4m3(const float* values, int64_t count) {
  if (count != 253) return false;
  for (int code = 0; code < 127; ++code) {
    const float level = code < 8 ? std::ldexp((float)code, -9) : std::ldexp((float)(8 + code % 8), code / 8 - 10);
    if (values[126 + code] != level || values[126 - code] != -level) return false;
  }
  return true;
}

}  // namespace

#define KERNEL(name) active->name
#include "bindings.inc"

STABLE_TORCH_LIBRARY_IMPL(qtool, CPU, library) { QTOOL_REGISTER(library); }

// For ctypes: the name of the instruction set in use, and a way for tests to choose another. 0 when it cannot run here.
extern "C" __attribute__((visibility("default"))) const char* qtool_instruction_set() { return active->name; }
extern "C" __attribute__((visibility("default"))) int qtool_force_instruction_set(const char* name) {
  const Kernels* found = choose_kernels(name);
  if (found) active = found;
  return found != nullptr;
}
