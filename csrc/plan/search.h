// Exit thresholds of least mean cost under a budget of lost answers, over rows that were scored once.
#pragma once
#include <cstdint>
#include <vector>

namespace fastee::plan {

// What a threshold vector does on the rows: sums over rows, so that equal policies compare equal.
struct PolicyValue {
  double cost = 0.0;           // mean
  int64_t loss = 0;            // sum of loss over rows
  std::vector<int64_t> exits;  // [K + 1] rows that leave there
};

struct SearchResult {
  std::vector<double> thresholds;  // [K], +inf = off
  PolicyValue value;
  bool exact = true;          // no vector of the grid is cheaper within the budget
  double grid_cost = 0.0;     // mean cost of the best vector of the grid, before refinement between grid points
  int64_t policies = 0;       // vectors of the grid that were weighed one by one; the rest was cut by bounds
};

// N rows, K exits. `score` [N, K] row-major, NaN never leaves; `loss` [N, K] in {-1, 0, 1}: what leaving at k loses against
// the end; `cost` [K + 1] of leaving at k, the last is the end.
class ThresholdSearch {
 public:
  ThresholdSearch(const double* score, const int8_t* loss, const double* cost, int64_t rows, int exits);

  int64_t rows() const { return n_; }
  int exits() const { return k_; }

  // Thresholds [K]; no NaN.
  PolicyValue evaluate(const double* thresholds) const;

  // The cheapest vector of the grid whose summed loss is <= max_loss, then moved threshold by threshold to the best score of a row.
  // grid[k]: thresholds to try at exit k beside +inf. Weighs at most max_policies vectors; beyond, coordinate descent alone and
  // exact = false.
  SearchResult search(const std::vector<std::vector<double>>& grid, int64_t max_loss, bool refine, int64_t max_policies) const;

  // At most `levels` scores per exit, at even ranks among the finite ones.
  std::vector<std::vector<double>> quantile_grid(int levels) const;

 private:
  struct Grid;
  int32_t cut_of(int k, double threshold) const;  // rows with rank >= cut reach the threshold
  void tally(const int32_t* cuts, int64_t* exits, int64_t* loss) const;
  double mean_cost(const int64_t* exits) const;
  void descend(std::vector<int32_t>& cuts, int64_t max_loss) const;
  void descend_on(const Grid& grid, std::vector<int>& level, int64_t max_loss) const;
  void enumerate(const Grid& grid, std::vector<int>& best, double& best_cost, int64_t max_loss, int64_t& policies) const;

  int64_t n_;
  int k_;
  std::vector<double> cost_;                  // [K + 1]
  std::vector<std::vector<double>> sorted_;   // [K][<= N] scores but NaN, ascending
  std::vector<std::vector<int32_t>> order_;   // [K][<= N] their rows
  std::vector<int32_t> rank_;                 // [K, N] place in sorted_, ties share the lowest; -1 = never leaves
  std::vector<int32_t> loss_;                 // [K, N]
};

}  // namespace fastee::plan
