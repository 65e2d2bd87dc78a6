// The two sweeps over the columns of a block, left to right, GPTQ's and coordinate descent's: one warp per row.
//
//            slot 0   slot 1   slot 2   slot 3
//   lane 0 |   0    |   32   |   64   |   96        a lane keeps column slot * 32 + lane of its row in registers;
//   lane 1 |   1    |   33   |   65   |   97        the square matrix passes through shared memory,
//     ..   |   ..   |   ..   |   ..   |   ..        32 rows (one slot's turn) at a time, for all warps of the block
//
// At column j its lane's answer is final; the lane hands its feedback to the warp and all later columns take it in.
#include "arithmetic.cuh"

namespace {

// GPTQ: the running value is the shifted target t_j, the feedback D_j = weight - value.
template <class Grid>
struct Solve {
  Grid grid;
  const float *weight, *shift, *scale;
  const int32_t* group_index;
  int64_t columns, groups;
  uint8_t* codes;
  float* residual;

  struct Column {
    float weight, scale, offset;
  };
  __device__ float load(int64_t row, int j, Column& column) const {
    const int64_t at = row * groups + group_index[j];
    column = {weight[row * columns + j], scale[at], grid.offset(at)};
    return column.weight + shift[row * columns + j];
  }
  __device__ float choose(float running, const Column& column, float& code) const {
    float steps;
    grid.choose(running / column.scale, column.offset, steps, code);
    return column.weight - steps * column.scale;
  }
  __device__ float feedback(float running, const Column& column) const {
    float code;
    return choose(running, column, code);
  }
  __device__ void store(int64_t row, int j, float running, const Column& column) const {
    float code;
    residual[row * columns + j] = choose(running, column, code);
    codes[row * columns + j] = (uint8_t)code;
  }
};

// Coordinate descent: the running value is the gradient, the feedback is minus the change of value.
template <class Grid>
struct Refine {
  Grid grid;
  const float *gradient, *hessian;
  const uint8_t* old_codes;
  const float* scale;
  const int32_t* group_index;
  int64_t columns, groups;
  uint8_t* codes;
  float* delta;

  struct Column {
    float old, scale, offset, curvature;
  };
  struct Move {
    float code, change;
  };
  __device__ float load(int64_t row, int j, Column& column) const {
    const int64_t at = row * groups + group_index[j];
    column = {(float)old_codes[row * columns + j], scale[at], grid.offset(at), hessian[j * columns + j]};
    return gradient[row * columns + j];
  }
  __device__ Move move(float slope, const Column& column) const {
    const float value = grid.steps(column.old, column.offset) * column.scale;
    float steps, code;
    grid.choose((value + slope / column.curvature) / column.scale, column.offset, steps, code);
    const float change = steps * column.scale - value;
    const bool better = 2.0f * change * slope - change * change * column.curvature > 0.0f;
    if (better && column.curvature > 0.0f) return {code, change};
    return {column.old, 0.0f};
  }
  __device__ float feedback(float running, const Column& column) const { return -move(running, column).change; }
  __device__ void store(int64_t row, int j, float running, const Column& column) const {
    const Move taken = move(running, column);
    codes[row * columns + j] = (uint8_t)taken.code;
    delta[row * columns + j] = taken.change;
  }
};

template <int kSlots, class Rule>
__global__ void __launch_bounds__(kThreads) sweep(Rule rule, const float* square, int columns, int64_t rows) {
  __shared__ float panel[32][kSlots * 32];
  const int lane = threadIdx.x % 32;
  const int64_t row = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  float running[kSlots] = {};
  typename Rule::Column column[kSlots] = {};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int j = slot * 32 + lane;
    if (row < rows && j < columns) running[slot] = rule.load(row, j, column[slot]);
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {  // unrolled, so that running and column stay in registers
    const int first = slot * 32, count = columns - first < 32 ? columns - first : 32;
    __syncthreads();  // the last panel has been used
    for (int at = threadIdx.x; at < 32 * kSlots * 32; at += kThreads) {
      const int i = at / (kSlots * 32), j = at % (kSlots * 32);
      panel[i][j] = i < count && j < columns ? square[(first + i) * columns + j] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const float given = __shfl_sync(0xffffffff, rule.feedback(running[slot], column[slot]), i);
      if (lane > i) running[slot] += given * panel[i][first + lane];
#pragma unroll
      for (int later = slot + 1; later < kSlots; ++later) running[later] += given * panel[i][later * 32 + lane];
    }
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int j = slot * 32 + lane;
    if (row < rows && j < columns) rule.store(row, j, running[slot], column[slot]);
  }
}

template <class Rule>
cudaError_t launch(const Rule& rule, const float* square, int64_t columns, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  if (columns > kMaxColumns) return cudaErrorInvalidValue;
  const unsigned blocks = blocks_for(rows, kWarps);
  const int width = (int)columns;
  if (columns <= 32) {
    sweep<1><<<blocks, kThreads, 0, stream>>>(rule, square, width, rows);
  } else if (columns <= 64) {
    sweep<2><<<blocks, kThreads, 0, stream>>>(rule, square, width, rows);
  } else if (columns <= 128) {
    sweep<4><<<blocks, kThreads, 0, stream>>>(rule, square, width, rows);
  } else {
    sweep<8><<<blocks, kThreads, 0, stream>>>(rule, square, width, rows);
  }
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t cuda_solve_columns(const float* weight, const float* shift, const float* factor,
                                          const float* scale, const uint8_t* zero, const int32_t* group_index,
                                          int64_t columns, int64_t groups, int64_t bits, uint8_t* codes,
                                          float* residual, int64_t rows, cudaStream_t stream) {
  const Solve<Affine> rule{{zero, (float)((1 << bits) - 1)}, weight, shift, scale, group_index, columns, groups, codes,
                           residual};
  return launch(rule, factor, columns, rows, stream);
}

extern "C" cudaError_t cuda_refine_columns(const float* gradient, const float* hessian, const uint8_t* old_codes,
                                           const float* scale, const uint8_t* zero, const int32_t* group_index,
                                           int64_t columns, int64_t groups, int64_t bits, uint8_t* codes, float* delta,
                                           int64_t rows, cudaStream_t stream) {
  const Refine<Affine> rule{{zero, (float)((1 << bits) - 1)}, gradient, hessian, old_codes, scale, group_index,
                            columns, groups, codes, delta};
  return launch(rule, hessian, columns, rows, stream);
}

extern "C" cudaError_t cuda_solve_levels(const float* weight, const float* shift, const float* factor,
                                         const float* scale, Levels levels, const int32_t* group_index,
                                         int64_t columns, int64_t groups, uint8_t* codes, float* residual,
                                         int64_t rows, cudaStream_t stream) {
  const Solve<Leveled> rule{{levels}, weight, shift, scale, group_index, columns, groups, codes, residual};
  return launch(rule, factor, columns, rows, stream);
}

extern "C" cudaError_t cuda_refine_levels(const float* gradient, const float* hessian, const uint8_t* old_codes,
                                          const float* scale, Levels levels, const int32_t* group_index,
                                          int64_t columns, int64_t groups, uint8_t* codes, float* delta, int64_t rows,
                                          cudaStream_t stream) {
  const Refine<Leveled> rule{{levels}, gradient, hessian, old_codes, scale, group_index, columns, groups, codes, delta};
  return launch(rule, hessian, columns, rows, stream);
}
