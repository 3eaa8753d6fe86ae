// The codes that may be among the k best of a row, for all searches on a CPU: a list for each row, which grows until it is
// full and is then cut back. What a row's next candidate must exceed, its floor, is what the tiles compare with: nearly
// all scores are below it, and cost one comparison. In a search that is exact it is the k-th best score so far; in a coarse
// one less, by the slack, as an error may have moved both.
//
//     scores of a row     . . x . . . . . x . . . . . . . . x . .       x: above its floor, into the list
//     its list            x x x x x x x x x x | cut |  x x x            the k best and what is less than `slack` below
#pragma once
#include "topk_cpu.h"

namespace minicode {
// Whole numbers that rank as floats do, without a gap: the next one is the next float.
inline int32_t rank_of(float score) {
  const int32_t bits = std::bit_cast<int32_t>(score);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}
inline float of_rank(int32_t rank) { return rank < 0 ? -std::bit_cast<float>(-rank) : std::bit_cast<float>(rank); }

// Each list is in the order of its ids.
struct Candidates {
  const int64_t k, capacity;  // of a list, in whole vectors
  std::vector<vf> room;
  std::vector<int32_t> ids;
  std::vector<int64_t> sizes, full;  // full: at how many a list is cut
  std::vector<vf> floors;            // what the next score must exceed; of whole panels, those of no row infinite
  std::vector<float> slack;
  std::vector<std::pair<float, int32_t>> best;  // room to sort the last

  Candidates(int64_t n, int64_t k, int64_t most)
      : k(k), capacity(up(most, W)), room(n * capacity / W), ids(n * capacity), sizes(n), full(n, std::min(capacity, 2 * k + 16)),
        floors(up(n, R) / W, vf{} + inf), slack(n) {
    std::fill_n((float*)floors.data(), n, -inf);
  }
  float& floor(int64_t row) { return ((float*)floors.data())[row]; }
  float* scores_of(int64_t row) { return (float*)room.data() + row * capacity; }
  int32_t* ids_of(int64_t row) { return ids.data() + row * capacity; }
  bool given_up(int64_t row) const { return sizes[row] < 0; }
  void give_up(int64_t row) { sizes[row] = -1, floor(row) = inf; }

  void add(int64_t row, float score, int32_t id) {
    scores_of(row)[sizes[row]] = score + 0.0f;  // -0 ranks as 0 does
    ids_of(row)[sizes[row]++] = id;
    if (k == 1) floor(row) = std::max(floor(row), score - slack[row]);
    if (sizes[row] == full[row]) shrink(row);
  }
  // The scores of a panel of rows, the first of them `row`. That one exceeds its floor is rare.
  void offer(int64_t row, const vf (&scores)[NV], int32_t id) {
    uint32_t rows = 0;
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) rows |= exceed(scores[v], floors[row / W + v]) << v * W;
    if (rows) [[unlikely]] add_some(row, scores, id, rows);
  }
  [[gnu::noinline]] void add_some(int64_t row, const vf (&scores)[NV], int32_t id, uint32_t rows) {
    for (; rows; rows &= rows - 1) {
      const int i = __builtin_ctz(rows);
      add(row + i, scores[i / W][i % W], id);
    }
  }
  // Drops what can't be among the k best; a list that stays full gives its row up.
  [[gnu::noinline]] void shrink(int64_t row) {
    if (sizes[row] < k) return;  // given up, or all may be needed
    if (slack[row] == 0) {
      floor(row) = keep_best(row);
    } else {
      floor(row) = kth_floor(row) - slack[row];
      keep_above(row, floor(row));
    }
    full[row] = std::min(capacity, 2 * sizes[row] + 16);
    if (sizes[row] > capacity - capacity / 8) give_up(row);
  }
  // Keeps the k best, of equals the first; returns the k-th score.
  float keep_best(int64_t row) {
    keep_above(row, kth_floor(row));
    float* scores = scores_of(row);
    const float least = *std::min_element(scores, scores + sizes[row]);
    int64_t too_many = sizes[row] - k, first = sizes[row];
    while (too_many > 0) too_many -= scores[--first] == least;
    int64_t kept = first;  // behind it the least are dropped
    for (int64_t i = first; i < sizes[row]; i++)
      if (scores[i] != least) scores[kept] = scores[i], ids_of(row)[kept++] = ids_of(row)[i];
    sizes[row] = kept;
    return least;
  }
  // What the k best scores exceed, and no other, but for those that equal the k-th: by halving the interval in which it
  // lies. No branch depends on a single score.
  float kth_floor(int64_t row) {
    float* scores = scores_of(row);
    const int64_t n = sizes[row], whole = up(n, W);
    std::fill(scores + n, scores + whole, scores[0]);
    vf least = load(scores), most = least;
    for (int64_t i = W; i < whole; i += W) {
      const vf some = load(scores + i);
      least = some < least ? some : least;
      most = some > most ? some : most;
    }
    // Below it also where denormals count as 0.
    auto just_below = [](float score) { return rank_of(score - std::numeric_limits<float>::min()) - 1; };
    const float greatest = *std::max_element((float*)&most, (float*)&most + W);
    if (k == 1) return of_rank(just_below(greatest));
    int64_t low = just_below(*std::min_element((float*)&least, (float*)&least + W)), high = rank_of(greatest);
    std::fill(scores + n, scores + whole, -inf);
    while (high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      const vf floor = vf{} + of_rank(middle);
      int64_t above = 0;
      for (int64_t i = 0; i < whole; i += W) above += std::popcount(exceed(load(scores + i), floor));
      if (above == k) return of_rank(middle);
      (above > k ? low : high) = middle;
    }
    return of_rank(low);
  }
  void keep_above(int64_t row, float floor) {
    float* scores = scores_of(row);
    int32_t* ids = ids_of(row);
    int64_t kept = 0;
    for (int64_t i = 0; i < sizes[row]; i++) {
      const float score = scores[i];
      scores[kept] = score;
      ids[kept] = ids[i];
      kept += score > floor;
    }
    sizes[row] = kept;
  }
  // Writes the k best in order, of equals the lower ids. What is missing scored -inf or NaN: the lowest ids that are not here.
  void write(int64_t row, float* scores, int64_t* ids) {
    if (sizes[row] > k) keep_best(row);
    const int64_t size = sizes[row];
    best.resize(size);
    for (int64_t i = 0; i < size; i++) best[i] = {-scores_of(row)[i], ids_of(row)[i]};
    std::sort(best.begin(), best.end());
    for (int64_t i = 0; i < size; i++) scores[i] = -best[i].first, ids[i] = best[i].second;
    std::vector<int64_t> there(size < k ? ids : ids + size, ids + size);
    std::sort(there.begin(), there.end());
    auto seen = there.begin();
    for (int64_t i = size, next = 0; i < k; next++) {
      if (seen != there.end() && *seen == next) seen++;
      else scores[i] = -inf, ids[i++] = next;
    }
  }
};
}  // namespace minicode
