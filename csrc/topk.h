// The search: for each row of x the k codes with the highest x·c * scale + offset, best first.
//
// Of equal scores the lower id comes first, a NaN counts as -inf. The N x C scores are never stored. topk_cpu.cpp and
// topk_cuda.cu keep to this, and include nothing of torch.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace minicode {
enum Similarity : int64_t { cosine = 0, distance = 1, dot = 2 };

struct Search {
  const float* x;       // G x N rows of d floats; a row begins at x + g * x_group + n * x_row
  int64_t x_group, x_row;
  const float* codes;   // (G, C, d), contiguous
  int64_t n_groups, n_rows, n_codes, dim, k;
  Similarity similarity;
  float* scores;        // (G, N, k), contiguous
  int64_t* ids;         // (G, N, k), contiguous
};

// Runs body(begin, end) on parts of 0..n, in parallel.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;
// coarse: where the CPU can, score in a rounded form first, and in float32 only what the error bound leaves over.
void topk_cpu(const Search& search, const Parallel& parallel, int64_t n_threads, bool coarse);

// The same search by pursuit, with C x C floats of room for each group: scores and ids in the order of choice.
void pursuit_cpu(const Search& search, const Parallel& parallel);

std::string cpu_path();  // what topk_cpu uses here, for people

// How much this CPU can do at most, all threads: 10^9 operations a second in float32, and on the coarse pass's bytes (0: none).
struct Peak {
  double float32, bytes;
};
Peak cpu_peak(const Parallel& parallel, int64_t n_threads);

// On a GPU, what minicode/runtime/gpu.py prepares to score in bfloat16 first (see topk_coarse.cu), and room to work.
struct CoarsePass {
  static constexpr int64_t capacity = 128;
  const uint16_t *x = nullptr, *codes = nullptr;          // (G, N, depth), (G, width, depth), in bfloat16
  int64_t depth = 0, width = 0;                           // multiples of 32, 128
  const float *offset = nullptr, *twice_bound = nullptr;  // (G, width), (G, N)
  uint64_t* lists = nullptr;                              // (G, N, capacity)
  int* counts = nullptr;                                  // (G, N); null: no coarse pass
};

// Everything on the GPU, the codes' scales and offsets (G, C) too; stream is a cudaStream_t. Returns without waiting;
// false, and nothing done, for a k above 32.
bool topk_cuda(const Search& search, const float* scale, const float* offset, const CoarsePass& pass, void* stream);
}  // namespace minicode
