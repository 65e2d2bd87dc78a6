// The CPU kernels for torch, through its stable ABI: one build serves several PyTorch versions. This file and
// bindings.inc are the only ones here that know torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

const Kernels* active = choose_kernels("");

constexpr bool kHost = true;
constexpr int64_t kGrain = 16;  // rows per thread at least: the width of the widest tile

// Over torch's threads. Memory that runs out in one of them is std::bad_alloc here too, and MemoryError in Python: torch
// itself would only say that a call failed.
template <class Part>
void parallel(int64_t begin, int64_t end, const Part& part) {
  std::atomic<bool> exhausted{false};
  torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
    try {
      part(first, last);
    } catch (const std::bad_alloc&) {
      exhausted = true;
    }
  });
  if (exhausted) throw std::bad_alloc();
}

// Rows are split over torch's threads in whole tiles, so that the number of threads cannot matter.
template <class Kernel, class... Arguments>
void run(const torch::stable::Tensor&, Kernel kernel, int64_t rows, Arguments... arguments) {
  parallel(0, (rows + kGrain - 1) / kGrain, [&](int64_t begin, int64_t end) {
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

namespace {

// GGUF's blocks, on the CPU only: on a GPU their references run there.
std::tuple<Tensor, Tensor, Tensor, Tensor> fit_blocks(Tensor weight, Tensor importance, Tensor levels, Tensor edges,
                                                      int64_t super, int64_t sub, int64_t scale_low, int64_t scale_high,
                                                      int64_t mins, int64_t steps, int64_t rounds, double energy,
                                                      bool uniform) {
  matrix(weight, ScalarType::Float, "weight");
  sized(importance, ScalarType::Float, {weight.size(1)}, weight, "importance");
  groups_of(weight, super);
  level_table(levels, edges, weight);
  searches(steps, rounds);
  require(super <= 256 && sub > 0 && super % sub == 0 && super / sub <= 16, "a block has at most 16 parts of 256");
  require(-128 <= scale_low && scale_low <= scale_high && scale_high <= 127 && (scale_low < 0 || scale_high > 0) &&
              between(mins, 0, 255) && energy >= 0,
          "the range of scales, mins or energy is out of range");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor d = make(weight, rows, columns / super, ScalarType::Float);
  Tensor dmin = make(weight, rows, columns / super, ScalarType::Float);
  Tensor scales = make(weight, rows, columns / sub, ScalarType::Byte);
  Tensor minus = make(weight, rows, columns / sub, ScalarType::Byte);
  const BlockFitOptions options{columns, super, sub, scale_low, scale_high, mins, steps, rounds, (float)energy, uniform};
  run(weight, KERNEL(fit_blocks), rows, floats(weight), floats(importance), options, levels_of(levels, edges),
      floats_of(d), bytes_of(scales), floats_of(dmin), bytes_of(minus));
  return {d, scales, dmin, minus};
}

// fields int32 [count, 5]: see packing.cpp. Every block is independent.
Tensor packed_fields(Tensor parts, Tensor fields, int64_t size) {
  matrix(parts, ScalarType::Byte, "parts");
  field_table(fields, parts, parts.size(1), size);
  const int64_t blocks = parts.size(0);
  Tensor packed = make(parts, blocks, size, ScalarType::Byte);
  run(parts, KERNEL(pack_fields), blocks, bytes(parts), fields.const_data_ptr<int32_t>(), fields.size(0), parts.size(1),
      size, bytes_of(packed));
  return packed;
}

Tensor unpacked_fields(Tensor packed, Tensor fields, int64_t width) {
  matrix(packed, ScalarType::Byte, "packed");
  field_table(fields, packed, width, packed.size(1));
  const int64_t blocks = packed.size(0);
  Tensor parts = make(packed, blocks, width, ScalarType::Byte);
  run(packed, KERNEL(unpack_fields), blocks, bytes(packed), fields.const_data_ptr<int32_t>(), fields.size(0), width,
      packed.size(1), bytes_of(parts));
  return parts;
}

}  // namespace

#include "bindings_packed.inc"
#include "bindings_codebooks.inc"
#include "bindings_int4.inc"

STABLE_TORCH_LIBRARY_IMPL(qtool, CPU, library) {
  QTOOL_REGISTER(library);
  library.impl("fit_blocks", TORCH_BOX(&fit_blocks));
  library.impl("pack_fields", TORCH_BOX(&packed_fields));
  library.impl("unpack_fields", TORCH_BOX(&unpacked_fields));
  library.impl("multiply_packed", TORCH_BOX(&multiply_packed));
  library.impl("unpack_packed", TORCH_BOX(&unpack_packed));
  library.impl("decode_block", TORCH_BOX(&decode_block));
  library.impl("refine_codebooks", TORCH_BOX(&refine_codebooks));
  library.impl("dequantize_codebooks", TORCH_BOX(&dequantize_codebooks));
  library.impl("sum_codewords", TORCH_BOX(&sum_codewords));
  library.impl("repack_int4", TORCH_BOX(&repack_int4));
  library.impl("compare_int4", TORCH_BOX(&compare_int4));
}

// For ctypes: the name of the instruction set in use, and a way for tests to choose another. 0 when it cannot run here.
extern "C" __attribute__((visibility("default"))) const char* qtool_instruction_set() { return active->name; }
extern "C" __attribute__((visibility("default"))) int qtool_force_instruction_set(const char* name) {
  const Kernels* found = choose_kernels(name);
  if (found) active = found;
  return found != nullptr;
}
