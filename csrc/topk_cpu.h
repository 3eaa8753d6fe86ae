// What the searches of topk_cpu.cpp and topk_coarse.cpp share: vectors, a tile of products, and the codes' scales.
//
// A tile: R rows lie side by side in vector registers, against NC codes, one number of each at a time. The sums, and
// the scores that they become, stay in registers until they are compared with what their rows have.
//
//                      numbers p of R rows
//                       x0  x1  x2 ... xR
//     numbers p   c0     .   .   .      .
//     of NC       c1     .   .   .      .      NC x NV vectors of sums, W rows in each
//     codes       ...
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "topk.h"
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace minicode {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16, NV = 2, NC = 12;  // floats in a vector, vectors of rows, codes: 24 sums in 32 registers
#elif defined(__AVX__)
constexpr int W = 8, NV = 2, NC = 6;
#elif defined(__aarch64__)
constexpr int W = 4, NV = 2, NC = 12;
#else
constexpr int W = 4, NV = 2, NC = 6;
#endif
constexpr int R = NV * W;  // rows in a panel
inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr float inf = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vf_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vf load(const float* from) { return *(const vf_anywhere*)from; }
inline vi load(const int32_t* from) { return *(const vi_anywhere*)from; }

inline uint32_t exceed(vf a, vf b) {  // one bit for each lane in which a > b
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)(a > b));
#else
  const vi above = a > b;
  uint32_t out = 0;
  for (int i = 0; i < W; i++) out |= (above[i] & 1u) << i;
  return out;
#endif
}

// The sums of a tile: codes[0][code], which they begin with, and rows[p][row] times codes[1 + p][code]. A function of its
// own: inlined, the compiler keeps registers for what surrounds it, and the sums on the stack.
template <class Arithmetic, class Vector, class Number, size_t n_codes>
[[gnu::noinline]] void multiply_tile(const Number* rows, const Number* codes, int64_t depth, Vector (&out)[n_codes][NV]) {
  Vector sums[n_codes][NV];
#pragma GCC unroll 12
  for (size_t c = 0; c < n_codes; c++) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[c][v] = (Vector)(vi{} + std::bit_cast<int32_t>(codes[c]));
  }
  for (int64_t p = 0; p < depth; p++, rows += R) {
    codes += n_codes;
    Vector numbers[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) numbers[v] = (Vector)load(rows + v * W);
#pragma GCC unroll 12
    for (size_t c = 0; c < n_codes; c++) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sums[c][v] = Arithmetic::add_product(sums[c][v], numbers[v], codes[c]);
    }
  }
#pragma GCC unroll 12
  for (size_t c = 0; c < n_codes; c++) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) out[c][v] = sums[c][v];
  }
}

inline float dot_product(const float* a, const float* b, int64_t d) {
  vf sums[4] = {};
  int64_t p = 0;
  for (; p + 4 * W <= d; p += 4 * W)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] += load(a + p + i * W) * load(b + p + i * W);
  for (; p + W <= d; p += W) sums[0] += load(a + p) * load(b + p);
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

// The length of d numbers whose squares may all underflow, or where denormals are switched off are taken for 0.
inline float underflow(int64_t d) { return 1.1e-19f * std::sqrt(float(d)); }

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

struct Float32 {
  static vf add_product(vf sum, vf rows, float code) { return sum + rows * code; }
};

// Codes as multiply_tile takes them, n_codes of them in a tile, for what scores in units of 4 bytes.
template <class Arithmetic, class Vector, int n_codes = NC>
struct InPanels {
  using Sums = Vector[n_codes][NV];
  static constexpr int codes_of_tile = n_codes;

  static int64_t room(int64_t codes, int64_t n_units) { return codes * (n_units + 1); }
  static void put_code(int64_t code, const int32_t* units, int64_t n_units, int32_t* packed) {  // [C / n_codes][1 + units][n_codes]
    packed += room(code - code % n_codes, n_units) + code % n_codes;
    *packed = Arithmetic::begins_with(units, n_units);
    for (int64_t p = 0; p < n_units; p++) packed[(1 + p) * n_codes] = units[p];
  }
  static void begin() {}
  static void end() {}
  static void multiply(const int32_t* rows, const int32_t* codes, int64_t n_units, Sums& sums) {
    multiply_tile<Arithmetic>(rows, codes, n_units, sums);
  }
};

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

// What searches rows start..start + n of group g, coarsely first; empty where this CPU or this search is not fit.
using Coarse = std::function<void(int64_t g, int64_t start, int64_t n)>;
Coarse coarse_search(const Search& s, const Table& table, const Parallel& parallel);
const char* coarse_path();  // how it scores, for people; null where it can't
}  // namespace minicode
