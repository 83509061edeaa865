#include "plan/search.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "plan/problem.h"

namespace fastee::plan {
namespace {

constexpr int kBlock = 1024;  // rows whose "still inside" flags stay in the first-level cache

// Bits that order as the doubles do.
uint64_t ordered(double value) {
  const auto bits = std::bit_cast<uint64_t>(value == 0.0 ? 0.0 : value);
  return bits & (uint64_t{1} << 63) ? ~bits : bits | (uint64_t{1} << 63);
}

struct Keyed {
  uint64_t key;
  int32_t row;
};

// Stable, ascending. Radix, because std::sort of 10,000 x 4 scores alone took longer than the whole search; digits that all keys
// share are skipped, which halves the work for scores that were fp32.
void radix_sort(std::vector<Keyed>& items, std::vector<Keyed>& other) {
  constexpr int kBits = 11, kSize = 1 << kBits;
  other.resize(items.size());
  std::array<int32_t, kSize> count;
  for (int shift = 0; shift < 64; shift += kBits) {
    count.fill(0);
    for (const Keyed& item : items) ++count[(item.key >> shift) & (kSize - 1)];
    if (!items.empty() && count[(items[0].key >> shift) & (kSize - 1)] == static_cast<int32_t>(items.size())) continue;
    int32_t total = 0;
    for (int32_t& c : count) total += std::exchange(c, total);
    for (const Keyed& item : items) other[count[(item.key >> shift) & (kSize - 1)]++] = item;
    items.swap(other);
  }
}

}  // namespace

// The rows as levels of the grid: level[k][i] = how many grid thresholds row i reaches at exit k. A choice c at exit k lets rows of
// level >= c leave: c = 1 is the lowest threshold, c = size + 1 is off.
struct ThresholdSearch::Grid {
  std::vector<std::vector<double>> points;  // [K] ascending, finite or -inf
  std::vector<int> size;                    // [K]
  std::vector<std::vector<uint8_t>> level;  // [K][N]
  static constexpr int kMaxSize = 254;
};

ThresholdSearch::ThresholdSearch(const double* score, const int8_t* loss, const double* cost, int64_t rows, int exits)
    : n_(rows), k_(exits), cost_(cost, cost + exits + 1), sorted_(exits), order_(exits) {
  if (rows < 1 || rows > (int64_t{1} << 30) || exits < 1 || exits > 1023)
    throw std::invalid_argument("search: expected 1..2^30 rows and 1..1023 exits, got " + std::to_string(rows) + " and " + std::to_string(exits));
  for (double c : cost_)
    if (!std::isfinite(c) || c < 0) throw std::invalid_argument("search: cost must be finite and >= 0, got " + std::to_string(c));
  rank_.assign(static_cast<size_t>(k_) * n_, -1);
  loss_.resize(rank_.size());
  std::vector<Keyed> items, other;
  for (int k = 0; k < k_; ++k) {
    items.clear();
    for (int64_t i = 0; i < n_; ++i) {
      loss_[k * n_ + i] = loss[i * k_ + k];
      const double u = score[i * k_ + k];
      if (!std::isnan(u)) items.push_back({ordered(u), static_cast<int32_t>(i)});
    }
    radix_sort(items, other);
    int32_t first = 0;
    for (size_t j = 0; j < items.size(); ++j) {
      if (j > 0 && items[j].key != items[j - 1].key) first = static_cast<int32_t>(j);
      rank_[k * n_ + items[j].row] = first;
      order_[k].push_back(items[j].row);
      sorted_[k].push_back(score[static_cast<int64_t>(items[j].row) * k_ + k]);
    }
  }
}

int32_t ThresholdSearch::cut_of(int k, double threshold) const {
  if (threshold == kInf) return std::numeric_limits<int32_t>::max();
  return static_cast<int32_t>(std::lower_bound(sorted_[k].begin(), sorted_[k].end(), threshold) - sorted_[k].begin());
}

void ThresholdSearch::tally(const int32_t* cuts, int64_t* exits, int64_t* loss) const {
  std::fill(exits, exits + k_ + 1, 0);
  *loss = 0;
  std::array<int32_t, kBlock> inside;
  for (int64_t start = 0; start < n_; start += kBlock) {
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, n_ - start));
    for (int i = 0; i < rows; ++i) inside[i] = -1;
    int32_t left = rows;
    for (int k = 0; k < k_; ++k) {
      const int32_t* rank = &rank_[k * n_ + start];
      const int32_t* lost = &loss_[k * n_ + start];
      const int32_t cut = cuts[k];
      int32_t leave = 0, sum = 0;
      for (int i = 0; i < rows; ++i) {
        const int32_t take = inside[i] & -static_cast<int32_t>(rank[i] >= cut);
        leave -= take;
        sum += take & lost[i];
        inside[i] &= ~take;
      }
      exits[k] += leave;
      *loss += sum;
      left -= leave;
    }
    exits[k_] += left;
  }
}

double ThresholdSearch::mean_cost(const int64_t* exits) const {
  double total = 0.0;
  for (int k = 0; k <= k_; ++k) total += cost_[k] * static_cast<double>(exits[k]);
  return total / static_cast<double>(n_);
}

PolicyValue ThresholdSearch::evaluate(const double* thresholds) const {
  PolicyValue value;
  value.exits.resize(k_ + 1);
  std::vector<int32_t> cuts(k_);
  for (int k = 0; k < k_; ++k) cuts[k] = cut_of(k, thresholds[k]);
  tally(cuts.data(), value.exits.data(), &value.loss);
  value.cost = mean_cost(value.exits.data());
  return value;
}

std::vector<std::vector<double>> ThresholdSearch::quantile_grid(int levels) const {
  std::vector<std::vector<double>> grid(k_);
  for (int k = 0; k < k_; ++k) {
    // Infinite scores stay out: as a threshold +inf means off, and -inf lets every row leave that has a score.
    const auto begin = std::upper_bound(sorted_[k].begin(), sorted_[k].end(), -kInf);
    const int64_t count = std::lower_bound(begin, sorted_[k].end(), kInf) - begin;
    for (int j = 0; j < levels && count > 0; ++j) {
      const double value = begin[count * j / levels];
      if (grid[k].empty() || value != grid[k].back()) grid[k].push_back(value);
    }
  }
  return grid;
}

// One threshold at a time, over every score of a row, until none improves. Never leaves the budget once inside.
void ThresholdSearch::descend(std::vector<int32_t>& cuts, int64_t max_loss) const {
  std::vector<int32_t> at(n_);
  for (int sweep = 0; sweep < 16; ++sweep) {
    bool moved = false;
    for (int k = k_ - 1; k >= 0; --k) {
      const auto& order = order_[k];
      const int32_t* rank = &rank_[k * n_];
      // Where each row would leave if exit k were off, and whether it reaches k at all.
      int64_t base = 0;
      for (int64_t i = 0; i < n_; ++i) {
        int32_t to = k_;
        for (int j = k_ - 1; j >= 0; --j) to = j != k && rank_[j * n_ + i] >= cuts[j] ? j : to;
        at[i] = to;
        if (to < k_) base += loss_[to * n_ + i];
      }
      double saved = 0.0, best = 0.0, current = 0.0;
      int64_t lost = base;
      int32_t best_cut = std::numeric_limits<int32_t>::max();
      bool legal = base <= max_loss;
      for (int64_t j = static_cast<int64_t>(order.size()) - 1; j >= 0; --j) {
        const int32_t row = order[j], to = at[row];
        if (to > k) {
          saved += cost_[k] - cost_[to];
          lost += loss_[k * n_ + row] - (to < k_ ? loss_[to * n_ + row] : 0);
        }
        if (rank[row] != j) continue;  // a tie: it leaves together with the next
        if (rank[row] >= cuts[k]) current = saved;
        if (lost <= max_loss && sorted_[k][j] < kInf && (!legal || saved < best)) {
          best = saved;
          best_cut = rank[row];
          legal = true;
        }
      }
      if (legal && best_cut != cuts[k] && best < current - 1e-9 * std::fabs(current)) {
        cuts[k] = best_cut;
        moved = true;
      }
    }
    if (!moved) return;
  }
}

void ThresholdSearch::descend_on(const Grid& grid, std::vector<int>& level, int64_t max_loss) const {
  std::vector<int64_t> count, lost;
  for (int sweep = 0; sweep < 16; ++sweep) {
    bool moved = false;
    for (int k = k_ - 1; k >= 0; --k) {
      const int size = grid.size[k];
      std::vector<double> saved(size + 1, 0.0);
      lost.assign(size + 1, 0);
      int64_t base = 0;
      for (int64_t i = 0; i < n_; ++i) {
        int to = k_;
        for (int j = k_ - 1; j >= 0; --j) to = j != k && grid.level[j][i] >= level[j] ? j : to;
        const int64_t there = to < k_ ? loss_[to * n_ + i] : 0;
        base += there;
        if (to > k) {
          saved[grid.level[k][i]] += cost_[k] - cost_[to];
          lost[grid.level[k][i]] += loss_[k * n_ + i] - there;
        }
      }
      double best = 0.0, sum = 0.0, current = 0.0;
      int64_t loss = base;
      int choice = size + 1;
      bool legal = base <= max_loss;
      for (int c = size; c >= 1; --c) {
        sum += saved[c];
        loss += lost[c];
        if (c == level[k]) current = sum;
        if (loss <= max_loss && (!legal || sum < best)) {
          best = sum;
          choice = c;
          legal = true;
        }
      }
      if (legal && choice != level[k] && best < current - 1e-9 * std::fabs(current)) {
        level[k] = choice;
        moved = true;
      }
    }
    if (!moved) return;
  }
}

// Depth first over the exits but the last two; those are weighed together from one two-dimensional table of the rows still
// inside. Going through the choices of an exit from the lowest threshold up, rows only ever join the table.
void ThresholdSearch::enumerate(const Grid& grid, std::vector<int>& best, double& best_cost, int64_t max_loss, int64_t& policies) const {
  const int a = k_ - 2, b = k_ - 1, outer = std::max(0, k_ - 2);
  const int size_a = a >= 0 ? grid.size[a] : 0, size_b = grid.size[b];
  const int width = size_b + 2;
  // Cheapest cost and smallest loss that a row inside can still reach from exit k on.
  std::vector<double> cheapest(k_ + 1);
  cheapest[k_] = cost_[k_];
  for (int k = k_ - 1; k >= 0; --k) cheapest[k] = std::min(cost_[k], cheapest[k + 1]);
  std::vector<int32_t> gain((k_ + 1) * n_, 0);  // [K + 1, N] the least loss from exit k on, <= 0
  for (int k = k_ - 1; k >= 0; --k)
    for (int64_t i = 0; i < n_; ++i) gain[k * n_ + i] = std::min(gain[(k + 1) * n_ + i], loss_[k * n_ + i]);

  // Rows by (level at a, level at b): how many, their loss at b; by level at a: how many, their loss at a.
  std::vector<int32_t> count((size_a + 1) * width), lost(count.size()), count_a(size_a + 2), lost_a(size_a + 2), sum_count(width), sum_lost(width);
  std::vector<int> choice(k_);
  const double total = static_cast<double>(n_);

  const auto weigh = [&](int64_t inside, double base_cost, int64_t base_loss) {
    std::fill(sum_count.begin(), sum_count.end(), 0);
    std::fill(sum_lost.begin(), sum_lost.end(), 0);
    int64_t leave_a = 0, loss_a = 0;
    for (int l = 0; l <= size_a; ++l) {
      leave_a += count_a[l];
      loss_a += lost_a[l];
    }
    const double end = cost_[k_], save_b = cost_[b] - end;
    for (int c = 1; c <= size_a + 1; ++c) {  // rows of level < c pass exit a
      const int32_t* row_count = &count[(c - 1) * width];
      const int32_t* row_lost = &lost[(c - 1) * width];
      int32_t running = 0, running_lost = 0;
      for (int l = size_b; l >= 0; --l) {
        running += row_count[l];
        running_lost += row_lost[l];
        sum_count[l] += running;
        sum_lost[l] += running_lost;
      }
      leave_a -= count_a[c - 1];
      loss_a -= lost_a[c - 1];
      const double cost_a = base_cost + (a >= 0 ? cost_[a] * static_cast<double>(leave_a) : 0.0) + end * static_cast<double>(inside - leave_a);
      if (cost_a + std::min(0.0, save_b * static_cast<double>(inside - leave_a)) >= best_cost) continue;
      policies += size_b + 1;
      const int64_t room = max_loss - base_loss - loss_a;
      for (int d = 1; d <= size_b + 1; ++d) {  // sum_*[size_b + 1] stays 0: off
        const double cost = cost_a + save_b * static_cast<double>(sum_count[d]);
        if (sum_lost[d] <= room && cost < best_cost) {
          best_cost = cost;
          best = choice;
          if (a >= 0) best[a] = c;
          best[b] = d;
        }
      }
    }
  };
  const auto join = [&](const int32_t* begin, const int32_t* end) {
    for (const int32_t* p = begin; p != end; ++p) {
      const int la = a >= 0 ? grid.level[a][*p] : 0, lb = grid.level[b][*p];
      ++count[la * width + lb];
      lost[la * width + lb] += loss_[b * n_ + *p];
      ++count_a[la];
      if (a >= 0) lost_a[la] += loss_[a * n_ + *p];
    }
  };

  // rows[k]: the rows that reach exit k, ordered by their level there.
  std::vector<std::vector<int32_t>> rows(outer + 1, std::vector<int32_t>(n_));
  std::vector<std::vector<int32_t>> ends(outer);  // where each level of exit k ends within rows[k]
  const auto sort_levels = [&](int k, const int32_t* begin, int64_t number) {
    auto& at = ends[k];
    at.assign(grid.size[k] + 2, 0);
    for (int64_t i = 0; i < number; ++i) ++at[grid.level[k][begin[i]] + 1];
    for (int l = 1; l < grid.size[k] + 2; ++l) at[l] += at[l - 1];
    for (int64_t i = 0; i < number; ++i) rows[k][at[grid.level[k][begin[i]]]++] = begin[i];
  };

  const auto visit = [&](auto&& self, int k, int64_t number, double base_cost, int64_t base_loss) -> void {
    // `number` rows reach exit k < outer and lie sorted in rows[k]; ends[k][l] = rows of level <= l.
    const int size = grid.size[k];
    const std::vector<int32_t> at(ends[k].begin(), ends[k].begin() + size + 1);
    const bool last = k + 1 == outer;
    int64_t leave_loss = 0, inside_gain = 0;
    for (int64_t i = 0; i < number; ++i) leave_loss += loss_[k * n_ + rows[k][i]];
    if (last) {
      std::fill(count.begin(), count.end(), 0);
      std::fill(lost.begin(), lost.end(), 0);
      std::fill(count_a.begin(), count_a.end(), 0);
      std::fill(lost_a.begin(), lost_a.end(), 0);
    }
    int64_t joined = 0, inside = 0;
    for (int c = 1; c <= size + 1; ++c) {
      const int64_t next = at[c - 1];
      for (int64_t i = inside; i < next; ++i) {
        leave_loss -= loss_[k * n_ + rows[k][i]];
        inside_gain += gain[(k + 1) * n_ + rows[k][i]];
      }
      if (c > 1 && next == inside) continue;  // no row lies between the two thresholds: the same policy
      inside = next;
      const double leave_cost = base_cost + cost_[k] * static_cast<double>(number - inside);
      if (leave_cost + cheapest[k + 1] * static_cast<double>(inside) >= best_cost || base_loss + leave_loss + inside_gain > max_loss) continue;
      choice[k] = c;
      if (last) {
        join(&rows[k][joined], rows[k].data() + inside);
        joined = inside;
        weigh(inside, leave_cost, base_loss + leave_loss);
      } else {
        sort_levels(k + 1, rows[k].data(), inside);
        self(self, k + 1, inside, leave_cost, base_loss + leave_loss);
      }
    }
  };

  best_cost *= total;
  best_cost *= 1.0 - 1e-12;  // sums in another order: only a real improvement replaces the vector in hand
  std::vector<int32_t> all(n_);
  for (int64_t i = 0; i < n_; ++i) all[i] = static_cast<int32_t>(i);
  if (outer == 0) {
    join(all.data(), all.data() + n_);
    weigh(n_, 0.0, 0);
  } else {
    sort_levels(0, all.data(), n_);
    visit(visit, 0, n_, 0.0, 0);
  }
}

SearchResult ThresholdSearch::search(const std::vector<std::vector<double>>& points, int64_t max_loss, bool refine, int64_t max_policies) const {
  if (static_cast<int>(points.size()) != k_)
    throw std::invalid_argument("search: grid must hold " + std::to_string(k_) + " lists of thresholds, got " + std::to_string(points.size()));
  if (max_loss < 0) throw std::invalid_argument("search: max_loss must be >= 0, got " + std::to_string(max_loss));
  Grid grid;
  double combinations = 1.0;
  for (int k = 0; k < k_; ++k) {
    std::vector<double> list;
    for (double p : points[k]) {
      if (std::isnan(p)) throw std::invalid_argument("search: grid must not hold NaN");
      if (p < kInf) list.push_back(p);
    }
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    if (list.size() > Grid::kMaxSize)
      throw std::invalid_argument("search: grid must hold at most 254 thresholds per exit, got " + std::to_string(list.size()));
    grid.points.push_back(list);
    grid.size.push_back(static_cast<int>(list.size()));
    combinations *= static_cast<double>(list.size() + 1);
    // Level by rank: a row reaches as many grid points as have a cut at or below its rank.
    std::vector<uint8_t> by_rank(sorted_[k].size() + 1);
    int reached = 0;
    for (size_t r = 0; r < sorted_[k].size(); ++r) {
      while (reached < grid.size[k] && list[reached] <= sorted_[k][r]) ++reached;
      by_rank[r] = static_cast<uint8_t>(reached);
    }
    std::vector<uint8_t> level(n_, 0);
    for (int64_t i = 0; i < n_; ++i)
      if (rank_[k * n_ + i] >= 0) level[i] = by_rank[rank_[k * n_ + i]];
    grid.level.push_back(std::move(level));
  }
  std::vector<int> best(k_);
  for (int k = 0; k < k_; ++k) best[k] = grid.size[k] + 1;
  descend_on(grid, best, max_loss);

  const auto cuts_of = [&](const std::vector<int>& level) {
    std::vector<int32_t> cuts(k_);
    for (int k = 0; k < k_; ++k) cuts[k] = cut_of(k, level[k] > grid.size[k] ? kInf : grid.points[k][level[k] - 1]);
    return cuts;
  };
  const auto value_of = [&](const std::vector<int32_t>& cuts) {
    PolicyValue value;
    value.exits.resize(k_ + 1);
    tally(cuts.data(), value.exits.data(), &value.loss);
    value.cost = mean_cost(value.exits.data());
    return value;
  };

  SearchResult result;
  result.value = value_of(cuts_of(best));
  result.exact = combinations <= static_cast<double>(max_policies);
  if (result.exact) {
    double cost = result.value.cost;
    enumerate(grid, best, cost, max_loss, result.policies);
  }
  std::vector<int32_t> cuts = cuts_of(best);
  result.value = value_of(cuts);
  result.grid_cost = result.value.cost;
  for (int k = 0; k < k_; ++k) result.thresholds.push_back(best[k] > grid.size[k] ? kInf : grid.points[k][best[k] - 1]);
  if (refine) {
    const std::vector<int32_t> before = cuts;
    descend(cuts, max_loss);
    const PolicyValue refined = value_of(cuts);
    if (refined.loss <= max_loss && refined.cost < result.value.cost) {
      result.value = refined;
      for (int k = 0; k < k_; ++k)
        if (cuts[k] != before[k]) result.thresholds[k] = cuts[k] >= static_cast<int32_t>(sorted_[k].size()) ? kInf : sorted_[k][cuts[k]];
    }
  }
  return result;
}

}  // namespace fastee::plan
