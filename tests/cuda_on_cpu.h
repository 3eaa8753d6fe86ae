// Just enough of CUDA to run the kernels of csrc/topk_cuda.cu on a CPU, one block after the other, a thread for each
// of its threads: slow, and exact about who waits for whom.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#define __global__ static
#define __device__ static
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static thread_local dim3 threadIdx, blockIdx, blockDim;
static std::barrier<>* everyone;
static std::atomic<int> votes;

static void __syncthreads() { everyone->arrive_and_wait(); }
static int __syncthreads_or(int vote) {
  if (vote) votes = 1;
  __syncthreads();
  const int result = votes;
  __syncthreads();
  votes = 0;
  __syncthreads();
  return result;
}
static int atomicAdd(int* address, int value) { return std::atomic_ref<int>(*address).fetch_add(value); }

static void launch(dim3 grid, unsigned n_threads, const std::function<void()>& kernel) {
  std::barrier<> barrier(n_threads);
  everyone = &barrier;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < n_threads; t++)
    threads.emplace_back([&, t] {
      for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
          threadIdx = dim3(t), blockIdx = dim3(x, y), blockDim = dim3(n_threads);
          kernel();
          __syncthreads();  // shared memory is the next block's
        }
    });
  for (auto& thread : threads) thread.join();
}
#define LAUNCH(kernel, grid, n_threads, stream, ...) launch(grid, n_threads, [&] { kernel(__VA_ARGS__); })

#include "topk_cuda.cu"

extern "C" bool search(const float* x, const float* codes, const float* scale, const float* offset, int64_t n_groups,
                       int64_t n_rows, int64_t n_codes, int64_t dim, int64_t k, float* scores, int64_t* ids) {
  return minicode::topk_cuda({x, n_rows * dim, dim, codes, n_groups, n_rows, n_codes, dim, k, minicode::dot, scores, ids},
                             scale, offset, nullptr);
}
