// Grids of levels: fitting scales (one warp per group, one candidate per lane, as in fit.cu), rounding and back (one
// thread per value).
#include "arithmetic.cuh"

namespace {

__global__ void fit_levels_kernel(const float* weight, const float* importance, LevelFitOptions o, Leveled rule,
                                  float* scale, int64_t tasks) {
  const int lane = threadIdx.x % 32;
  const int64_t task = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;  // row * groups + group
  if (task >= tasks) return;
  const float* tile = weight + task * o.group;
  importance += task % (o.columns / o.group) * o.group;
  float span = 0.0f;
  for (int64_t i = lane; i < o.group; i += 32) span = larger(span, magnitude(tile[i]));
  for (int distance = 16; distance > 0; distance /= 2)
    span = larger(span, __shfl_xor_sync(kAllLanes, span, distance));

  float error = as_lanes(0x7f800000), ratio = 1.0f, ignored;  // error: infinity
  int best = (int)o.steps;
  for (int step = lane; step < o.steps; step += 32) {
    const float found = level_error(rule, tile, importance, o.group, level_candidate(span, o, step), ignored);
    if (found < error) {
      error = found;
      best = step;
    }
  }
  first_best(error, best);
  float chosen = best < o.steps ? level_candidate(span, o, best) : 1.0f;
  if (best < o.steps) level_error(rule, tile, importance, o.group, chosen, ratio);
  for (int64_t round = 0; round < o.rounds; ++round) {  // every lane does the same: sums are in order
    const float next = level_refit(ratio, chosen, o.scale_type);
    float closed;
    const float found = level_error(rule, tile, importance, o.group, next, closed);
    if (found < error) {
      error = found;
      chosen = next;
      ratio = closed;
    }
  }
  if (lane == 0) scale[task] = span > 0.0f ? chosen : 1.0f;
}

__global__ void round_levels_kernel(const float* weight, const float* scale, Leveled rule, int64_t group,
                                    uint8_t* codes, int64_t total) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= total) return;
  float steps, code;
  rule.choose(weight[i] / scale[i / group], 0.0f, steps, code);
  codes[i] = (uint8_t)code;
}

__global__ void dequantize_levels_kernel(const uint8_t* codes, const float* scale, Leveled rule, int64_t group,
                                         float* values, int64_t total) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < total) values[i] = rule.levels.values[codes[i]] * scale[i / group];
}

}  // namespace

extern "C" cudaError_t cuda_fit_levels(const float* weight, const float* importance, const LevelFitOptions& options,
                                       Levels levels, float* scale, int64_t rows, cudaStream_t stream) {
  const int64_t tasks = rows * (options.columns / options.group);
  if (tasks == 0) return cudaSuccess;
  fit_levels_kernel<<<blocks_for(tasks, kWarps), kThreads, 0, stream>>>(weight, importance, options, Leveled{levels},
                                                                       scale, tasks);
  return cudaGetLastError();
}

extern "C" cudaError_t cuda_round_levels(const float* weight, const float* scale, Levels levels, int64_t columns,
                                         int64_t group, uint8_t* codes, int64_t rows, cudaStream_t stream) {
  const int64_t total = rows * columns;
  if (total == 0) return cudaSuccess;
  round_levels_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(weight, scale, Leveled{levels}, group,
                                                                           codes, total);
  return cudaGetLastError();
}

extern "C" cudaError_t cuda_dequantize_levels(const uint8_t* codes, const float* scale, Levels levels, int64_t columns,
                                              int64_t group, float* values, int64_t rows, cudaStream_t stream) {
  const int64_t total = rows * columns;
  if (total == 0) return cudaSuccess;
  dequantize_levels_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(codes, scale, Leveled{levels}, group,
                                                                                values, total);
  return cudaGetLastError();
}
