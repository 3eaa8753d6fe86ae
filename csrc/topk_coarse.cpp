// The search on a CPU that has bfloat16 tiles (AMX): every code is scored in bfloat16, 32 rows x 32 codes at a
// time; the codes within twice the error bound of the k-th best are scored again in float32. Rows with too many
// such codes, or that are not finite, are left to search_rows.
//
// The bound. With x = x' + m and scale * c = c' + mu (any m, mu; here the means, which shorten x' and c'):
//     x·(scale c) + offset  =  x'·c'  +  (m·c' + offset)  +  x·mu,       and x·mu is the same for every code.
// Let ^v be v rounded to bfloat16. Then, by Cauchy and Schwarz,
//     |x'·c' - ^x'·^c'|  <=  |x' - ^x'| |c'|  +  |^x'| |c' - ^c'|,
// with the lengths of the differences measured, not taken for 2^-8 of the whole: some three times tighter.
// Rounding in float32, here and in search_rows, adds at most (d + 16) 2^-23 of the sizes that enter.
#include "topk_cpu.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace minicode {
namespace {
struct Sizes {  // lengths of v = scale * v, of e = v - centre, of e rounded, of what rounding lost
  float whole = 0, exact = 0, rounded = 0, lost = 0;
};

// e = v * scale - centre as bfloat16, to nearest even, denormals as zero (as the tiles take them). All are of
// `depth` floats, a multiple of 32; each 32 of the result lie `step` behind the 32 before.
Sizes round_centred(const float* v, float scale, const float* centre, int64_t depth, uint16_t* out, int64_t step) {
  typedef uint16_t half_vector __attribute__((vector_size(W * 2), aligned(2), may_alias));
  typedef uint32_t bits_vector __attribute__((vector_size(W * 4)));  // without a sign: those of a NaN may overflow
  vf whole = {}, exact = {}, rounded = {}, lost = {};
  for (int64_t p = 0; p < depth; p += W) {
    const vf w = load(v + p) * scale, e = w - load(centre + p);
    bits_vector u = (bits_vector)e;
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
    u = (u & 0x7f800000) == 0 ? bits_vector{} : u;
    const vf r = (vf)u;
    *(half_vector*)(out + p / 32 * step + p % 32) = __builtin_convertvector(u >> 16, half_vector);
    whole += w * w, exact += e * e, rounded += r * r, lost += (e - r) * (e - r);
  }
  auto length = [](vf squares) {
    double sum = 0;
    for (int i = 0; i < W; i++) sum += squares[i];
    return float(std::sqrt(sum) * 1.0001 + 1e-20);  // above the rounding of the sum, and squares that underflow
  };
  return {length(whole), length(exact), length(rounded), length(lost)};
}

struct Tile {
  alignas(64) uint16_t halves[16 * 32];
};

struct CodesInBfloat16 {  // of one group
  int64_t depth, width;             // d in steps of 32; C in steps of 32
  std::vector<Tile> packed;         // [width / 16][depth / 32], each [16][16 codes][2] as a right-hand side wants it
  std::vector<float> offset, mu, m; // (width), (depth), (depth)
  Sizes largest;
  float largest_offset = 0, largest_scale = 0, longest = 0;  // longest: of the codes, before they are scaled

  CodesInBfloat16(const Search& s, const Table& table, int64_t g, const Parallel& parallel)
      : depth((s.dim + 31) / 32 * 32), width((s.n_codes + 31) / 32 * 32), packed(width * depth / 512),
        offset(width, -inf), mu(depth), m(depth) {
    const int64_t d = s.dim, C = s.n_codes;
    const float *codes = s.codes + g * C * d, *scale = &table.scale[g * C];
    for (int64_t i = 0; i < 512; i++) {  // of a sample: any mu and m will do
      const int64_t c = C * i / 512, n = s.n_rows * i / 512;
      for (int64_t p = 0; p < d; p++) {
        mu[p] += codes[c * d + p] * scale[c] / 512;
        m[p] += s.x[g * s.x_group + n * s.x_row + p] / 512;
      }
    }
    std::vector<Sizes> sizes(C);
    parallel(width / 16, [&](int64_t begin, int64_t end) {
      std::vector<float> code(depth);
      std::vector<uint16_t> row(depth);
      for (int64_t c = begin * 16; c < std::min(end * 16, C); c++) {
        std::memcpy(code.data(), codes + c * d, d * sizeof(float));
        sizes[c] = round_centred(code.data(), scale[c], mu.data(), depth, row.data(), 32);
        for (int64_t p = 0; p < depth; p += 2) std::memcpy(packed[c / 16 * depth / 32].halves + p * 16 + c % 16 * 2, &row[p], 4);
        for (int64_t p = 0; p < d; p++) code[p] = code[p] * scale[c] - mu[p];
        offset[c] = dot_product(m.data(), code.data(), d) + table.offset[g * C + c];
      }
    });
    for (int64_t c = 0; c < C; c++) {
      for (float Sizes::*size : {&Sizes::whole, &Sizes::exact, &Sizes::rounded, &Sizes::lost})
        largest.*size = std::max(largest.*size, sizes[c].*size);
      largest_offset = std::max({largest_offset, std::abs(offset[c]), std::abs(table.offset[g * C + c])});
      largest_scale = std::max(largest_scale, scale[c]);
      if (scale[c] > 0) longest = std::max(longest, sizes[c].whole / scale[c]);
    }
  }

  float twice_bound(const Sizes& row) const {
    // In float32 x·c is scaled at last: it may underflow, which adds to the error, or overflow, and nothing is certain.
    if (double(row.whole) * longest > 1e37) return inf;
    const double products = double(row.lost) * largest.exact + double(row.rounded) * largest.lost;
    const double sizes = (double(row.exact) + row.whole) * (double(largest.exact) + largest.whole) + largest_offset;
    return float(2.001 * (products + (depth + 16) * std::ldexp(sizes, -23) + 1e-40 * largest_scale) + 1e-30);
  }
};

// A block of rows of one group: their candidates so far, and the score that the next must exceed.
struct Block {
  const int64_t k, capacity;
  std::vector<Candidate> lists;
  std::vector<int64_t> sizes;
  std::vector<float> floors, bounds;

  Block(int64_t n, int64_t k) : k(k), capacity(2 * k + 64), lists(n * capacity), sizes(n), floors((n + 31) / 32 * 32, inf), bounds(n) {}

  void give_up(int64_t r) { sizes[r] = -1, floors[r] = inf; }
  void add(int64_t r, float score, int32_t id) {
    lists[r * capacity + sizes[r]++] = candidate(score, id);
    if (k == 1) floors[r] = std::max(floors[r], score - bounds[r]);
  }
  // Keeps what can still be among the k best; a list that stays full gives its row up.
  void shrink(int64_t r) {
    floors[r] = cut(&lists[r * capacity], sizes[r], k, bounds[r]);
    if (sizes[r] > capacity - 32) give_up(r);
  }
};

// Scores the candidates again in float32, and writes the best k. The lists are in the order of their ids: all rows take
// their codes from one stretch, while it is in the cache.
void finish(const Search& s, const Table& table, int64_t g, int64_t start, int64_t n, Block& block) {
  const int64_t d = s.dim, stretch = std::max<int64_t>(1, (1 << 18) / d);
  std::vector<int64_t> left, done(n);
  for (int64_t r = 0; r < n; r++) block.shrink(r);
  for (int64_t end = stretch; end < s.n_codes + stretch; end += stretch)
    for (int64_t r = 0; r < n; r++)
      for (Candidate* c = &block.lists[r * block.capacity + done[r]]; done[r] < block.sizes[r] && id_of(*c) < end; c++, done[r]++) {
        const int64_t id = id_of(*c), code = g * s.n_codes + id;
        const float product = dot_product(s.x + g * s.x_group + (start + r) * s.x_row, s.codes + code * d, d);
        *c = candidate(product * table.scale[code] + table.offset[code], id);
      }
  for (int64_t r = 0; r < n; r++) {
    const int64_t at = (g * s.n_rows + start + r) * s.k;
    if (block.sizes[r] < s.k) left.push_back(start + r);
    else Best{&block.lists[r * block.capacity], block.sizes[r]}.write(s.k, s.scores + at, s.ids + at);
  }
  if (!left.empty()) search_rows(s, table, g, left.data(), left.size());
}

void configure_tiles() {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;  // 16 rows of 64 bytes in each tile
  _tile_loadconfig(config);
}

// 32 rows a against 32 codes b: scores[32][32], the offsets included.
inline void score_tile(const Tile* a, const Tile* b, const float* offset, int64_t depth, float* scores) {
  _tile_loadd(0, offset, 0); _tile_loadd(1, offset + 16, 0);  // a stride of 0: the same 16 offsets for 16 rows
  _tile_loadd(2, offset, 0); _tile_loadd(3, offset + 16, 0);
  for (int64_t p = 0; p < depth; p++) {
    _tile_loadd(4, a + p, 64); _tile_loadd(5, a + depth + p, 64);
    _tile_loadd(6, b + p, 64); _tile_loadd(7, b + depth + p, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 128); _tile_stored(1, scores + 16, 128);
  _tile_stored(2, scores + 512, 128); _tile_stored(3, scores + 528, 128);
}

void search_block(const Search& s, const Table& table, const CodesInBfloat16& codes, int64_t g, int64_t start, int64_t n) {
  const int64_t depth = codes.depth, code_block = std::max<int64_t>(32, (1 << 15) / depth / 32 * 32);
  Block block(n, s.k);
  std::vector<Tile> x(block.floors.size() * depth / 512);  // [n / 16][depth / 32], each [16 rows][32]
  std::vector<float> row(depth);
  for (int64_t r = 0; r < n; r++) {
    std::memcpy(row.data(), s.x + g * s.x_group + (start + r) * s.x_row, s.dim * sizeof(float));
    uint16_t* out = x[r / 16 * depth / 32].halves + r % 16 * 32;
    block.bounds[r] = codes.twice_bound(round_centred(row.data(), 1.0f, codes.m.data(), depth, out, 512));
    if (block.bounds[r] < 1e30f) block.floors[r] = -inf;
    else block.give_up(r);  // too large for float32, or not a number
  }
  alignas(64) float scores[32 * 32];
  configure_tiles();
  for (int64_t c0 = 0; c0 < codes.width; c0 += code_block)
    for (int64_t r0 = 0; r0 < n; r0 += 32)
      for (int64_t c = c0; c < std::min(c0 + code_block, codes.width); c += 32) {
        score_tile(&x[r0 * depth / 512], &codes.packed[c * depth / 512], &codes.offset[c], depth / 32, scores);
        for (int64_t i = 0; i < 32; i++) {
          const float floor = block.floors[r0 + i];
          uint32_t lanes = 0;
          for (int v = 0; v < 32 / W; v++) lanes |= bits(load(&scores[i * 32 + v * W]) > floor) << v * W;
          if (!lanes) continue;
          for (; lanes; lanes &= lanes - 1) block.add(r0 + i, scores[i * 32 + __builtin_ctz(lanes)], c + __builtin_ctz(lanes));
          if (block.sizes[r0 + i] > block.capacity - 32) block.shrink(r0 + i);
        }
      }
  _tile_release();
  finish(s, table, g, start, n, block);
}

}  // namespace

bool coarse_ready() {  // Linux wants to be asked for the tile registers (18), by ARCH_REQ_XCOMP_PERM, once a process
  static const bool ready = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return ready;
}

Coarse coarse_search(const Search& s, const Table& table, const Parallel& parallel) {
  // Fewer rows, codes or dimensions are scored in float32 before their bounds are known.
  if (s.n_rows < 256 || s.n_codes * s.dim < 1 << 16 || s.k > s.n_codes / 16 || !coarse_ready()) return {};
  std::vector<CodesInBfloat16> groups;
  for (int64_t g = 0; g < s.n_groups; g++) groups.emplace_back(s, table, g, parallel);
  return [&s, &table, groups = std::move(groups)](int64_t g, int64_t start, int64_t n) {
    search_block(s, table, groups[g], g, start, n);
  };
}
}  // namespace minicode
#else
bool minicode::coarse_ready() { return false; }
minicode::Coarse minicode::coarse_search(const Search&, const Table&, const Parallel&) { return {}; }
#endif
