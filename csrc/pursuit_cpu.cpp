// The choices of pursuit: the best code, then what its choice takes off every score, which is a row of `change`; k times. One
// pass over a row's scores adds and finds the greatest, in vector registers.
#include "topk_cpu.h"

namespace minicode {
namespace {
constexpr float most = std::numeric_limits<float>::max();

// Adds `more` to C scores; returns the place of the greatest, of equals the first. first: sums that are no finite number
// become one, NaN the lowest.
template <bool first>
int64_t add_and_find(float* scores, const float* more, int64_t n_codes) {
  constexpr int U = 4;  // vectors side by side: a comparison need not wait for the one before it
  vf best[U];
  vi where[U];
  for (int u = 0; u < U; u++) best[u] = vf{} - inf, where[u] = vi{};
  int64_t c = 0;
  for (; c + U * W <= n_codes; c += U * W) {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      vf score = load(scores + c + u * W) + load(more + c + u * W);
      if (first) {
        score = score > -most ? score : vf{} - most;
        score = score < most ? score : vf{} + most;
      }
      *(vf_anywhere*)(scores + c + u * W) = score;
      const vi above = score > best[u];
      best[u] = above ? score : best[u];
      where[u] = above ? vi{} + int32_t(c) : where[u];
    }
  }
  float top = -inf;
  int64_t at = 0;
  for (int u = 0; u < U; u++)
    for (int lane = 0; lane < W; lane++) {
      const int64_t place = where[u][lane] + u * W + lane;
      if (best[u][lane] > top || (best[u][lane] == top && place < at)) top = best[u][lane], at = place;
    }
  for (; c < n_codes; c++) {
    scores[c] += more[c];
    if (first) scores[c] = scores[c] > -most ? std::min(scores[c], most) : -most;
    if (scores[c] > top) top = scores[c], at = c;
  }
  return at;
}
}  // namespace

void pursue_cpu(const Pursuit& p, const Parallel& parallel) {
  parallel(p.n_groups * p.n_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float* scores = p.scores + row * p.n_codes;
      const float* changes = p.change + row / p.n_rows * p.n_codes * p.n_codes;
      int64_t id = add_and_find<true>(scores, p.offset + row / p.n_rows * p.n_codes, p.n_codes);
      for (int64_t i = 0; i < p.k; i++) {
        if (i) id = add_and_find<false>(scores, changes + id * p.n_codes, p.n_codes);
        p.best[row * p.k + i] = scores[id];
        p.ids[row * p.k + i] = id;
      }
    }
  });
}
}  // namespace minicode
