// Just enough of CUDA to run the kernels of csrc/ on a CPU, one block after the other. Its threads
// take turns, each until it must wait for others; so it is exact about who waits for whom, and
// copies arrive as late as they may.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__ static
#define __device__ static
#define __shared__ static
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::min;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static dim3 threadIdx, blockIdx, blockDim;

// -- threads, and how they wait

struct Barrier {
  unsigned arrived = 0;
  unsigned round = 0;
};
struct Copy {
  void* to;
  const void* from;
  int size;
  bool there;
};
struct Thread {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(1 << 16);
  std::vector<Copy> copies;
  const Barrier* barrier;  // that it waits at
  unsigned round;
  bool done;
};
struct Share {  // what a thread shows to its warp
  double number;
  bool vote;
  const void* address;
  uint32_t a[4], b[2];
};

static std::vector<Thread> threads;
static jmp_buf scheduler;
static Barrier block_barrier, warp_barriers[32];
static Share shares[1024];
static int votes;
static const std::function<void()>* the_kernel;

static void wait(Barrier& barrier, unsigned n) {
  Thread& me = threads[threadIdx.x];
  me.barrier = &barrier;
  me.round = barrier.round;
  barrier.arrived++;
  if (barrier.arrived == n) {
    barrier.arrived = 0;
    barrier.round++;
  } else if (!_setjmp(me.resume)) {
    _longjmp(scheduler, 1);
  }
}
static void __syncthreads() { wait(block_barrier, blockDim.x); }
static void __syncwarp() { wait(warp_barriers[threadIdx.x / 32], 32); }
static int __syncthreads_or(int vote) {
  votes |= vote != 0;
  __syncthreads();
  const int result = votes;
  __syncthreads();
  votes = 0;
  __syncthreads();
  return result;
}
static int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

// -- what a warp does together

// What every thread of the warp does with what all of them show.
template <class Function>
static auto together(const Share& mine, Function function) {
  shares[threadIdx.x] = mine;
  __syncwarp();
  const auto result = function(&shares[threadIdx.x / 32 * 32], threadIdx.x % 32);
  __syncwarp();
  return result;
}
template <class T>
static T __shfl_xor_sync(unsigned, T number, int mask) {
  return together({double(number)}, [=](const Share* all, int lane) {
    return T(all[lane ^ mask].number);
  });
}
static unsigned __ballot_sync(unsigned, bool vote) {
  return together({0, vote}, [](const Share* all, int) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= unsigned(all[i].vote) << i;
    return result;
  });
}
static int __any_sync(unsigned all, bool vote) { return __ballot_sync(all, vote) != 0; }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static int __float_as_int(float number) {
  int bits;
  std::memcpy(&bits, &number, 4);
  return bits;
}
static float __int_as_float(int bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// -- copies, and the tensor cores; as in topk_cuda.cuh

[[noreturn]] static void fail(const char* why) {
  std::fputs(why, stderr);
  std::abort();
}

template <int BYTES>
static void begin_copy(void* to, const void* from, bool there) {
  const bool aligned = size_t(to) % BYTES == 0 && (!there || size_t(from) % BYTES == 0);
  if (!aligned) fail("a copy that is not aligned\n");
  threads[threadIdx.x].copies.push_back({to, from, BYTES, there});
}
static void finish_copies() {
  for (const Copy& copy : threads[threadIdx.x].copies) {
    if (copy.there) std::memcpy(copy.to, copy.from, copy.size);
    else std::memset(copy.to, 0, copy.size);
  }
  threads[threadIdx.x].copies.clear();
}

// ldmatrix .x4: threads 8 i to 8 i + 7 give the rows of matrix i.
static void load_matrices(uint32_t (&one)[4], const void* row) {
  together({0, false, row}, [&](const Share* all, int lane) {
    for (int i = 0; i < 4; i++) {
      const char* address = (const char*)all[8 * i + lane / 4].address;
      std::memcpy(&one[i], address + lane % 4 * 4, 4);
    }
    return 0;
  });
}

// One of the two numbers in a pair.
static float of_bfloat16(uint32_t pair, int which) {
  return __int_as_float(which ? pair & 0xffff0000 : pair << 16);
}
// a[i] is at row q (+ 8 if i is odd), column 2 t (+ 8 if i > 1), by the PTX documentation.
static float left(const Share* all, int row, int k) {
  const Share& holder = all[row % 8 * 4 + k % 8 / 2];
  return of_bfloat16(holder.a[k / 8 * 2 + row / 8], k % 2);
}
// b[i] is at row 2 t (+ 8 i), column q.
static float right(const Share* all, int k, int column) {
  const Share& holder = all[column * 4 + k % 8 / 2];
  return of_bfloat16(holder.b[k / 8], k % 2);
}

// Adds four products to a sum at once, each of the five cut off at the last bit of the largest: the
// worst that has been observed of tensor cores.
static float add(float sum, const double (&products)[4]) {
  double largest = std::fabs(sum);
  for (double product : products) largest = std::max(largest, std::fabs(product));
  const double last = std::ldexp(1.0, std::max(std::ilogb(largest), -126) - 23);
  double total = std::trunc(sum / last) * last;
  for (double product : products) total += std::trunc(product / last) * last;
  const float result = float(total);
  return std::fabs(result) > std::fabs(total) ? std::nextafter(result, 0.0f) : result;
}

// mma m16n8k16
static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Share mine = {0, false, nullptr, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  together(mine, [&](const Share* all, int lane) {
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + (i < 2 ? 0 : 8);
      const int column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16 && std::isfinite(sum[i]); k += 4) {
        double products[4];
        for (int j = 0; j < 4; j++) {
          products[j] = double(left(all, row, k + j)) * right(all, k + j, column);
        }
        sum[i] = add(sum[i], products);
      }
    }
    return 0;
  });
}

// -- blocks

// A thread begins at the start of the kernel, and ends by a jump.
static void run_kernel() {
  (*the_kernel)();
  threads[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

static void launch(dim3 grid, unsigned n_threads, const std::function<void()>& kernel) {
  blockDim = dim3(n_threads);
  the_kernel = &kernel;
  threads.resize(n_threads);
  for (unsigned block = 0; block < grid.x * grid.y; block++) {
    blockIdx = dim3(block % grid.x, block / grid.x);
    for (Thread& thread : threads) {
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.data();
      thread.start.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.start, run_kernel, 0);
      thread.done = false;
      thread.copies.clear();
    }
    static unsigned turn, running, i;  // static: they outlive the jumps
    static bool moved;
    for (turn = 0, running = n_threads; running; turn++) {
      moved = false;
      for (i = 0; i < n_threads; i++) {  // now the first thread first, now the last
        threadIdx = dim3(turn % 2 ? n_threads - 1 - i : i);
        Thread& thread = threads[threadIdx.x];
        if (thread.done) continue;
        if (turn && thread.round == thread.barrier->round) continue;
        moved = true;
        if (!_setjmp(scheduler)) {
          if (turn) _longjmp(thread.resume, 1);
          setcontext(&thread.start);
        }
        running -= threads[threadIdx.x].done;
      }
      if (!moved) fail("all threads wait for one another\n");
    }
  }
}
#define LAUNCH(kernel, grid, n_threads, stream, ...) \
  launch(grid, n_threads, [&] { kernel(__VA_ARGS__); })

#include "topk_cuda.cu"
#include "topk_coarse.cu"

extern "C" bool search(const minicode::Search* search, const float* scale, const float* offset,
                       const minicode::CoarsePass* pass) {
  return minicode::topk_cuda(*search, scale, offset, *pass, nullptr);
}
