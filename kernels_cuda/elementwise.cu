// One thread per output value: rounding, dequantizing, packing and unpacking bits.
#include "arithmetic.cuh"

namespace {

__device__ inline int64_t thread_index() { return (int64_t)blockIdx.x * kThreads + threadIdx.x; }

// Groups lie one after another in row-major weights, so weight i belongs to scale i / group.
__global__ void round_kernel(const float* weight, const float* scale, const uint8_t* zero, int64_t group, float top,
                             uint8_t* codes, int64_t total) {
  const int64_t i = thread_index();
  if (i >= total) return;
  const float offset = zero[i / group];
  codes[i] = (uint8_t)(step_of(weight[i] / scale[i / group], offset, top) + offset);
}

__global__ void dequantize_kernel(const uint8_t* codes, const float* scale, const uint8_t* zero, int64_t group,
                                  float* values, int64_t total) {
  const int64_t i = thread_index();
  if (i < total) values[i] = ((float)codes[i] - (float)zero[i / group]) * scale[i / group];
}

// Where a stream starts and how far apart its values lie, for codes and for words.
struct Layout {
  int64_t count, length, streams;  // codes and words per stream
  bool transposed;

  // Splits a thread's index so that neighbours touch neighbouring memory: place in the stream, and the stream.
  __device__ void split(int64_t index, int64_t size, int64_t& place, int64_t& stream) const {
    place = transposed ? index / streams : index % size;
    stream = transposed ? index % streams : index / size;
  }
  __device__ int64_t at(int64_t place, int64_t stream, int64_t size) const {
    return transposed ? place * streams + stream : stream * size + place;
  }
};

__global__ void pack_kernel(const uint8_t* codes, Layout layout, int64_t bits, uint32_t* words) {
  const int64_t index = thread_index();
  if (index >= layout.length * layout.streams) return;
  int64_t place, stream;
  layout.split(index, layout.length, place, stream);
  uint32_t word = 0;
  for (int64_t i = place * 32 / bits; i < layout.count && i * bits < (place + 1) * 32; ++i) {
    const uint32_t code = codes[layout.at(i, stream, layout.count)];
    const int64_t shift = i * bits - place * 32;  // negative where a code began in the word before
    word |= shift < 0 ? code >> -shift : code << shift;
  }
  words[index] = word;
}

__global__ void unpack_kernel(const uint32_t* words, Layout layout, int64_t bits, uint8_t* codes) {
  const int64_t index = thread_index();
  if (index >= layout.count * layout.streams) return;
  int64_t place, stream;
  layout.split(index, layout.count, place, stream);
  const int64_t word = place * bits / 32, offset = place * bits % 32;
  uint32_t code = words[layout.at(word, stream, layout.length)] >> offset;
  if (offset + bits > 32) code |= words[layout.at(word + 1, stream, layout.length)] << (32 - offset);
  codes[index] = (uint8_t)(code & ((1u << bits) - 1));
}

cudaError_t pack(const uint8_t* codes, const Layout& layout, int64_t bits, uint32_t* words, cudaStream_t stream) {
  const int64_t total = layout.length * layout.streams;
  if (total == 0) return cudaSuccess;
  pack_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(codes, layout, bits, words);
  return cudaGetLastError();
}

cudaError_t unpack(const uint32_t* words, const Layout& layout, int64_t bits, uint8_t* codes, cudaStream_t stream) {
  const int64_t total = layout.count * layout.streams;
  if (total == 0) return cudaSuccess;
  unpack_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(words, layout, bits, codes);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t cuda_round_affine(const float* weight, const float* scale, const uint8_t* zero, int64_t columns,
                                         int64_t group, int64_t bits, uint8_t* codes, int64_t rows,
                                         cudaStream_t stream) {
  const int64_t total = rows * columns;
  if (total == 0) return cudaSuccess;
  const float top = (float)((1 << bits) - 1);
  round_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(weight, scale, zero, group, top, codes, total);
  return cudaGetLastError();
}

extern "C" cudaError_t cuda_dequantize_affine(const uint8_t* codes, const float* scale, const uint8_t* zero,
                                              int64_t columns, int64_t group, float* values, int64_t rows,
                                              cudaStream_t stream) {
  const int64_t total = rows * columns;
  if (total == 0) return cudaSuccess;
  dequantize_kernel<<<blocks_for(total, kThreads), kThreads, 0, stream>>>(codes, scale, zero, group, values, total);
  return cudaGetLastError();
}

extern "C" cudaError_t cuda_pack_rows(const uint8_t* codes, int64_t count, int64_t, int64_t bits, uint32_t* words,
                                      int64_t rows, cudaStream_t stream) {
  return pack(codes, {count, words_of(count, bits), rows, false}, bits, words, stream);
}

extern "C" cudaError_t cuda_unpack_rows(const uint32_t* words, int64_t count, int64_t, int64_t bits, uint8_t* codes,
                                        int64_t rows, cudaStream_t stream) {
  return unpack(words, {count, words_of(count, bits), rows, false}, bits, codes, stream);
}

extern "C" cudaError_t cuda_pack_columns(const uint8_t* codes, int64_t count, int64_t, int64_t bits, uint32_t* words,
                                         int64_t width, cudaStream_t stream) {
  return pack(codes, {count, words_of(count, bits), width, true}, bits, words, stream);
}

extern "C" cudaError_t cuda_unpack_columns(const uint32_t* words, int64_t count, int64_t, int64_t bits, uint8_t* codes,
                                           int64_t width, cudaStream_t stream) {
  return unpack(words, {count, words_of(count, bits), width, true}, bits, codes, stream);
}
