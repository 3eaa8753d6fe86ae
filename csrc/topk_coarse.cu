// The search on a GPU that has bfloat16 tensor cores (sm_80 and later): every code is scored in bfloat16; the codes
// within twice the error bound of the k-th best are scored again in float32, as search_tiles would, with the same
// bits. Rows with too many such codes, or that are not finite, are left to search_tiles.
//
// The bound is that of topk_coarse.cpp, computed in minicode/runtime/gpu.py, but tensor cores round worse: they add 4 to 16
// products to the sum at once, each cut off at the last bit of the largest, and cut off the result. That is up to
// 1.5 d 2^-23 of the sizes that enter, all else d 2^-24; the bound allows for (d + 16) 2^-22.
//
// A block of 4 warps takes 128 rows and goes through the codes, 128 at a time; 32 dimensions at a time pass through shared
// memory, the next 32 being copied meanwhile. Each warp has 32 of the rows to itself: nobody else waits when it compares
// their scores, in the registers that they are summed in.
#include "topk_cuda.cuh"

namespace minicode {
namespace {
constexpr int ROWS = 128, CODES = 128, STEP = 32;              // rows, codes, dimensions at a time
constexpr int CAPACITY = CoarsePass::capacity, ROOM = 32;      // of a row's list, of which free for what comes at once
constexpr unsigned ALL = ~0u;                                  // threads of a warp

// A score and an id as one number: a higher score is larger, of equal scores the lower id.
__device__ uint64_t pack(float score, int id) {
  const int bits = __float_as_int(score + 0.0f);  // no -0
  return uint64_t(unsigned(bits ^ (bits >> 31 | INT_MIN))) << 32 | unsigned(~id);
}
__device__ float score_of(unsigned high) { return __int_as_float(high >> 31 ? high ^ 0x80000000u : ~high); }

// Keeps, of a row's list, what can still be among the k best; a list that stays full gives its row up. The whole warp.
template <bool ONE>
__device__ __noinline__ void shrink(uint64_t* list, int& count, float& floor, float twice_bound, int k) {
  const int lane = threadIdx.x % 32, n = count;
  uint64_t entry[CAPACITY / 32];
  for (int i = 0; i < CAPACITY / 32; i++) entry[i] = lane + 32 * i < n ? list[lane + 32 * i] : 0;
  float least = floor;
  if (!ONE && n >= k) {
    unsigned kth = 0;  // score, found bit by bit
    for (unsigned bit = 1u << 31; bit; bit >>= 1) {
      int reach = 0;
      for (int i = 0; i < CAPACITY / 32; i++) reach += __popc(__ballot_sync(ALL, unsigned(entry[i] >> 32) >= (kth | bit)));
      if (reach >= k) kth |= bit;
    }
    least = fmaxf(least, score_of(kth) - twice_bound);
  }
  int kept = 0;
  for (int i = 0; i < CAPACITY / 32; i++) {
    const bool stays = entry[i] && score_of(entry[i] >> 32) > least;
    const unsigned stay = __ballot_sync(ALL, stays);
    if (stays) list[kept + __popc(stay & ((1u << lane) - 1))] = entry[i];
    kept += __popc(stay);
  }
  if (kept > CAPACITY - ROOM) kept = 0, least = INFINITY;
  if (lane == 0) count = kept, floor = least;
  __syncwarp();
}

// Begins to copy STEP dimensions from p on of up to n rows; what is missing is 0.
__device__ void fetch(uint16_t (*tile)[STEP + 8], const uint16_t* from, int64_t depth, int64_t n, int64_t p) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = threadIdx.x / 4 + 32 * i, q = threadIdx.x % 4 * 8;
    begin_copy<16>(&tile[row][q], from + row * depth + p + q, row < n);
  }
}

template <bool ONE>
__global__ void __launch_bounds__(128, 2) score_in_bfloat16(Search s, CoarsePass pass) {
  __shared__ __align__(16) uint16_t rows[2][ROWS][STEP + 8], codes[2][CODES][STEP + 8];
  __shared__ float floors[ROWS], bounds[ROWS];
  __shared__ int counts[ROWS];
  const int64_t group = blockIdx.y, first = group * s.n_rows + int64_t(blockIdx.x) * ROWS, n = (group + 1) * s.n_rows - first;
  const uint16_t *x = pass.x + first * pass.depth, *table = pass.codes + group * pass.width * pass.depth;
  const float* offset = pass.offset + group * pass.width;
  const int lane = threadIdx.x % 32, top_row = threadIdx.x - lane, quad = lane / 4, t = lane % 4, k = int(s.k);
  bounds[threadIdx.x] = threadIdx.x < n ? pass.twice_bound[first + threadIdx.x] : INFINITY;
  floors[threadIdx.x] = bounds[threadIdx.x] < 1e30f ? -INFINITY : INFINITY;  // too large for float32, or not a number
  counts[threadIdx.x] = 0;
  __syncwarp();
  float floor[4], bound[4];  // of the thread's rows, top_row + quad + 8 i
  for (int i = 0; i < 4; i++) floor[i] = floors[top_row + quad + 8 * i], bound[i] = bounds[top_row + quad + 8 * i];

  const auto fetch_both = [&](int into, int64_t start, int64_t p) {
    fetch(rows[into], x, pass.depth, n, p);
    fetch(codes[into], table + start * pass.depth, pass.depth, pass.width - start, p);
  };
  int now = 0;
  fetch_both(now, 0, 0);
  for (int64_t start = 0; start < pass.width; start += CODES) {
    float sum[2][16][4];  // row quad + 16 m + 8 (i / 2), code 8 j + 2 t + i % 2
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float2 plus = *(const float2*)&offset[start + 8 * j + 2 * t];
#pragma unroll
      for (int i = 0; i < 4; i++) sum[0][j][i] = sum[1][j][i] = i % 2 ? plus.y : plus.x;
    }
    for (int64_t p = 0; p < pass.depth; p += STEP, now ^= 1) {
      finish_copies();
      __syncthreads();
      const bool more = p + STEP < pass.depth;
      fetch_both(now ^ 1, more ? start : start + CODES, more ? p + STEP : 0);
#pragma unroll
      for (int q = 0; q < STEP; q += 16) {
        uint32_t a[2][4], b[4];
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrices(a[m], &rows[now][top_row + 16 * m + lane % 16][q + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
          load_matrices(b, &codes[now][8 * j + lane / 16 * 8 + lane % 8][q + lane / 8 % 2 * 8]);
#pragma unroll
          for (int i = 0; i < 4; i++) multiply(sum[i % 2][j + i / 2], a[i % 2], b[i / 2 * 2], b[i / 2 * 2 + 1]);
        }
      }
    }
    float best[4][4];  // of each of the thread's rows, of each quarter of the codes
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int part = 0; part < 4; part++) {
        best[i][part] = -INFINITY;
#pragma unroll
        for (int j = 0; j < 8; j++) best[i][part] = fmaxf(best[i][part], sum[i / 2][part * 4 + j / 2][i % 2 * 2 + j % 2]);
      }
      if (ONE) {
        float top = fmaxf(fmaxf(best[i][0], best[i][1]), fmaxf(best[i][2], best[i][3]));
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
        floor[i] = fmaxf(floor[i], top - bound[i]);
        if (t == 0) floors[top_row + quad + 8 * i] = floor[i];
      }
    }
#pragma unroll
    for (int part = 0; part < 4; part++) {
      bool full = false;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (!(best[i][part] > floor[i])) continue;
        const int row = top_row + quad + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const float score = sum[i / 2][part * 4 + j / 2][i % 2 * 2 + j % 2];
          if (!(score > floor[i])) continue;
          const int at = atomicAdd(&counts[row], 1);
          pass.lists[(first + row) * CAPACITY + at] = pack(score, int(start) + part * 32 + j / 2 * 8 + 2 * t + j % 2);
          full |= at >= CAPACITY - ROOM;
        }
      }
      if (!__any_sync(ALL, full)) continue;
      __syncwarp();
      for (int r = top_row; r < top_row + 32; r++)
        if (counts[r] > CAPACITY - ROOM) shrink<ONE>(pass.lists + (first + r) * CAPACITY, counts[r], floors[r], bounds[r], k);
      __syncwarp();  // nobody adds to a list before all have seen how long it was
      for (int i = 0; i < 4; i++) floor[i] = floors[top_row + quad + 8 * i];
    }
  }
  finish_copies();
  __syncwarp();
  for (int r = top_row; r < top_row + 32 && r < n; r++)
    shrink<ONE>(pass.lists + (first + r) * CAPACITY, counts[r], floors[r], bounds[r], k);
  if (threadIdx.x < n) pass.counts[first + threadIdx.x] = counts[threadIdx.x];
}

// A warp for each row: its candidates in float32, summed in the order of search_tiles, hence with the same bits.
__global__ void rescore(Search s, const float* scales, const float* offsets, CoarsePass pass) {
  const int lane = threadIdx.x % 32;
  const int64_t group = blockIdx.y, row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32, at = group * s.n_rows + row;
  if (row >= s.n_rows || pass.counts[at] < s.k) return;
  const int n = pass.counts[at];
  uint64_t* list = pass.lists + at * CAPACITY;
  const float* x = s.x + group * s.x_group + row * s.x_row;
  for (int i = lane; i < n; i += 32) {
    const int id = ~unsigned(list[i]);
    const int64_t c = group * s.n_codes + id;
    float sum = 0;
    for (int64_t p = 0; p < s.dim; p++) sum = fmaf(x[p], s.codes[c * s.dim + p], sum);
    list[i] = pack(fmaf(sum, scales[c], offsets[c]), id);
  }
  __syncwarp();
  for (int i = lane; i < n; i += 32) {
    int rank = 0;
    for (int j = 0; j < n; j++) rank += list[j] > list[i];
    if (rank < s.k) s.scores[at * s.k + rank] = score_of(list[i] >> 32), s.ids[at * s.k + rank] = int(~unsigned(list[i]));
  }
}
}  // namespace

void topk_coarse(const Search& s, const float* scale, const float* offset, const CoarsePass& pass, void* stream) {
  if (s.k == 1) LAUNCH(score_in_bfloat16<true>, blocks(s, ROWS), 128, stream, s, pass);
  else LAUNCH(score_in_bfloat16<false>, blocks(s, ROWS), 128, stream, s, pass);
  LAUNCH(rescore, blocks(s, 8), 256, stream, s, scale, offset, pass);
}
}  // namespace minicode
