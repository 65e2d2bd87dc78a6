// As much of CUDA as qtool's kernels use, on a CPU: the threads of a block are coroutines, blocks run one after another.
// For tests of the kernels' logic where no GPU is; it says nothing about races or speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
typedef void* cudaStream_t;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulated {

struct Index {
  unsigned x;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  int64_t block_barriers = 0, warp_barriers = 0;
  int32_t shuffled = 0;
};

inline Index block, thread;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void yield() {
  const Index mine = thread;
  swapcontext(&threads[mine.x].context, &scheduler);
  thread = mine;
}

// Waits until threads [first, last) have come to as many barriers of this kind as the caller.
inline void wait(int64_t Thread::* barriers, size_t first, size_t last) {
  const int64_t reached = ++(threads[thread.x].*barriers);
  for (size_t other = first; other < last && other < threads.size(); ++other)
    while (!threads[other].done && threads[other].*barriers < reached) yield();
}

inline void wait_for_warp() {
  const size_t first = thread.x / 32 * 32;
  wait(&Thread::warp_barriers, first, first + 32);
}

template <class Value>
Value shuffle(Value value, unsigned source) {
  static_assert(sizeof(Value) == 4);
  std::memcpy(&threads[thread.x].shuffled, &value, 4);
  wait_for_warp();
  std::memcpy(&value, &threads[thread.x / 32 * 32 + source % 32].shuffled, 4);
  wait_for_warp();
  return value;
}

inline void body() {
  kernel();
  threads[thread.x].done = true;
}

inline void launch(unsigned blocks, unsigned size, std::function<void()> work) {
  kernel = std::move(work);
  for (block.x = 0; block.x < blocks; ++block.x) {
    threads = std::vector<Thread>(size);
    for (Thread& each : threads) {
      getcontext(&each.context);
      each.context.uc_stack.ss_sp = each.stack.data();
      each.context.uc_stack.ss_size = each.stack.size();
      each.context.uc_link = &scheduler;
      makecontext(&each.context, body, 0);
    }
    for (unsigned left = size; left > 0;) {
      left = 0;
      for (thread.x = 0; thread.x < size; ++thread.x) {
        if (threads[thread.x].done) continue;
        swapcontext(&scheduler, &threads[thread.x].context);
        left += !threads[thread.x].done;
      }
    }
  }
}

}  // namespace emulated

#define blockIdx emulated::block
#define threadIdx emulated::thread
inline void __syncthreads() { emulated::wait(&emulated::Thread::block_barriers, 0, emulated::threads.size()); }
template <class Value>
Value __shfl_sync(unsigned, Value value, int source) { return emulated::shuffle(value, source); }
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) { return emulated::shuffle(value, (threadIdx.x % 32) ^ mask); }
inline int __dp4a(int left, int right, int sum) {
  int8_t a[4], b[4];
  std::memcpy(a, &left, 4);
  std::memcpy(b, &right, 4);
  for (int i = 0; i < 4; ++i) sum += a[i] * b[i];
  return sum;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
