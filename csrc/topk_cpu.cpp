// The search on a CPU: which way a search goes, and the two ways in float32. For many rows, tiles (topk_cpu.h): a panel
// of rows against all codes, a few at a time; a score is compared with its row's k-th best while it is still in a
// register, and never stored. For a handful of rows threads share the codes, which are read once. Where there is a coarse
// pass (topk_coarse.cpp), tiles do what it leaves over. Threads take blocks of rows.
//
//     rows  | block | block | ...        block:  panels of R rows   x   240 codes after 240 codes, in tiles of NC
#include "candidates.h"

#include <numeric>

namespace minicode {
namespace {
int64_t few_more(int64_t k) { return 2 * k + 14; }  // the room of a list whose best k are exact
}  // namespace

void search_rows(const Search& s, const Table& table, int64_t g, const int64_t* rows, int64_t n) {
  const int64_t d = s.dim, n_panels = (n + R - 1) / R, code_block = 20 * NC;
  const float *codes = s.codes + g * s.n_codes * d, *scale = &table.scale[g * s.n_codes], *offset = &table.offset[g * s.n_codes];
  std::vector<vf> x(n_panels * NV * d);
  std::vector<float> packed(code_block * (d + 1));
  std::vector<vf> best(n_panels * NV, vf{} - inf);  // for k = 1
  std::vector<vi> winners(n_panels * NV);
  for (int64_t i = 0; i < n_panels * R; i++)  // x[panel][p][row]; the last panel repeats the last row
    for (int64_t p = 0; p < d; p++)
      ((float*)x.data())[(i / R * d + p) * R + i % R] = s.x[g * s.x_group + rows[std::min(i, n - 1)] * s.x_row + p];
  Candidates lists(s.k == 1 ? 0 : n, s.k, few_more(s.k));
  for (int64_t start = 0; start < s.n_codes; start += code_block) {
    const int64_t width = std::min(code_block, s.n_codes - start);
    for (int64_t c = 0; c < up(width, NC); c++)  // packed[c / NC][1 + p][c % NC]
      for (int64_t p = 0; p < d; p++)
        packed[(c / NC * (d + 1) + 1 + p) * NC + c % NC] = codes[(start + std::min(c, width - 1)) * d + p];
    for (int64_t panel = 0; panel < n_panels; panel++) {
      for (int64_t c0 = 0; c0 < width; c0 += NC) {
        vf sums[NC][NV];
        multiply_tile<Float32>((float*)&x[panel * NV * d], &packed[c0 * (d + 1)], d, sums);
        const int real = std::min<int64_t>(NC, width - c0);
        for (int c = 0; c < real; c++) {
          const int32_t id = start + c0 + c;
          vf scores[NV];
          for (int v = 0; v < NV; v++) scores[v] = sums[c][v] * scale[id] + offset[id];
          if (s.k > 1) {
            lists.offer(panel * R, scores, id);
            continue;
          }
          for (int v = 0; v < NV; v++) {
            vf& top = best[panel * NV + v];
            vi& winner = winners[panel * NV + v];
            const vi above = scores[v] > top;
            top = above ? scores[v] : top;
            winner = above ? vi{} + id : winner;
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = (g * s.n_rows + rows[i]) * s.k;
    if (s.k == 1) s.scores[at] = best[i / W][i % W], s.ids[at] = winners[i / W][i % W];
    else lists.write(i, s.scores + at, s.ids + at);
  }
}

namespace {

// All rows of all groups; each part takes its share of the codes, then the parts' best are put together.
void search_few(const Search& s, const Parallel& parallel, int64_t n_parts) {
  n_parts = std::max<int64_t>(1, std::min(n_parts, s.n_codes / 256));
  const int64_t n = s.n_groups * s.n_rows, d = s.dim;
  std::vector<Candidates> parts(n_parts, Candidates(n, s.k, few_more(s.k)));
  parallel(n_parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      for (int64_t g = 0; g < s.n_groups; g++) {
        for (int64_t c = s.n_codes * part / n_parts; c < s.n_codes * (part + 1) / n_parts; c++) {
          const float* code = s.codes + (g * s.n_codes + c) * d;
          float scale, offset;
          scale_and_offset(code, d, s.similarity, scale, offset);
          for (int64_t r = 0; r < s.n_rows; r++) {
            const int64_t i = g * s.n_rows + r;
            const float score = dot_product(s.x + g * s.x_group + r * s.x_row, code, d) * scale + offset;
            if (score > parts[part].floor(i)) parts[part].add(i, score, c);
          }
        }
      }
    }
  });
  for (int64_t i = 0; i < n; i++) {
    for (int64_t part = 1; part < n_parts; part++)
      for (int64_t j = 0; j < parts[part].sizes[i]; j++) parts[0].add(i, parts[part].scores_of(i)[j], parts[part].ids_of(i)[j]);
    parts[0].write(i, s.scores + i * s.k, s.ids + i * s.k);
  }
}

}  // namespace

std::string cpu_path() {
  const std::string exact = W == 16 ? "float32, 16 lanes (AVX-512)" : W == 8 ? "float32, 8 lanes (AVX)" : "float32, 4 lanes";
  return coarse_path() ? std::string(coarse_path()) + ", then exact " + exact : exact;
}

void topk_cpu(const Search& s, const Parallel& parallel, int64_t n_threads, bool use_coarse) {
  if (s.n_rows * s.n_groups == 0) return;
  if (s.n_rows <= 8) return search_few(s, parallel, n_threads);
  const Table table(s, parallel);
  const Coarse coarse = use_coarse ? coarse_search(s, table, parallel) : Coarse();
  // Blocks of rows: every thread gets some, and their lists of candidates stay in the cache.
  int64_t block = std::min((s.n_rows + n_threads - 1) / n_threads, (int64_t(1) << 18) / few_more(s.k));
  block = std::clamp<int64_t>(block / R * R, R, coarse ? 512 : 1024);
  const int64_t blocks = (s.n_rows + block - 1) / block;
  parallel(s.n_groups * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t start = i % blocks * block;
      std::vector<int64_t> rows(std::min(block, s.n_rows - start));
      std::iota(rows.begin(), rows.end(), start);
      if (coarse) coarse(i / blocks, start, rows.size());
      else search_rows(s, table, i / blocks, rows.data(), rows.size());
    }
  });
}
}  // namespace minicode
