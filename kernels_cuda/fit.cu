// Fitting grids: one warp per group, one candidate grid per lane. All lanes walk the group's weights together, so each
// load is one broadcast, and a candidate's error is summed in order by one thread: the bits are those of the CPU.
#include "arithmetic.cuh"

namespace {

__device__ Extent extent_of_group(const float* tile, const FitOptions& o, int lane) {
  float low = tile[0], high = tile[0];
  for (int64_t i = lane; i < o.group; i += 32) {
    low = smaller(low, tile[i]);
    high = larger(high, tile[i]);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    low = smaller(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = larger(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  return extent_of(low, high, o.symmetric);
}

__global__ void fit_kernel(const float* weight, const float* importance, FitOptions o, float* scale, uint8_t* zero,
                           int64_t tasks) {
  const int lane = threadIdx.x % 32;
  const int64_t task = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;  // row * groups + group
  if (task >= tasks) return;
  const float* tile = weight + task * o.group;
  importance += task % (o.columns / o.group) * o.group;
  const Extent extent = extent_of_group(tile, o, lane);
  const float top = top_code(o);
  const int count = (int)(o.steps * variants(o)), per_step = (int)variants(o);

  float error = as_lanes(0x7f800000);  // infinity
  int best = count;
  for (int index = lane; index < count; index += 32) {
    const Grid grid = candidate(extent, o, index / per_step, index % per_step);
    const float found = error_of(tile, importance, o.group, grid, top);
    if (found < error) {
      error = found;
      best = index;
    }
  }
  first_best(error, best);
  const Grid plain{1.0f, plain_zero(o)};
  Grid grid = best < count ? candidate(extent, o, best / per_step, best % per_step) : plain;
  for (int64_t round = 0; round < o.rounds; ++round) {  // every lane does the same: sums are in order
    const Grid next = refit(tile, importance, o.group, grid, top, o.scale_type);
    const float found = error_of(tile, importance, o.group, next, top);
    grid = found < error ? next : grid;
    error = found < error ? found : error;
  }
  if (extent.flat) grid = plain;
  if (lane == 0) {
    scale[task] = grid.scale;
    zero[task] = (uint8_t)grid.zero;
  }
}

}  // namespace

extern "C" cudaError_t cuda_fit_affine(const float* weight, const float* importance, const FitOptions& options,
                                       float* scale, uint8_t* zero, int64_t rows, cudaStream_t stream) {
  const int64_t tasks = rows * (options.columns / options.group);
  if (tasks == 0) return cudaSuccess;
  fit_kernel<<<blocks_for(tasks, kWarps), kThreads, 0, stream>>>(weight, importance, options, scale, zero, tasks);
  return cudaGetLastError();
}
