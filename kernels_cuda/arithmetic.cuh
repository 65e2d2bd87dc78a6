// The shared arithmetic of grids for one CUDA thread: a lane is a float.
#pragma once

#include "kernels.cuh"

namespace {

using Lanes = float;
using IntLanes = int;
using Words = unsigned int;
__device__ inline IntLanes as_int(Lanes a) { return __float_as_int(a); }
__device__ inline Lanes as_lanes(IntLanes a) { return __int_as_float(a); }
#define QTOOL_INLINE __device__ inline
#include "../qtool/csrc/arithmetic.inc"

// Every lane gets the warp's least error and its place; the first of equals wins, as on the CPU.
__device__ inline void first_best(float& error, int& best) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, error, distance);
    const int place = __shfl_xor_sync(kAllLanes, best, distance);
    if (other < error || (other == error && place < best)) {
      error = other;
      best = place;
    }
  }
}

// What a code stands for; as in qtool/csrc/kernels.inc.
struct Affine {
  const uint8_t* zero;
  float top;

  __device__ float offset(int64_t at) const { return zero[at]; }
  __device__ void choose(float quotient, float offset, float& steps, float& code) const {
    steps = step_of(quotient, offset, top);
    code = steps + offset;
  }
  __device__ float steps(float code, float offset) const { return code - offset; }
};

struct Leveled {
  Levels levels;

  __device__ float offset(int64_t) const { return 0.0f; }
  __device__ void choose(float quotient, float, float& steps, float& code) const {
    int low = 0, high = (int)levels.count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (quotient > levels.edges[middle]) low = middle + 1;
      else high = middle;
    }
    code = (float)low;
    steps = levels.values[low];
  }
  __device__ float steps(float code, float) const { return levels.values[(int)code]; }
};

}  // namespace
