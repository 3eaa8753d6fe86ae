// The search without torch, for whatever CPU it is compiled for: on whole numbers, which float32 does not round, scores and
// ids must be those of the definition to the last bit. Prints the path that it took; the status is 1 if anything differs.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

#include "topk.h"
using namespace minicode;

static void serial(int64_t n, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

// The definition, for similarity dot: all scores, sorted; of equals the lower id.
static std::vector<int64_t> best_of(const float* x, const float* codes, int64_t n_codes, int64_t d, int64_t k) {
  std::vector<double> scores(n_codes);
  for (int64_t c = 0; c < n_codes; c++) scores[c] = std::inner_product(x, x + d, codes + c * d, 0.0);
  std::vector<int64_t> ids(n_codes);
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  ids.resize(k);
  return ids;
}

static int differences(int64_t G, int64_t N, int64_t C, int64_t d, int64_t k, int largest, bool coarse) {
  std::mt19937 random(0);
  std::uniform_int_distribution<int> number(-largest, largest);
  std::vector<float> x(G * N * d), codes(G * C * d), scores(G * N * k);
  std::vector<int64_t> ids(scores.size());
  for (float& v : x) v = number(random);
  for (float& v : codes) v = number(random);
  topk_cpu({x.data(), N * d, d, codes.data(), G, N, C, d, k, dot, scores.data(), ids.data()}, serial, 1, coarse);
  int wrong = 0;
  for (int64_t row = 0; row < G * N; row += 7) {
    const float* table = &codes[row / N * C * d];
    const std::vector<int64_t> wanted = best_of(&x[row * d], table, C, d, k);
    for (int64_t i = 0; i < k; i++) {
      const float* code = table + wanted[i] * d;
      wrong += ids[row * k + i] != wanted[i];
      wrong += scores[row * k + i] != float(std::inner_product(code, code + d, &x[row * d], 0.0));
    }
  }
  return wrong;
}

int main() {
  std::printf("%s\n", cpu_path().c_str());
  int wrong = 0;
  for (bool coarse : {true, false})
    for (int largest : {1, 100}) {  // many equal scores; few
      wrong += differences(2, 300, 700, 95, 1, largest, coarse);
      wrong += differences(1, 259, 1100, 64, 8, largest, coarse);
      wrong += differences(1, 256, 4000, 33, 100, largest, coarse);
      wrong += differences(1, 256, 600, 500, 3, largest, coarse);
      wrong += differences(1, 5, 700, 9, 3, largest, coarse);
    }
  return wrong > 0;
}
