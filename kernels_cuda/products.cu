// Products of 8-bit integers: one block per tile of 64 tokens by 64 outputs, 4 by 4 of them per thread. Both factors pass
// through shared memory 64 columns at a time, four codes to a word.
#include "kernels.cuh"

namespace {

constexpr int kTile = 64, kEach = 4, kAcross = kTile / kEach, kWords = 16;
static_assert(kAcross * kAcross == kThreads);

// Codes [at, at + 4) of a row; zeros past its end.
__device__ inline int four_codes(const int8_t* row, int64_t at, int64_t columns, bool aligned) {
  if (aligned) return at < columns ? *reinterpret_cast<const int*>(row + at) : 0;
  unsigned word = 0;
  for (int i = 0; i < 4 && at + i < columns; ++i) word |= (unsigned)(uint8_t)row[at + i] << (8 * i);
  return (int)word;
}

__device__ inline void load_tile(const int8_t* matrix, int64_t first, int64_t rows, int64_t start, int64_t columns,
                                 bool aligned, int (*tile)[kTile + 1]) {
  for (int index = threadIdx.x; index < kTile * kWords; index += kThreads) {
    const int row = index / kWords, word = index % kWords;
    const int64_t at = start + 4 * word;
    tile[word][row] = first + row < rows ? four_codes(matrix + (first + row) * columns, at, columns, aligned) : 0;
  }
}

__global__ void __launch_bounds__(kThreads) multiply_kernel(const int8_t* left, const int8_t* right,
                                                            const float* left_scale, const float* right_scale,
                                                            int64_t tokens, int64_t columns, int64_t outputs,
                                                            bool aligned, float* product) {
  __shared__ int left_tile[kWords][kTile + 1];  // one more, so that storing a row touches all banks
  __shared__ int right_tile[kWords][kTile + 1];
  const int64_t tiles = (outputs + kTile - 1) / kTile;
  const int64_t token = blockIdx.x / tiles * kTile, output = blockIdx.x % tiles * kTile;
  const int down = threadIdx.x / kAcross, across = threadIdx.x % kAcross;
  int sums[kEach][kEach] = {};
  for (int64_t start = 0; start < columns; start += 4 * kWords) {
    __syncthreads();  // the last tiles have been used
    load_tile(left, token, tokens, start, columns, aligned, left_tile);
    load_tile(right, output, outputs, start, columns, aligned, right_tile);
    __syncthreads();
    for (int word = 0; word < kWords; ++word) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int codes = left_tile[word][down * kEach + i];
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] = __dp4a(codes, right_tile[word][across + j * kAcross], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < kEach; ++i) {
    const int64_t t = token + down * kEach + i;
    for (int j = 0; j < kEach; ++j) {
      const int64_t o = output + across + j * kAcross;
      if (t < tokens && o < outputs) product[t * outputs + o] = (float)sums[i][j] * (left_scale[t] * right_scale[o]);
    }
  }
}

}  // namespace

extern "C" cudaError_t cuda_multiply_int8(const int8_t* left, const int8_t* right, const float* left_scale,
                                          const float* right_scale, int64_t tokens, int64_t columns, int64_t,
                                          float* product, int64_t outputs, cudaStream_t stream) {
  if (tokens == 0 || outputs == 0) return cudaSuccess;
  const bool aligned = ((uintptr_t)left | (uintptr_t)right | (uintptr_t)columns) % 4 == 0;
  const int64_t tiles = ((tokens + kTile - 1) / kTile) * ((outputs + kTile - 1) / kTile);
  multiply_kernel<<<blocks_for(tiles, 1), kThreads, 0, stream>>>(left, right, left_scale, right_scale, tokens, columns,
                                                                 outputs, aligned, product);
  return cudaGetLastError();
}
