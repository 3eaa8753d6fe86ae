// What topk_cuda.cu and topk_coarse.cu share: launches, copies that run beside the arithmetic, and the tensor cores.
#pragma once
#include "topk.h"

#ifndef LAUNCH  // tests/cuda_on_cpu.h runs the kernels on a CPU, and defines all of this first
#define LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, (cudaStream_t)stream>>>(__VA_ARGS__)

// Begins to copy 4 or 16 bytes, aligned as such, to shared memory; zeros where there is nothing to copy.
template <int BYTES>
__device__ void begin_copy(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = __cvta_generic_to_shared(to), size = there ? BYTES : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(size) : "memory");
#else
  for (int i = 0; i < BYTES / 4; i++) ((float*)to)[i] = there ? ((const float*)from)[i] : 0.0f;
#endif
}
__device__ inline void finish_copies() {  // those that this thread began
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Loads four 8 x 8 matrices of bfloat16 from shared memory: each thread of the warp gives the address of a row, 16 bytes, of
// matrix lane / 8. From matrix i it gets, in one[i], row lane / 4, columns lane % 4 * 2 and the next.
__device__ inline void load_matrices(uint32_t (&one)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = __cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(one[0]), "=r"(one[1]), "=r"(one[2]), "=r"(one[3]) : "r"(address) : "memory");
#endif
}
// sum += a b, on the tensor cores, for a of 16 rows x 16, b of 16 x 8 columns. a: matrices of rows 0-7 and 8-15, first of
// columns 0-7, then of 8-15; b: of its transpose, columns 0-7, then 8-15; a thread's sum: row lane / 4, columns
// lane % 4 * 2 and the next, then the same of row lane / 4 + 8.
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
#endif

namespace minicode {
inline dim3 blocks(const Search& s, int64_t rows) { return dim3((s.n_rows + rows - 1) / rows, s.n_groups); }

// Scores every code in bfloat16, then in float32 those that can be among the k best. Leaves pass.counts below k for
// the rows that it gave up.
void topk_coarse(const Search& search, const float* scale, const float* offset, const CoarsePass& pass, void* stream);
}  // namespace minicode
