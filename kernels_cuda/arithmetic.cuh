// The shared arithmetic of affine grids for one CUDA thread: a lane is a float.
#pragma once

#include "kernels.cuh"

namespace {

using Lanes = float;
using IntLanes = int;
__device__ inline IntLanes as_int(Lanes a) { return __float_as_int(a); }
__device__ inline Lanes as_lanes(IntLanes a) { return __int_as_float(a); }
#define QTOOL_INLINE __device__ inline
#include "../qtool/csrc/arithmetic.inc"

}  // namespace
