// The only CPU file that knows torch, through its stable ABI: one build serves several PyTorch versions.
// Arguments were checked by qtool/ops; here tensors become pointers, and rows are split over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

const Kernels* active = choose_kernels("");

constexpr int64_t kGrain = 16;  // rows per thread at least: the width of a tile

template <class F>
void over_rows(int64_t rows, const F& work) {
  // whole tiles per thread, so that no tile is cut and the number of threads cannot matter
  torch::stable::parallel_for(0, (rows + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    work(begin * kGrain, end * kGrain < rows ? end * kGrain : rows);
  });
}

Tensor make(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  return torch::stable::new_empty(like, {rows, columns}, type);
}

std::tuple<Tensor, Tensor> fit_affine(Tensor weight, Tensor importance, int64_t group, int64_t bits, bool symmetric,
                                      int64_t scale_type, int64_t steps, double shrink_min, bool signed_scale,
                                      int64_t rounds) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor scale = make(weight, rows, columns / group, ScalarType::Float);
  Tensor zero = make(weight, rows, columns / group, ScalarType::Byte);
  const FitOptions options{columns, group, bits, symmetric, signed_scale, scale_type, steps, rounds, (float)shrink_min};
  const float *w = weight.const_data_ptr<float>(), *h = importance.const_data_ptr<float>();
  float* s = scale.mutable_data_ptr<float>();
  uint8_t* z = zero.mutable_data_ptr<uint8_t>();
  over_rows(rows, [&](int64_t begin, int64_t end) { active->fit_affine(w, h, options, s, z, begin, end); });
  return {scale, zero};
}

Tensor round_affine(Tensor weight, Tensor scale, Tensor zero, int64_t group, int64_t bits) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor codes = make(weight, rows, columns, ScalarType::Byte);
  const float *w = weight.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
  const uint8_t* z = zero.const_data_ptr<uint8_t>();
  uint8_t* c = codes.mutable_data_ptr<uint8_t>();
  over_rows(rows, [&](int64_t b, int64_t e) { active->round_affine(w, s, z, columns, group, bits, c, b, e); });
  return codes;
}

Tensor dequantize_affine(Tensor codes, Tensor scale, Tensor zero, int64_t group) {
  const int64_t rows = codes.size(0), columns = codes.size(1);
  Tensor values = make(codes, rows, columns, ScalarType::Float);
  const uint8_t *c = codes.const_data_ptr<uint8_t>(), *z = zero.const_data_ptr<uint8_t>();
  const float* s = scale.const_data_ptr<float>();
  float* v = values.mutable_data_ptr<float>();
  over_rows(rows, [&](int64_t b, int64_t e) { active->dequantize_affine(c, s, z, columns, group, v, b, e); });
  return values;
}

std::tuple<Tensor, Tensor> solve_columns(Tensor weight, Tensor shift, Tensor factor, Tensor scale, Tensor zero,
                                         Tensor group_index, int64_t bits) {
  const int64_t rows = weight.size(0), columns = weight.size(1), groups = scale.size(1);
  Tensor codes = make(weight, rows, columns, ScalarType::Byte);
  Tensor residual = make(weight, rows, columns, ScalarType::Float);
  const float *w = weight.const_data_ptr<float>(), *t = shift.const_data_ptr<float>();
  const float *f = factor.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
  const uint8_t* z = zero.const_data_ptr<uint8_t>();
  const int32_t* g = group_index.const_data_ptr<int32_t>();
  uint8_t* c = codes.mutable_data_ptr<uint8_t>();
  float* d = residual.mutable_data_ptr<float>();
  over_rows(rows, [&](int64_t begin, int64_t end) {
    active->solve_columns(w, t, f, s, z, g, columns, groups, bits, c, d, begin, end);
  });
  return {codes, residual};
}

std::tuple<Tensor, Tensor> refine_columns(Tensor gradient, Tensor hessian, Tensor old_codes, Tensor scale, Tensor zero,
                                          Tensor group_index, int64_t bits) {
  const int64_t rows = gradient.size(0), columns = gradient.size(1), groups = scale.size(1);
  Tensor codes = make(gradient, rows, columns, ScalarType::Byte);
  Tensor delta = make(gradient, rows, columns, ScalarType::Float);
  const float *e = gradient.const_data_ptr<float>(), *h = hessian.const_data_ptr<float>();
  const float* s = scale.const_data_ptr<float>();
  const uint8_t *o = old_codes.const_data_ptr<uint8_t>(), *z = zero.const_data_ptr<uint8_t>();
  const int32_t* g = group_index.const_data_ptr<int32_t>();
  uint8_t* c = codes.mutable_data_ptr<uint8_t>();
  float* d = delta.mutable_data_ptr<float>();
  over_rows(rows, [&](int64_t begin, int64_t end) {
    active->refine_columns(e, h, o, s, z, g, columns, groups, bits, c, d, begin, end);
  });
  return {codes, delta};
}

Tensor pack_bits(Tensor codes, int64_t bits, bool transposed) {
  const int64_t count = codes.size(transposed ? 0 : 1), other = codes.size(transposed ? 1 : 0);
  const int64_t length = (count * bits + 31) / 32;
  Tensor words = transposed ? make(codes, length, other, ScalarType::Int) : make(codes, other, length, ScalarType::Int);
  const uint8_t* c = codes.const_data_ptr<uint8_t>();
  uint32_t* w = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  over_rows(other, [&](int64_t begin, int64_t end) {
    transposed ? pack_columns(c, count, other, bits, w, begin, end) : pack_rows(c, count, bits, w, begin, end);
  });
  return words;
}

Tensor unpack_bits(Tensor words, int64_t bits, int64_t count, bool transposed) {
  const int64_t other = words.size(transposed ? 1 : 0);
  Tensor codes = transposed ? make(words, count, other, ScalarType::Byte) : make(words, other, count, ScalarType::Byte);
  const uint32_t* w = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  uint8_t* c = codes.mutable_data_ptr<uint8_t>();
  over_rows(other, [&](int64_t begin, int64_t end) {
    transposed ? unpack_columns(w, count, other, bits, c, begin, end) : unpack_rows(w, count, bits, c, begin, end);
  });
  return codes;
}

}  // namespace

// For ctypes: the name of the instruction set in use, and a way for tests to choose another. 0 when it cannot run here.
extern "C" __attribute__((visibility("default"))) const char* qtool_instruction_set() { return active->name; }
extern "C" __attribute__((visibility("default"))) int qtool_force_instruction_set(const char* name) {
  const Kernels* found = choose_kernels(name);
  if (found) active = found;
  return found != nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(qtool, CPU, m) {
  m.impl("fit_affine", TORCH_BOX(&fit_affine));
  m.impl("round_affine", TORCH_BOX(&round_affine));
  m.impl("dequantize_affine", TORCH_BOX(&dequantize_affine));
  m.impl("solve_columns", TORCH_BOX(&solve_columns));
  m.impl("refine_columns", TORCH_BOX(&refine_columns));
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
}
