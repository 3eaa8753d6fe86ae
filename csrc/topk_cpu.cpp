// The search on a CPU in float32, in two ways:
//   tiles   any number of rows: 32 rows side by side in vector registers against 12 codes at a time. A score is
//           compared with its row's k-th best while it is still in a register; it is never stored.
//   few     a handful of rows: threads share the codes, which are read once.
#include "topk_cpu.h"

#include <numeric>

namespace minicode {
namespace {
// The dot products of a panel of rows a[p][row] with NC codes b[p][code].
inline void dot_products(const float* a, const float* b, int64_t d, vf (&out)[NC][NV]) {
  vf sum[NC][NV] = {};
  for (int64_t p = 0; p < d; p++, a += R, b += NC) {
    vf rows[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) rows[v] = load(a + v * W);
#pragma GCC unroll 12
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[c][v] += rows[v] * b[c];
    }
  }
  std::memcpy(out, sum, sizeof sum);
}

}  // namespace

void search_rows(const Search& s, const Table& table, int64_t g, const int64_t* rows, int64_t n) {
  const int64_t d = s.dim, n_panels = (n + R - 1) / R, code_block = 20 * NC;
  const float *codes = s.codes + g * s.n_codes * d, *scale = &table.scale[g * s.n_codes], *offset = &table.offset[g * s.n_codes];
  std::vector<float> x(n_panels * R * d), packed(code_block * d);
  std::vector<vf> floors(n_panels * NV, vf{} - inf);
  std::vector<vi> winners(n_panels * NV);
  for (int64_t i = n; i < n_panels * R; i++) floors[i / W][i % W] = inf;
  for (int64_t i = 0; i < n_panels * R; i++)  // x[panel][p][row]; the last panel repeats the last row
    for (int64_t p = 0; p < d; p++)
      x[(i / R * d + p) * R + i % R] = s.x[g * s.x_group + rows[std::min(i, n - 1)] * s.x_row + p];
  std::vector<Candidate> room;
  std::vector<Best> best = Best::make(s.k == 1 ? 0 : n, s.k, room);
  for (int64_t start = 0; start < s.n_codes; start += code_block) {
    const int64_t width = std::min(code_block, s.n_codes - start);
    for (int64_t c = 0; c < (width + NC - 1) / NC * NC; c++)  // packed[c / NC][p][c % NC]
      for (int64_t p = 0; p < d; p++)
        packed[(c / NC * d + p) * NC + c % NC] = codes[(start + std::min(c, width - 1)) * d + p];
    for (int64_t panel = 0; panel < n_panels; panel++) {
      vf* floor = &floors[panel * NV];
      vi* winner = &winners[panel * NV];
      for (int64_t c0 = 0; c0 < width; c0 += NC) {
        vf sum[NC][NV];
        dot_products(&x[panel * R * d], &packed[c0 * d], d, sum);
        const int real = std::min<int64_t>(NC, width - c0);
        for (int c = 0; c < real; c++) {
          const int32_t id = start + c0 + c;
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++) {
            const vf score = sum[c][v] * scale[id] + offset[id];
            const vi above = score > floor[v];
            if (s.k == 1) {
              floor[v] = above ? score : floor[v];
              winner[v] = above ? vi{} + id : winner[v];
              continue;
            }
            for (uint32_t lanes = bits(above); lanes; lanes &= lanes - 1) {
              const int lane = __builtin_ctz(lanes);
              const int64_t row = panel * R + v * W + lane;
              best[row].add(score[lane], id, s.k, ((float*)floor)[v * W + lane]);
            }
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = (g * s.n_rows + rows[i]) * s.k;
    if (s.k == 1) s.scores[at] = floors[i / W][i % W], s.ids[at] = winners[i / W][i % W];
    else best[i].write(s.k, s.scores + at, s.ids + at);
  }
}

namespace {

// All rows of all groups; each part takes its share of the codes, then the parts' best are put together.
void search_few(const Search& s, const Parallel& parallel, int64_t n_parts) {
  n_parts = std::max<int64_t>(1, std::min(n_parts, s.n_codes / 256));
  const int64_t n = s.n_groups * s.n_rows, capacity = Best::capacity(s.k), d = s.dim;
  std::vector<Candidate> room, merged(n_parts * capacity);
  std::vector<Best> best = Best::make(n_parts * n, s.k, room);
  parallel(n_parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      std::vector<float> floors(n, -inf);
      for (int64_t g = 0; g < s.n_groups; g++) {
        for (int64_t c = s.n_codes * part / n_parts; c < s.n_codes * (part + 1) / n_parts; c++) {
          const float* code = s.codes + (g * s.n_codes + c) * d;
          float scale, offset;
          scale_and_offset(code, d, s.similarity, scale, offset);
          for (int64_t r = 0; r < s.n_rows; r++) {
            const int64_t i = g * s.n_rows + r;
            const float score = dot_product(s.x + g * s.x_group + r * s.x_row, code, d) * scale + offset;
            if (score > floors[i]) best[part * n + i].add(score, c, s.k, floors[i]);
          }
        }
      }
    }
  });
  for (int64_t i = 0; i < n; i++) {
    Best all{merged.data()};
    for (int64_t part = 0; part < n_parts; part++)
      all.size = std::copy_n(best[part * n + i].list, best[part * n + i].size, all.list + all.size) - all.list;
    all.write(s.k, s.scores + i * s.k, s.ids + i * s.k);
  }
}

}  // namespace

const char* cpu_path() {
  if (coarse_ready()) return "bfloat16 tiles (AMX), then exact float32";
  return W == 16 ? "float32, 16 lanes (AVX-512)" : W == 8 ? "float32, 8 lanes (AVX)" : "float32, 4 lanes";
}

void topk_cpu(const Search& s, const Parallel& parallel, int64_t n_threads, bool use_coarse) {
  if (s.n_rows * s.n_groups == 0) return;
  if (s.n_rows <= 8) return search_few(s, parallel, n_threads);
  const Table table(s, parallel);
  const Coarse coarse = use_coarse ? coarse_search(s, table, parallel) : Coarse();
  // Blocks of rows: every thread gets some, and their lists of candidates stay in the cache.
  int64_t block = std::min((s.n_rows + n_threads - 1) / n_threads, (int64_t(1) << 18) / Best::capacity(s.k));
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
