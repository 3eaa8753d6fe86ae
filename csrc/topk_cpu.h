// What the searches of topk_cpu.cpp and topk_coarse.cpp share: vectors, lists of candidates, the codes' scales.
#pragma once
#include <algorithm>
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

struct Candidate {
  float score;
  int32_t id;
};
inline bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// The best k of the codes offered so far, in any order, and a few more.
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
  float add(float score, int32_t id, int64_t k, float floor) {  // returns what the next must exceed
    list[size++] = {score, id};
    if (size < capacity(k)) return floor;
    std::nth_element(list, list + k - 1, list + size, better);
    size = k;
    return list[k - 1].score;
  }
  // Writes the k best in order. What is missing scored -inf or NaN: the lowest ids that are not here.
  void write(int64_t k, float* scores, int64_t* ids) {
    int64_t n = std::min(size, k), next = 0;
    std::partial_sort(list, list + n, list + size, better);
    for (int64_t i = 0; i < n; i++) scores[i] = list[i].score, ids[i] = list[i].id;
    for (int64_t i = n; i < k; i++, next++) {
      while (std::find(ids, ids + n, next) != ids + n) next++;
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
  scale = similarity != cosine ? 1 : square < 1.4e-76 ? 0 : float(1 / std::sqrt(square));  // norm below FLT_MIN
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
