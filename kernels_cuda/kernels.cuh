// CUDA kernels: pointers and integers only, no torch. Same arguments and same bits as the CPU kernels in
// qtool/csrc/kernels.h, for all rows at once. C linkage, so that the tests can call them through ctypes.
#pragma once

#include <cuda_runtime.h>

#include "../qtool/csrc/kernels.h"

constexpr int kThreads = 256;  // of every block: eight warps
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffff;

inline unsigned blocks_for(int64_t tasks, int64_t per_block) { return (unsigned)((tasks + per_block - 1) / per_block); }

extern "C" {

cudaError_t cuda_fit_affine(const float* weight, const float* importance, const FitOptions& options, float* scale,
                            uint8_t* zero, int64_t rows, cudaStream_t stream);
cudaError_t cuda_round_affine(const float* weight, const float* scale, const uint8_t* zero, int64_t columns,
                              int64_t group, int64_t bits, uint8_t* codes, int64_t rows, cudaStream_t stream);
cudaError_t cuda_dequantize_affine(const uint8_t* codes, const float* scale, const uint8_t* zero, int64_t columns,
                                   int64_t group, float* values, int64_t rows, cudaStream_t stream);
cudaError_t cuda_solve_columns(const float* weight, const float* shift, const float* factor, const float* scale,
                               const uint8_t* zero, const int32_t* group_index, int64_t columns, int64_t groups,
                               int64_t bits, uint8_t* codes, float* residual, int64_t rows, cudaStream_t stream);
cudaError_t cuda_refine_columns(const float* gradient, const float* hessian, const uint8_t* old_codes,
                                const float* scale, const uint8_t* zero, const int32_t* group_index, int64_t columns,
                                int64_t groups, int64_t bits, uint8_t* codes, float* delta, int64_t rows,
                                cudaStream_t stream);
cudaError_t cuda_fit_levels(const float* weight, const float* importance, const LevelFitOptions& options, Levels levels,
                            float* scale, int64_t rows, cudaStream_t stream);
cudaError_t cuda_round_levels(const float* weight, const float* scale, Levels levels, int64_t columns, int64_t group,
                              uint8_t* codes, int64_t rows, cudaStream_t stream);
cudaError_t cuda_dequantize_levels(const uint8_t* codes, const float* scale, Levels levels, int64_t columns,
                                   int64_t group, float* values, int64_t rows, cudaStream_t stream);
cudaError_t cuda_solve_levels(const float* weight, const float* shift, const float* factor, const float* scale,
                              Levels levels, const int32_t* group_index, int64_t columns, int64_t groups,
                              uint8_t* codes, float* residual, int64_t rows, cudaStream_t stream);
cudaError_t cuda_refine_levels(const float* gradient, const float* hessian, const uint8_t* old_codes,
                               const float* scale, Levels levels, const int32_t* group_index, int64_t columns,
                               int64_t groups, uint8_t* codes, float* delta, int64_t rows, cudaStream_t stream);
// `same` repeats rows here: the CPU kernel has it as the width of the product.
cudaError_t cuda_multiply_int8(const int8_t* left, const int8_t* right, const float* left_scale,
                               const float* right_scale, int64_t tokens, int64_t columns, int64_t same, float* product,
                               int64_t rows, cudaStream_t stream);
// `same` repeats rows (or the width, for columns): the CPU kernels have it there.
cudaError_t cuda_pack_rows(const uint8_t* codes, int64_t count, int64_t same, int64_t bits, uint32_t* words,
                           int64_t rows, cudaStream_t stream);
cudaError_t cuda_unpack_rows(const uint32_t* words, int64_t count, int64_t same, int64_t bits, uint8_t* codes,
                             int64_t rows, cudaStream_t stream);
cudaError_t cuda_pack_columns(const uint8_t* codes, int64_t count, int64_t same, int64_t bits, uint32_t* words,
                              int64_t width, cudaStream_t stream);
cudaError_t cuda_unpack_columns(const uint32_t* words, int64_t count, int64_t same, int64_t bits, uint8_t* codes,
                                int64_t width, cudaStream_t stream);
}
