// What the searches of topk_cpu.cpp and topk_coarse.cpp share: vectors, lists of candidates, the codes' scales.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "topk.h"
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#endif

namespace minicode {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16, NV = 2, NC = 12;  // floats in a vector, vectors of rows, codes: 24 sums in 32 registers
#elif defined(__AVX__)
constexpr int W = 8, NV = 2, NC = 6;
#else
constexpr int W = 4, NV = 2, NC = 6;
#endif
constexpr int R = NV * W;  // rows in a panel
constexpr float inf = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vf_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vf load(const float* from) { return *(const vf_anywhere*)from; }

inline uint32_t bits(vi mask) {  // one bit for each lane that is -1
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#else
  uint32_t out = 0;
  for (int i = 0; i < W; i++) out |= (mask[i] & 1u) << i;
  return out;
#endif
}

// A candidate is one number, the greater the better: the bits of its score, made to rank as integers do, above the
// complement of its id.
using Candidate = int64_t;
inline int32_t ranked(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }  // its own inverse
inline Candidate candidate(float score, int32_t id) {
  return int64_t(ranked(std::bit_cast<int32_t>(score + 0.0f))) << 32 | uint32_t(~id);  // + 0: -0 ranks as 0 does
}
inline float score_of(Candidate c) { return std::bit_cast<float>(ranked(c >> 32)); }
inline int32_t id_of(Candidate c) { return ~int32_t(c); }

// The k-th greatest of n different numbers, by halving the interval that it lies in: no branch depends on a number.
inline Candidate kth(const Candidate* list, int64_t n, int64_t k) {
  Candidate low = *std::min_element(list, list + n), high = *std::max_element(list, list + n);
  while (low < high) {
    const Candidate middle = high - int64_t((uint64_t(high) - uint64_t(low)) / 2);
    int64_t count = 0;
    Candidate least = high;
    for (int64_t i = 0; i < n; i++) {
      count += list[i] >= middle;
      least = std::min(least, list[i] >= middle ? list[i] : high);
    }
    if (count == k) return least;
    if (count > k) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Keeps, in their order, the k best of a list and what lies less than `slack` below them; k or fewer stay as they are.
// Returns what the next must exceed.
inline float cut(Candidate* list, int64_t& size, int64_t k, float slack) {
  if (size < k) return -inf;
  const Candidate last = kth(list, size, k);
  const float floor = score_of(last) - slack;
  const Candidate above = std::min(last - 1, candidate(floor, 0));
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i++) {
    const Candidate c = list[i];
    list[kept] = c;
    kept += c > above;
  }
  size = kept;
  return floor;
}

// The best k of the codes offered so far, and a few more.
struct Best {
  Candidate* list;
  int64_t size = 0;

  static int64_t capacity(int64_t k) { return 2 * k + 14; }
  static std::vector<Best> make(int64_t n, int64_t k, std::vector<Candidate>& room) {
    room.resize(n * capacity(k));
    std::vector<Best> all(n);
    for (int64_t i = 0; i < n; i++) all[i].list = &room[i * capacity(k)];
    return all;
  }
  void add(float score, int32_t id, int64_t k, float& floor) {  // floor: what the next must exceed
    list[size++] = candidate(score, id);
    if (size == capacity(k)) floor = cut(list, size, k, 0);
  }
  // Writes the k best in order. What is missing scored -inf or NaN: the lowest ids that are not here.
  void write(int64_t k, float* scores, int64_t* ids) {
    cut(list, size, k, 0);
    std::sort(list, list + size, std::greater<>());
    for (int64_t i = 0; i < size; i++) scores[i] = score_of(list[i]), ids[i] = id_of(list[i]);
    for (int64_t i = size, next = 0; i < k; i++, next++) {
      while (std::find(ids, ids + size, next) != ids + size) next++;
      scores[i] = -inf, ids[i] = next;
    }
  }
};

inline float dot_product(const float* a, const float* b, int64_t d) {
  vf sums[4] = {};
  int64_t p = 0;
  for (; p + 4 * W <= d; p += 4 * W)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] += load(a + p + i * W) * load(b + p + i * W);
  const vf sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  float total = _mm512_reduce_add_ps((__m512)sum);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += sum[i];
#endif
  for (; p < d; p++) total += a[p] * b[p];
  return total;
}

// See scale_and_offset in minicode/topk.py. In float32, but for lengths whose squares it can't hold.
inline void scale_and_offset(const float* code, int64_t d, Similarity similarity, float& scale, float& offset) {
  double square = similarity == dot ? 1 : dot_product(code, code, d);
  if (!(square > 1e-30 && square < 1e30)) {
    square = 0;
    for (int64_t p = 0; p < d; p++) square += double(code[p]) * code[p];
  }
  const double norm = std::sqrt(square);
  scale = similarity != cosine ? 1 : norm < std::numeric_limits<float>::min() ? 0 : float(1 / norm);
  offset = similarity == distance ? float(-0.5 * square) : 0;
}

struct Table {  // the scale and the offset of every code of every group, (G, C)
  std::vector<float> scale, offset;
  Table(const Search& s, const Parallel& parallel) : scale(s.n_groups * s.n_codes), offset(scale.size()) {
    parallel(scale.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) scale_and_offset(s.codes + i * s.dim, s.dim, s.similarity, scale[i], offset[i]);
    });
  }
};

// Rows rows[0..n) of group g, in float32.
void search_rows(const Search& s, const Table& table, int64_t g, const int64_t* rows, int64_t n);

// What searches rows start..start + n of group g, in bfloat16 first; empty where this CPU or this search is not fit.
using Coarse = std::function<void(int64_t g, int64_t start, int64_t n)>;
Coarse coarse_search(const Search& s, const Table& table, const Parallel& parallel);
bool coarse_ready();
}  // namespace minicode
