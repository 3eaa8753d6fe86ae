// The peak that shares of are reported: the arithmetic of a tile, over and over, with all that it needs in registers.
#include <chrono>

#include "coarse_integers.h"

#if defined(__x86_64__)
#define ANEW(vector) asm volatile("" : "+x"(vector))  // nothing, but the compiler can't know: it computes again what it had
#elif defined(__aarch64__)
#define ANEW(vector) asm volatile("" : "+w"(vector))
#else
#define ANEW(vector)
#endif

namespace minicode {
namespace {
template <class Arithmetic, class Vector, class Number>
[[gnu::noinline]] Vector add_products(Number number, int64_t times) {
  Vector sums[NC][NV], rows = Vector{} + number, total = {};
  for (int c = 0; c < NC; c++)
    for (int v = 0; v < NV; v++) sums[c][v] = rows + Number(c * NV + v);
  for (int64_t i = 0; i < times; i++) {
#pragma GCC unroll 12
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        ANEW(rows);
        sums[c][v] = Arithmetic::add_product(sums[c][v], rows, number);
      }
    }
  }
  for (int c = 0; c < NC; c++)
    for (int v = 0; v < NV; v++) total += sums[c][v];
  return total;
}

// 10^9 operations a second, of the best of some runs; a product and a sum are two.
template <class Arithmetic, class Vector, class Number>
double peak_of(Number number, int in_unit, const Parallel& parallel, int64_t n_threads) {
  const int64_t times = 1 << 20;
  double best = 0;
  for (int run = 0; run < 10; run++) {
    const auto start = std::chrono::steady_clock::now();
    parallel(n_threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Vector total = add_products<Arithmetic, Vector>(number, times);
        asm volatile("" : : "m"(total));
      }
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2e-9 * W * in_unit * NC * NV * times * n_threads / seconds);
  }
  return best;
}
}  // namespace

Peak cpu_peak(const Parallel& parallel, int64_t n_threads) {
  Peak peak = {peak_of<Float32, vf>(0.5f, 1, parallel, n_threads), 0};
#if defined(MINICODE_BYTES)
  peak.bytes = peak_of<Bytes, vi>(int32_t(0x01010101), Bytes::in_unit, parallel, n_threads);
#endif
  return peak;
}
}  // namespace minicode
