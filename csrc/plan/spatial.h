// Spatial split of a CNN: which rows of which layers run on which provider, and when the answer is there.
// Geometry (the Vertical-Splitting Law), the latency recursion and the LC-PSS score; the search stands in spatial_search.h.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

namespace fastee::plan {

constexpr double kNever = std::numeric_limits<double>::infinity();

struct Rows {
  int lo = 0, hi = 0;  // [lo, hi)
  bool empty() const { return lo >= hi; }
};

// One layer of the spatial prefix, in topological order. `padding` is the top padding; the bottom follows from out_h, so that
// ceil_mode and asymmetric padding need nothing of their own. add and cat are layers of kernel 1.
struct SpatialLayer {
  int kernel = 1, stride = 1, padding = 0, dilation = 1, in_h = 1, out_h = 1;
  double row_bytes = 0, row_macs = 0;  // of one output row
  std::vector<int> inputs;             // indices of the producers, -1 = the net's input
};

struct SpatialNet {
  std::vector<SpatialLayer> layers;
  int input_h = 1;
  double input_row_bytes = 0;
};

struct SpatialLinks {
  std::vector<double> rates;  // access rate of each provider, bit/s
  std::vector<char> up;
  double requester = kNever;  // access rate of the node that sends the input, bit/s
  double latency = 0;         // seconds before the scatter arrives
  bool contention = false;    // transfers leaving one node are serialised, receivers in order of their index
};

// Rows of the input that rows `out` of the output need; empty stays empty.
inline Rows input_rows(const SpatialLayer& l, Rows out) {
  if (out.empty()) return {};
  const int lo = out.lo * l.stride - l.padding;
  const int hi = (out.hi - 1) * l.stride - l.padding + l.dilation * (l.kernel - 1) + 1;
  const Rows in{lo > 0 ? lo : 0, hi < l.in_h ? hi : l.in_h};
  return in.empty() ? Rows{} : in;
}

// What one provider does in one volume.
struct Part {
  double seconds = 0;
  Rows input;         // rows it needs of what the volume reads
  bool used = false;  // it produces at least one row
};

// Volumes are [bounds[j], bounds[j+1]) in layers; cuts hold N+1 row numbers per volume, 0 = e_0 <= ... <= e_N = H_j.
struct SpatialPlan {
  std::vector<int> bounds, cuts;
  double latency = kNever;
};

class SpatialModel {
 public:
  // times: [N][sum over layers of out_h + 1] seconds for 0..out_h rows; tail: [N] seconds of what follows on the root.
  SpatialModel(SpatialNet net, std::vector<double> times, std::vector<double> tail);
  void set_links(SpatialLinks links);

  int layers() const { return static_cast<int>(net_.layers.size()); }
  int providers() const { return providers_; }
  int root() const { return root_; }
  int height(int bound) const { return bound == 0 ? net_.input_h : net_.layers[bound - 1].out_h; }
  double row_bytes(int bound) const { return bound == 0 ? net_.input_row_bytes : net_.layers[bound - 1].row_bytes; }
  const std::vector<int>& cut_points() const { return cut_points_; }  // 0, ..., L: bounds that a single tensor crosses
  bool is_cut_point(int bound) const { return bound >= 0 && bound <= layers() && crossing_ok_[bound]; }
  const SpatialLinks& links() const { return links_; }
  int sure_rows(int layer) const { return sure_rows_[layer]; }  // rows of a layer that some row of the net's output needs
  double whole_seconds(int provider) const { return whole_[provider]; }  // all rows of all layers, and the tail
  double tail_seconds(int provider) const { return tail_[provider]; }  // seconds of what follows there
  double layer_seconds(int provider, int layer, int rows) const { return times_[provider * stride_ + offset_[layer] + rows]; }

  Part part(int provider, int begin, int end, Rows out) const;
  // Call f(s, seconds) for everyone else who owns some of rows `in` under the cuts `before`: how long they are on their way.
  template <typename F>
  void for_senders(int provider, int begin, Rows in, const int* before, F f) const {
    const double bytes = row_bytes(begin);
    const double* pace = pace_.data() + provider * providers_;
    int s = provider;
    while (s > 0 && before[s] > in.lo) --s;
    while (before[s + 1] <= in.lo) ++s;
    for (; s < providers_ && before[s] < in.hi; ++s) {
      const int rows = (in.hi < before[s + 1] ? in.hi : before[s + 1]) - (in.lo > before[s] ? in.lo : before[s]);
      if (s != provider && rows > 0) f(s, bytes * rows * pace[s]);
    }
  }
  // When a provider has rows `in` of what the volume from `begin` on reads: from the requester (`before` null), else from those that own
  // them under the cuts `before` and finished the volume before at `finish`; `from`: whom it waits for. Contention is not looked at.
  double ready(int provider, int begin, Rows in, const int* before, const double* finish, int* from = nullptr) const {
    if (from != nullptr) *from = provider;
    if (in.empty()) return finish[provider];
    if (before == nullptr) return links_.latency + row_bytes(begin) * (in.hi - in.lo) * scatter_pace_[provider];
    double at = finish[provider];
    for_senders(provider, begin, in, before, [&](int s, double seconds) {
      const double arrives = finish[s] + seconds;
      if (!(arrives > at)) return;
      at = arrives;
      if (from != nullptr) *from = s;
    });
    return at;
  }
  // The way back: `at`, the longest way from when a provider has its rows to the end, lifts that of everyone who sends it some of them.
  void ready_ahead(int provider, int begin, Rows in, const int* before, double at, double* ahead) const {
    for_senders(provider, begin, in, before, [&](int s, double seconds) {
      if (at + seconds > ahead[s]) ahead[s] = at + seconds;
    });
  }
  // Seconds until the last rows of a provider are at the root.
  double gather_seconds(int provider, int rows) const {
    return provider == root_ || rows == 0 ? 0.0 : row_bytes(layers()) * rows * pace_[root_ * providers_ + provider];
  }
  void gather_ahead(const int* cuts, double* ahead) const {
    for (int d = 0; d < providers_; ++d) ahead[d] = gather_seconds(d, cuts[d + 1] - cuts[d]) + tail_[root_];
  }
  // One step of the recursion: when every provider has finished volume `begin..`, from when it had finished the one before.
  // `before` are the cuts of the volume before, null for the first; `finish` and `next` may not overlap.
  void advance(int begin, const Part* parts, const int* before, const double* finish, double* next) const;
  double gather(const int* last_cuts, const double* finish, int* from = nullptr) const;  // T_end; `from`: who is last
  // Throws std::invalid_argument on a plan that is none; +inf for one that cannot run.
  double latency(const std::vector<int>& bounds, const std::vector<int>& cuts, std::vector<double>* finish = nullptr) const;

  // Mean bytes moved at the start of volume [begin, end) and mean MACs in it, over split vectors in [0,1]^(N-1) (R rows, sorted), for
  // every cut point begin < end, in their order.
  void volume_costs(int end, const double* vectors, int count, double* bytes, double* macs) const;
  std::vector<int> lcpss(const double* vectors, int count, double alpha, std::vector<double>* scores = nullptr) const;

  mutable int64_t work = 0;  // layers and providers visited: a clock for budgets that does not depend on the machine

 private:
  SpatialNet net_;
  SpatialLinks links_;
  std::vector<double> times_, tail_, whole_, pace_, scatter_pace_;  // pace: seconds per byte, [N, N] and [N]
  std::vector<int> sure_rows_, offset_, cut_points_, input_first_, input_list_;
  std::vector<char> crossing_ok_;
  int providers_ = 0, stride_ = 0, root_ = 0;
  // What row `x` of the output of the layers before a cut point needs of every layer, first and one past the last: [L + 1] numbers at
  // reach_at_[bound] + x * (L + 1), the input first. Both ends of a range of rows move on their own, so a volume's geometry is two looks
  // up. Not filled where a row may need nothing but padding: there the ends depend on each other.
  std::vector<int> first_need_, last_need_, reach_at_;
  mutable std::vector<Rows> need_;
  mutable std::vector<double> sent_;

  void tabulate();
  template <typename Visit>
  Rows walk(int begin, int end, Rows out, Visit visit) const;
};

}  // namespace fastee::plan
