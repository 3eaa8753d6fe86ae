// The coarse pass: every code is scored in a rounded form, by whatever multiplies most numbers at a time here; the codes
// within twice the error bound of the k-th best are scored again in float32. Rows with too many such codes, or that are
// not finite, are left to search_rows.
//
//     float32         x  --round-->  tiles of rows and codes  --scores-->  candidates  --float32-->  the k best
//
// The bound. With x = x' + m and scale * c = c' + mu (any m, mu; here the means, which shorten x' and c'):
//     x·(scale c) + offset  =  x'·c'  +  (m·c' + offset)  +  x·mu,       and x·mu is the same for every code.
// Let ^v be v rounded. Then, by Cauchy and Schwarz,
//     |x'·c' - ^x'·^c'|  <=  |x' - ^x'| |c'|  +  |^x'| |c' - ^c'|,
// with the lengths of the differences measured, not taken for the most that rounding may lose: some three times tighter.
// Rounding in float32, here and in search_rows, adds at most (d + 16) 2^-23 of the sizes that enter.
//
// Scores are computed in steps of their row: divided by what 1 stands for in its rounded form.
#include <numeric>

#include "candidates.h"
#include "coarse_integers.h"
#include "coarse_tiles.h"

#if defined(MINICODE_BYTES)
namespace minicode {
namespace {
struct Lengths {  // of v = scale * v, of e = v - centre, of e rounded, of what rounding lost
  float whole = 0, exact = 0, rounded = 0, lost = 0;
};

template <class Format>
struct Rounder {
  std::vector<float> whole, exact, rounded, lost;
  std::vector<int32_t> units;
  float step;  // what 1 stands for in the rounded form

  Rounder(int64_t depth) : whole(depth), exact(depth), rounded(depth), lost(depth), units(depth / Format::in_unit) {}

  // v * scale - centre, of d numbers
  Lengths round(const float* v, float scale, const float* centre, int64_t d, bool of_row) {
    const int64_t depth = whole.size();
    for (int64_t p = 0; p < d; p++) whole[p] = v[p] * scale;
    for (int64_t p = 0; p < d; p++) exact[p] = whole[p] - centre[p];
    step = Format::round(exact.data(), depth, of_row, units.data(), rounded.data());
    for (int64_t p = 0; p < depth; p++) lost[p] = exact[p] - rounded[p];
    return {length(whole), length(exact), length(rounded), length(lost)};
  }
  static float length(const std::vector<float>& v) {  // above the rounding of the sum
    return std::sqrt(dot_product(v.data(), v.data(), v.size())) * 1.0001f + underflow(v.size());
  }
};

template <class Format>
struct RoundedCodes {  // of one group
  int64_t depth, n_units, width;              // d in whole tiles; units of 4 bytes in it; C in whole tiles
  std::vector<int32_t> packed;
  std::vector<float> scale, offset, mu, m;    // (width), (width), (d), (d)
  Lengths largest;
  float largest_offset = 0, largest_scale = 0, longest = 0;  // longest: of the codes, before they are scaled

  RoundedCodes(const Search& s, const Table& table, int64_t g, const Parallel& parallel)
      : depth(up(s.dim, Format::depth_of_tile)), n_units(depth / Format::in_unit), width(up(s.n_codes, Format::codes_of_tile)),
        packed(Format::room(width, n_units)), scale(width), offset(width, -inf), mu(s.dim), m(s.dim) {
    const int64_t d = s.dim, C = s.n_codes;
    const float *codes = s.codes + g * C * d, *scale_of_codes = &table.scale[g * C], *offset_of_codes = &table.offset[g * C];
    for (int64_t i = 0; i < 512; i++) {  // of a sample: any mu and m will do
      const float *code = codes + C * i / 512 * d, *row = s.x + g * s.x_group + s.n_rows * i / 512 * s.x_row;
      for (int64_t p = 0; p < d; p++) mu[p] += code[p] * scale_of_codes[C * i / 512] / 512;
      for (int64_t p = 0; p < d; p++) m[p] += row[p] / 512;
    }
    std::vector<Lengths> lengths(C);
    parallel(width / Format::codes_of_tile, [&](int64_t begin, int64_t end) {
      Rounder<Format> code(depth);
      for (int64_t c = begin * Format::codes_of_tile; c < std::min(end * Format::codes_of_tile, C); c++) {
        lengths[c] = code.round(codes + c * d, scale_of_codes[c], mu.data(), d, false);
        Format::put_code(c, code.units.data(), n_units, packed.data());
        // What is no number stays none, whatever it was rounded to: it loses.
        scale[c] = lengths[c].lost < inf ? code.step : std::numeric_limits<float>::quiet_NaN();
        offset[c] = dot_product(m.data(), code.exact.data(), d) + offset_of_codes[c];
      }
    });
    for (int64_t c = 0; c < C; c++) {
      for (float Lengths::*length : {&Lengths::whole, &Lengths::exact, &Lengths::rounded, &Lengths::lost})
        largest.*length = std::max(largest.*length, lengths[c].*length);
      largest_offset = std::max({largest_offset, std::abs(offset[c]), std::abs(offset_of_codes[c])});
      largest_scale = std::max(largest_scale, scale_of_codes[c]);
      if (scale_of_codes[c] > 0) longest = std::max(longest, lengths[c].whole / scale_of_codes[c]);
    }
  }

  float twice_bound(const Lengths& row) const {
    // In float32 x·c is scaled at last: it may underflow, which adds to the error, or overflow, and nothing is certain.
    if (double(row.whole) * longest > 1e37) return inf;
    const double products = double(row.lost) * largest.exact + double(row.rounded) * largest.lost;
    const double sizes = (double(row.exact) + row.whole) * (double(largest.exact) + largest.whole) + largest_offset;
    return float(2.001 * (products + (depth + 16) * std::ldexp(sizes, -23) + 1e-40 * largest_scale) + 1e-30);
  }
};

// The sums of a tile as scores, in steps of their rows.
template <class Vector, size_t tile>
[[gnu::noinline]] void offer_tile(const Vector (&sums)[tile][NV], const float* scale, const float* offset, const vf* per_step,
                                  int64_t row, int32_t id, Candidates& lists) {
  for (size_t i = 0; i < tile; i++) {
    vf scores[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) scores[v] = __builtin_convertvector(sums[i][v], vf) * scale[i] + per_step[v] * offset[i];
    lists.offer(row, scores, id + i);
  }
}

// What may be among the k best of rows start..start + n, by their scores in the rounded form.
template <class Format>
Candidates candidates_of(const Search& s, const RoundedCodes<Format>& codes, int64_t g, int64_t start, int64_t n) {
  const int64_t n_units = codes.n_units, tile = Format::codes_of_tile, panels = (n + R - 1) / R;
  const int64_t block = std::max<int64_t>(1, (1 << 14) / n_units / tile) * tile;  // 64 KB of codes
  Candidates lists(n, s.k, 16 * s.k + 64);
  std::vector<vi> x(panels * NV * n_units);  // [panel][unit][row]
  std::vector<vf> per_step(panels * NV, vf{} + 1);
  Rounder<Format> row(codes.depth);
  for (int64_t r = 0; r < n; r++) {
    const Lengths lengths = row.round(s.x + g * s.x_group + (start + r) * s.x_row, 1, codes.m.data(), s.dim, true);
    for (int64_t p = 0; p < n_units; p++) ((int32_t*)x.data())[(r / R * n_units + p) * R + r % R] = row.units[p];
    const float steps = 1 / row.step;
    per_step[r / W][r % W] = steps;
    lists.slack[r] = codes.twice_bound(lengths) * steps;
    if (!(lists.slack[r] < 1e30f)) lists.give_up(r);  // too large for float32, or not a number
  }
  Format::begin();
  for (int64_t c0 = 0; c0 < codes.width; c0 += block)
    for (int64_t panel = 0; panel < panels; panel++)
      for (int64_t c = c0; c < std::min(c0 + block, codes.width); c += tile) {
        typename Format::Sums sums;
        Format::multiply((int32_t*)&x[panel * NV * n_units], &codes.packed[Format::room(c, n_units)], n_units, sums);
        offer_tile(sums, &codes.scale[c], &codes.offset[c], &per_step[panel * NV], panel * R, c, lists);
      }
  Format::end();
  for (int64_t r = 0; r < n; r++) lists.shrink(r);
  return lists;
}

// Scores the candidates again in float32, and writes the best k. The lists are in the order of their ids: all rows take
// their codes from one stretch, while it is in the cache.
void finish(const Search& s, const Table& table, int64_t g, int64_t start, int64_t n, Candidates& lists) {
  const int64_t d = s.dim, stretch = std::max<int64_t>(1, (1 << 18) / d);
  std::vector<int64_t> left, done(n);
  for (int64_t end = stretch; end < s.n_codes + stretch; end += stretch)
    for (int64_t r = 0; r < n; r++)
      for (int64_t& i = done[r]; i < lists.sizes[r] && lists.ids_of(r)[i] < end; i++) {
        const int64_t code = g * s.n_codes + lists.ids_of(r)[i];
        const float product = dot_product(s.x + g * s.x_group + (start + r) * s.x_row, s.codes + code * d, d);
        lists.scores_of(r)[i] = product * table.scale[code] + table.offset[code] + 0.0f;
      }
  for (int64_t r = 0; r < n; r++) {
    const int64_t at = (g * s.n_rows + start + r) * s.k;
    if (lists.sizes[r] < s.k) left.push_back(start + r);
    else lists.write(r, s.scores + at, s.ids + at);
  }
  if (!left.empty()) search_rows(s, table, g, left.data(), left.size());
}

// Empty where a panel of rows shows that too many codes are left to be scored again.
template <class Format>
Coarse search_in(const Search& s, const Table& table, const Parallel& parallel) {
  std::vector<RoundedCodes<Format>> groups;
  for (int64_t g = 0; g < s.n_groups; g++) groups.emplace_back(s, table, g, parallel);
  std::vector<int64_t> left(s.n_groups);
  parallel(s.n_groups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      const Candidates lists = candidates_of(s, groups[g], g, s.n_rows / 2, R);
      for (int64_t r = 0; r < R; r++) left[g] += lists.given_up(r) ? s.n_codes : lists.sizes[r];
    }
  });
  const double candidates = std::accumulate(left.begin(), left.end(), 0.0) / (s.n_groups * R);
  if (8 * candidates * (s.dim + 1024) > double(s.n_codes) * s.dim) return {};
  return [&s, &table, groups = std::move(groups)](int64_t g, int64_t start, int64_t n) {
    Candidates lists = candidates_of(s, groups[g], g, start, n);
    finish(s, table, g, start, n, lists);
  };
}
}  // namespace

Coarse coarse_search(const Search& s, const Table& table, const Parallel& parallel) {
  // Fewer rows, codes or dimensions are scored in float32 before their bounds are known.
  if (s.n_rows < 256 || s.n_codes * s.dim < 3 << 14 || s.k > s.n_codes / 16) return {};
#if defined(MINICODE_TILES)
  if (Tiles::ready()) return search_in<Tiles>(s, table, parallel);
#endif
  Coarse search;
  if (s.dim <= Bytes::deepest) search = search_in<Bytes>(s, table, parallel);
#if defined(MINICODE_WORDS)
  if (!search && s.dim <= Words::deepest) search = search_in<Words>(s, table, parallel);
#endif
  return search;
}

const char* coarse_path() {
#if defined(MINICODE_TILES)
  if (Tiles::ready()) return Tiles::path;
#endif
  return Bytes::path;
}
}  // namespace minicode
#else
const char* minicode::coarse_path() { return nullptr; }
minicode::Coarse minicode::coarse_search(const Search&, const Table&, const Parallel&) { return {}; }
#endif
