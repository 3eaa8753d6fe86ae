// The search on a GPU, in float32, for k up to 32. Compiles alone: nvcc -std=c++17 -c topk_cuda.cu
//
// A block of threads takes TR rows and goes through the codes, 128 at a time; 16 of the d dimensions at a time pass
// through shared memory, and every thread sums 8 rows x 8 codes in registers, from where scores are compared and never
// stored. k = 1: each thread keeps the best that it saw, and the 16 threads of a row compare at the end. k > 1: what
// exceeds a row's k-th best joins the row's list in shared memory, which is cut back to k when it might overflow.
#include "topk.h"

#ifndef LAUNCH  // tests/test_cuda.py runs these kernels on a CPU, and defines it first
#define LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, (cudaStream_t)stream>>>(__VA_ARGS__)
#endif

namespace minicode {
namespace {
constexpr int TC = 128, DEPTH = 16, LIST = 48, MOST = 32;  // codes, dimensions at a time; length of a list, largest k

__device__ bool better(float score, int id, float other_score, int other_id) {
  return score > other_score || (score == other_score && id < other_id);
}

// Puts the best k of a list first, in order, and the score that the next must exceed into `floor`.
__device__ void cut(float* scores, int* ids, int& count, int k, float& floor) {
  int kept = 0;
  for (int i = 0; i < count; i++) {
    const float score = scores[i];
    const int id = ids[i];
    if (kept == k && !better(score, id, scores[k - 1], ids[k - 1])) continue;
    int at = kept < k ? kept++ : k - 1;
    for (; at > 0 && better(score, id, scores[at - 1], ids[at - 1]); at--) scores[at] = scores[at - 1], ids[at] = ids[at - 1];
    scores[at] = score, ids[at] = id;
  }
  count = kept;
  if (kept == k) floor = scores[k - 1];
}

// Copies DEPTH dimensions from p on of up to n rows to tile[dimension][row]; what is missing is 0.
template <int ROWS>
__device__ void fetch(float (*tile)[ROWS + 4], const float* from, int64_t stride, int64_t n, int64_t p, int64_t d) {
  for (int i = threadIdx.x; i < ROWS * DEPTH; i += blockDim.x) {
    const int row = i / DEPTH, q = i % DEPTH;
    tile[q][row] = row < n && p + q < d ? from[row * stride + p + q] : 0.0f;
  }
}

template <int TR, bool ONE>
__global__ void search_tiles(Search s, const float* scales, const float* offsets) {
  __shared__ __align__(16) float rows[DEPTH][TR + 4], codes[DEPTH][TC + 4];
  __shared__ float list_scores[TR][ONE ? 16 : LIST], floors[TR];
  __shared__ int list_ids[TR][ONE ? 16 : LIST], counts[TR];
  const int64_t group = blockIdx.y, first = int64_t(blockIdx.x) * TR;
  const float *x = s.x + group * s.x_group + first * s.x_row, *table = s.codes + group * s.n_codes * s.dim;
  const float *scale = scales + group * s.n_codes, *offset = offsets + group * s.n_codes;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, k = int(s.k);  // codes tx + 16 j, rows 8 ty + i
  float best[8];
  int winner[8] = {};
  for (int i = 0; i < 8; i++) best[i] = -INFINITY;
  for (int r = threadIdx.x; r < TR; r += blockDim.x) floors[r] = -INFINITY, counts[r] = 0;

  for (int64_t start = 0; start < s.n_codes; start += TC) {
    float sum[8][8] = {};
    for (int64_t p = 0; p < s.dim; p += DEPTH) {
      __syncthreads();
      fetch<TR>(rows, x, s.x_row, s.n_rows - first, p, s.dim);
      fetch<TC>(codes, table + start * s.dim, s.dim, s.n_codes - start, p, s.dim);
      __syncthreads();
#pragma unroll
      for (int q = 0; q < DEPTH; q++) {
        float a[8], b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = rows[q][ty * 8 + i], b[i] = codes[q][tx + 16 * i];
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < 8; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {  // 16 codes at a time, in the order of their ids: of equals the first stays
      const int64_t id = start + tx + 16 * j;
      bool full = false;
      if (id < s.n_codes) {
        const float by = scale[id], plus = offset[id];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float score = fmaf(sum[i][j], by, plus);
          if (ONE) {
            if (score > best[i]) best[i] = score, winner[i] = int(id);
          } else if (score > floors[ty * 8 + i]) {
            const int at = atomicAdd(&counts[ty * 8 + i], 1);
            list_scores[ty * 8 + i][at] = score, list_ids[ty * 8 + i][at] = int(id);
            full |= at >= LIST - 16;
          }
        }
      }
      if (!ONE && __syncthreads_or(full)) {
        for (int r = threadIdx.x; r < TR; r += blockDim.x)
          if (counts[r] > LIST - 16) cut(list_scores[r], list_ids[r], counts[r], k, floors[r]);
        __syncthreads();
      }
    }
  }
  for (int i = 0; ONE && i < 8; i++) list_scores[ty * 8 + i][tx] = best[i], list_ids[ty * 8 + i][tx] = winner[i];
  __syncthreads();
  for (int r = threadIdx.x; r < TR && first + r < s.n_rows; r += blockDim.x) {
    if (ONE) counts[r] = 16;
    cut(list_scores[r], list_ids[r], counts[r], k, floors[r]);
    const int64_t at = (group * s.n_rows + first + r) * s.k;
    for (int i = 0, next = 0; i < k; i++) {  // what is missing scored -inf or NaN: the lowest ids not in the list
      for (int j = 0; i >= counts[r] && j < counts[r]; j++)
        if (list_ids[r][j] == next) next++, j = -1;
      s.scores[at + i] = i < counts[r] ? list_scores[r][i] : -INFINITY;
      s.ids[at + i] = i < counts[r] ? list_ids[r][i] : next++;
    }
  }
}

}  // namespace

bool topk_cuda(const Search& s, const float* scale, const float* offset, void* stream) {
  if (s.k > MOST || s.n_groups > 65535) return false;
  if (s.n_rows * s.n_groups == 0) return true;
  const auto blocks = [&](int64_t rows) { return dim3((s.n_rows + rows - 1) / rows, s.n_groups); };
  if (s.k == 1) LAUNCH((search_tiles<128, true>), blocks(128), 256, stream, s, scale, offset);
  else LAUNCH((search_tiles<64, false>), blocks(64), 128, stream, s, scale, offset);
  return true;
}
}  // namespace minicode
