// Rows and codes as integers of 8 or 16 bits, for topk_coarse.cpp: whole steps, of a length chosen for each row and each
// code. One instruction adds the products of a unit, four bytes or two words, to each lane of a sum. That for bytes wants
// one factor without a sign: the rows' are moved up by `zero`, and the sums begin with what that adds to them.
//
//     x'[p]  ~  step_x (a[p] - zero)              a a a a | a a a a | ...      a unit of each of R rows, side by side
//     c'[p]  ~  step_c b[p]                       b b b b | b b b b | ...
//     x'·c'  ~  step_x step_c (a·b - zero sum(b))
#pragma once
#include "topk_cpu.h"

#if defined(__AVX512VNNI__) && defined(__AVX512DQ__)
#define MINICODE_VNNI(instruction) _mm512_##instruction##_epi32
using whole_vector = __m512i;
#elif defined(__AVXVNNI__) && !defined(__AVX512DQ__)
#define MINICODE_VNNI(instruction) _mm256_##instruction##_avx_epi32
using whole_vector = __m256i;
#endif

#if defined(MINICODE_VNNI) || (defined(__AVX2__) && !defined(__AVX512DQ__)) || defined(__ARM_FEATURE_DOTPROD)
#define MINICODE_BYTES

namespace minicode {
// v in whole steps, which are put into `units`, and what they stand for.
template <class Number>
void round_to_steps(const float* v, int64_t depth, float step, int zero, int32_t* units, float* rounded) {
  typedef Number numbers __attribute__((vector_size(W * sizeof(Number)), aligned(1), may_alias));
  const float per_step = 1 / step, shift = 3 << 22;  // what is moved up by it and down again is a whole number
  for (int64_t p = 0; p < depth; p += W) {
    const vf steps = (load(v + p) * per_step + shift) - shift;
    *(vf_anywhere*)(rounded + p) = steps * step;
    *(numbers*)((Number*)units + p) = __builtin_convertvector(__builtin_convertvector(steps, vi) + zero, numbers);
  }
}

inline float largest_of(const float* v, int64_t depth) {
  vf largest = {};
  for (int64_t p = 0; p < depth; p += W) {
    const vf some = load(v + p), size = some < 0 ? -some : some;
    largest = size > largest ? size : largest;
  }
  return *std::max_element((float*)&largest, (float*)&largest + W);
}

#if defined(MINICODE_VNNI) || !defined(__AVX2__)
constexpr int codes_of_bytes = NC;
#else
constexpr int codes_of_bytes = NC - 1;  // it takes three instructions, and two more registers
#endif

struct Bytes : InPanels<Bytes, vi, codes_of_bytes> {
#if defined(MINICODE_VNNI)
  static constexpr int most_of_rows = 127, zero = 128;
  static constexpr const char* path = "bytes (VNNI)";
#elif defined(__AVX2__)
  static constexpr int most_of_rows = 63, zero = 64;  // two products are added in 16 bits, which rows of 7 bits fit
  static constexpr const char* path = "bytes (AVX2)";
#else
  static constexpr int most_of_rows = 127, zero = 0;
  static constexpr const char* path = "bytes (dot products of Arm)";
#endif
  static constexpr int in_unit = 4, depth_of_tile = W;
  static constexpr int64_t deepest = 1 << 15;  // the sums fit into 32 bits

  static vi add_product(vi sum, vi rows, int32_t code) {
    const vi codes = vi{} + code;
#if defined(MINICODE_VNNI)
    return (vi)MINICODE_VNNI(dpbusd)((whole_vector)sum, (whole_vector)rows, (whole_vector)codes);
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)rows, (__m256i)codes);
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)rows, (int8x16_t)codes);
#endif
  }
  static float round(const float* v, int64_t depth, bool of_row, int32_t* units, float* rounded) {
    const float step = std::max(largest_of(v, depth), 1e-30f) / (of_row ? most_of_rows : 127);
    round_to_steps<uint8_t>(v, depth, step, of_row ? zero : 0, units, rounded);
    return step;
  }
  static int32_t begins_with(const int32_t* units, int64_t n_units) {
    int32_t sum = 0;
    for (int64_t p = 0; p < 4 * n_units; p++) sum += ((const int8_t*)units)[p];
    return -zero * sum;
  }
};
}  // namespace minicode
#endif

#if defined(MINICODE_VNNI)
#define MINICODE_WORDS
namespace minicode {
struct Words : InPanels<Words, vi> {
  static constexpr int in_unit = 2, depth_of_tile = W;
  static constexpr int64_t deepest = 1 << 18;

  static vi add_product(vi sum, vi rows, int32_t code) {
    return (vi)MINICODE_VNNI(dpwssd)((whole_vector)sum, (whole_vector)rows, (whole_vector)(vi{} + code));
  }
  // No vector is longer than 46,000 steps, half a step for each number that was rounded included: two of them give a
  // product below 2^31.
  static float round(const float* v, int64_t depth, bool, int32_t* units, float* rounded) {
    const float length = std::sqrt(dot_product(v, v, depth)) + underflow(depth), largest = largest_of(v, depth);
    const float step = std::max({length / (46000 - 0.5f * std::sqrt(float(depth))), largest / 32767, 1e-30f});
    round_to_steps<uint16_t>(v, depth, step, 0, units, rounded);
    return step;
  }
  static int32_t begins_with(const int32_t*, int64_t) { return 0; }
};
}  // namespace minicode
#endif
