// The search on a GPU, in float32, for k up to 32. Compiles alone: nvcc -std=c++17 -c topk_cuda.cu
//
// A block of threads takes TR rows and goes through the codes, 128 at a time; a few of the d dimensions at a time pass
// through shared memory, the next being copied meanwhile, and every thread sums 8 rows x 8 codes in registers, from where
// scores are compared and never stored. k = 1: each thread keeps the best that it saw, and the 16 threads of a row
// compare at the end. k > 1: what reaches a row's k-th best joins the row's list in shared memory, which is cut back to
// k when it might overflow.
#include "topk_cuda.cuh"

#include <cfloat>

namespace minicode {
namespace {
constexpr int TC = 128, LIST = 48, MOST = 32;  // codes at a time; length of a list, largest k

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

// Begins to copy DEPTH dimensions from p on of up to n rows to tile[dimension][row]; what is missing is 0.
template <int DEPTH, int ROWS, int THREADS>
__device__ void fetch(float (*tile)[ROWS + 4], const float* from, int64_t stride, int64_t n, int p, int d) {
  const int q = threadIdx.x % DEPTH, row = threadIdx.x / DEPTH, step = THREADS / DEPTH;
  const int there = p + q < d ? int(min(n, int64_t(ROWS))) : 0;
  from += row * stride + p + q;
#pragma unroll
  for (int i = 0; i < ROWS; i += step, from += step * stride) begin_copy<4>(&tile[q][row + i], from, row + i < there);
}

// candidates: how many the coarse pass found for each row, if there was one; only rows with too few are searched.
template <int TR, bool ONE>
__global__ void __launch_bounds__(2 * TR, 256 / TR)
search_tiles(Search s, const float* scales, const float* offsets, const int* candidates) {
  constexpr int DEPTH = ONE ? 16 : 8;
  __shared__ __align__(16) float rows[2][DEPTH][TR + 4], codes[2][DEPTH][TC + 4];
  __shared__ float list_scores[TR][ONE ? 2 : LIST], floors[TR];
  __shared__ int list_ids[TR][ONE ? 2 : LIST], counts[TR];
  const int64_t group = blockIdx.y, first = int64_t(blockIdx.x) * TR;
  const float *x = s.x + group * s.x_group + first * s.x_row, *table = s.codes + group * s.n_codes * s.dim;
  const float *scale = scales + group * s.n_codes, *offset = offsets + group * s.n_codes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = int(s.k), d = int(s.dim);
  // Rows 8 ty + i; codes 4 tx + j, 64 + 4 tx + j. Neighbours share codes, and so one access to shared memory serves both.
  const int tx = lane % 16 / 2 + warp % 2 * 8, ty = lane % 2 + lane / 16 * 2 + warp / 2 * 4;
  float best[8];
  int winner[8] = {};
  for (int i = 0; i < 8; i++) best[i] = -INFINITY;
  const auto wanted = [&](int r) {
    return r < TR && first + r < s.n_rows && (!candidates || candidates[group * s.n_rows + first + r] < k);
  };
  if (!__syncthreads_or(wanted(threadIdx.x))) return;
  if (threadIdx.x < TR) floors[threadIdx.x] = -FLT_MAX, counts[threadIdx.x] = 0;

  const auto fetch_both = [&](int into, int64_t start, int p) {
    fetch<DEPTH, TR, 2 * TR>(rows[into], x, s.x_row, s.n_rows - first, p, d);
    fetch<DEPTH, TC, 2 * TR>(codes[into], table + start * d, d, s.n_codes - start, p, d);
  };
  int now = 0;
  fetch_both(now, 0, 0);
  for (int64_t start = 0; start < s.n_codes; start += TC) {
    float sum[8][8] = {};
    for (int p = 0; p < d; p += DEPTH, now ^= 1) {
      finish_copies();
      __syncthreads();
      const bool more = p + DEPTH < d;
      fetch_both(now ^ 1, more ? start : start + TC, more ? p + DEPTH : 0);
#pragma unroll
      for (int q = 0; q < DEPTH; q++) {
        float a[8], b[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          *(float4*)&a[i] = *(const float4*)&rows[now][q][ty * 8 + i];
          *(float4*)&b[i] = *(const float4*)&codes[now][q][tx * 4 + i * 16];
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int j = 0; j < 8; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {  // 16 codes at a time
      const int64_t id = start + tx * 4 + j % 4 + j / 4 * 64;
      bool full = false;
      if (id < s.n_codes) {
        const float by = scale[id], plus = offset[id];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float score = fmaf(sum[i][j], by, plus);
          if (ONE) {
            if (score > best[i]) best[i] = score, winner[i] = int(id);  // of equals the first stays
          } else if (score >= floors[ty * 8 + i]) {
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
  finish_copies();
  for (int i = 0; ONE && i < 8; i++) {  // the best of 8 threads, in each of two warps
    for (int other = 2; other < 16; other *= 2) {
      const float score = __shfl_xor_sync(~0u, best[i], other);
      const int id = __shfl_xor_sync(~0u, winner[i], other);
      if (better(score, id, best[i], winner[i])) best[i] = score, winner[i] = id;
    }
    list_scores[ty * 8 + i][warp % 2] = best[i], list_ids[ty * 8 + i][warp % 2] = winner[i];
  }
  __syncthreads();
  if (const int r = threadIdx.x; wanted(r)) {
    if (ONE) counts[r] = 2;
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

bool topk_cuda(const Search& s, const float* scale, const float* offset, const CoarsePass& pass, void* stream) {
  if (s.k > MOST || s.n_groups > 65535) return false;
  if (s.n_rows * s.n_groups == 0) return true;
  if (pass.counts) topk_coarse(s, scale, offset, pass, stream);
  if (s.k == 1) LAUNCH((search_tiles<128, true>), blocks(s, 128), 256, stream, s, scale, offset, pass.counts);
  else LAUNCH((search_tiles<64, false>), blocks(s, 64), 128, stream, s, scale, offset, pass.counts);
  return true;
}
}  // namespace minicode
