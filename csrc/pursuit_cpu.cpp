// Pursuit on a CPU: for each row the best code, then the best for what that one leaves over, k times, in one call. The
// scores of all codes are computed once, for NC rows at a time, by the tiles of topk_cpu.h: here the codes lie side by
// side, so that a row's scores follow each other. Choosing a code changes them by its products with all codes, a row of
// the Gram matrix, which is computed first, in the same way. One pass over a row's scores adds that row and finds the
// greatest, in vector registers; a code that is taken is -inf from then on.
//
//     scores of a row      s0 s1 s2 ...    its greatest: code 1
//   + change by code 1     .. -inf ..      = the scores of what is left, of which the greatest is code 2, ...
#include "topk_cpu.h"

namespace minicode {
namespace {
constexpr float most = std::numeric_limits<float>::max();

vf between(float low, vf v, float high) {  // NaN becomes the lowest
  v = v > low ? v : vf{} + low;
  return v < high ? v : vf{} + high;
}

struct Panels {  // the codes of a group, their scales and offsets, filled up with codes that are never chosen
  const int64_t d, width;             // width: C in whole panels
  std::vector<vf> codes;              // [width / R][d][R]
  std::vector<vf> scale, offset;      // [width]

  Panels(const Search& s, const Table& table, int64_t g)
      : d(s.dim), width(up(s.n_codes, R)), codes(width * d / W), scale(width / W), offset(width / W, vf{} - inf) {
    for (int64_t c = 0; c < s.n_codes; c++) {
      const float* code = s.codes + (g * s.n_codes + c) * d;
      scale[c / W][c % W] = table.scale[g * s.n_codes + c];
      offset[c / W][c % W] = table.offset[g * s.n_codes + c];
      for (int64_t p = 0; p < d; p++) ((float*)codes.data())[(c / R * d + p) * R + c % R] = code[p];
    }
  }

  // times * rows[i] · code * scale, for NC rows (the last of n again): out[NC][width]
  void multiply(const float* rows, int64_t n, int64_t step, float times, vf* out) const {
    std::vector<float> packed((d + 1) * NC);
    for (int i = 0; i < NC; i++)
      for (int64_t p = 0; p < d; p++) packed[(p + 1) * NC + i] = times * rows[std::min<int64_t>(i, n - 1) * step + p];
    for (int64_t c = 0; c < width; c += R) {
      vf sums[NC][NV];
      multiply_tile<Float32>((const float*)&codes[c / W * d], packed.data(), d, sums);
      for (int i = 0; i < NC; i++)
        for (int v = 0; v < NV; v++) out[i * width / W + c / W + v] = sums[i][v] * scale[c / W + v];
    }
  }
};

// Adds `more` to the scores; returns the place of the greatest, of equals the first. first: sums that are no finite number
// become one, NaN the lowest.
template <bool first>
int64_t add_and_find(vf* scores, const vf* more, int64_t width) {
  vf best[NV];  // vectors side by side: a comparison need not wait for the one before it
  vi where[NV];
  for (int v = 0; v < NV; v++) best[v] = vf{} - inf, where[v] = vi{};
  for (int64_t c = 0; c < width / W; c += NV) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      vf score = scores[c + v] + more[c + v];
      if (first) score = between(-most, score, most);
      scores[c + v] = score;
      const vi above = score > best[v];
      best[v] = above ? score : best[v];
      where[v] = above ? vi{} + int32_t(c + v) : where[v];
    }
  }
  float top = -inf;
  int64_t at = width;
  for (int v = 0; v < NV; v++)
    for (int lane = 0; lane < W; lane++) {
      const int64_t place = int64_t(where[v][lane]) * W + lane;
      if (best[v][lane] > top || (best[v][lane] == top && place < at)) top = best[v][lane], at = place;
    }
  return at;
}

// By how much choosing each code changes the scores: finite, so that they stay numbers, but for its own. [C][width]
std::vector<vf> change_by_choice(const Search& s, int64_t g, const Panels& panels, const Parallel& parallel) {
  std::vector<vf> change((s.n_codes + NC) * panels.width / W);
  const int64_t step = panels.width / W;
  parallel((s.n_codes + NC - 1) / NC, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * NC; c < std::min(end * NC, s.n_codes); c += NC) {
      std::vector<vf> tile(NC * step);
      const int64_t n = std::min<int64_t>(NC, s.n_codes - c);
      panels.multiply(s.codes + (g * s.n_codes + c) * s.dim, n, s.dim, -1, tile.data());
      for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < step; j++) change[(c + i) * step + j] = between(-1e30f, tile[i * step + j], 1e30f);
        change[(c + i) * step + (c + i) / W][(c + i) % W] = -inf;
      }
    }
  });
  return change;
}
}  // namespace

void pursuit_cpu(const Search& s, const Parallel& parallel) {
  const Table table(s, parallel);
  for (int64_t g = 0; g < s.n_groups; g++) {
    const Panels panels(s, table, g);
    const std::vector<vf> change = change_by_choice(s, g, panels, parallel);
    const int64_t step = panels.width / W;
    parallel((s.n_rows + NC - 1) / NC, [&](int64_t begin, int64_t end) {
      std::vector<vf> scores(NC * step);
      for (int64_t row = begin * NC; row < std::min(end * NC, s.n_rows); row += NC) {
        const int64_t n = std::min<int64_t>(NC, s.n_rows - row);
        panels.multiply(s.x + g * s.x_group + row * s.x_row, n, s.x_row, 1, scores.data());
        for (int64_t i = 0; i < n; i++) {
          vf* of_row = &scores[i * step];
          int64_t id = add_and_find<true>(of_row, panels.offset.data(), panels.width);
          for (int64_t j = 0; j < s.k; j++) {
            if (j) id = add_and_find<false>(of_row, &change[id * step], panels.width);
            const int64_t at = (g * s.n_rows + row + i) * s.k + j;
            s.scores[at] = of_row[id / W][id % W];
            s.ids[at] = id;
          }
        }
      }
    });
  }
}
}  // namespace minicode
