#include "plan/spatial.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fastee::plan {
namespace {

constexpr double kBits = 8.0;
constexpr size_t kMostReach = 1 << 22;  // numbers of a table of the geometry: 32 MB for both

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("spatial: " + what); }

}  // namespace

SpatialModel::SpatialModel(SpatialNet net, std::vector<double> times, std::vector<double> tail)
    : net_(std::move(net)), times_(std::move(times)), tail_(std::move(tail)), providers_(static_cast<int>(tail_.size())) {
  const int count = layers();
  if (count == 0) refuse("layers must not be empty");
  if (providers_ == 0) refuse("tail must hold one value per provider, got none");
  if (net_.input_h < 1 || !(net_.input_row_bytes > 0 && net_.input_row_bytes < kNever))
    refuse("input_h must be >= 1 and input_row_bytes finite and > 0");
  std::vector<int> last_use(count + 1, 0);  // by producer + 1: the last layer that reads it
  input_first_.push_back(0);
  for (int i = 0; i < count; ++i) {
    const SpatialLayer& l = net_.layers[i];
    const std::string name = "layer " + std::to_string(i);
    if (l.kernel < 1 || l.stride < 1 || l.dilation < 1 || l.padding < 0 || l.in_h < 1 || l.out_h < 1)
      refuse(name + ": kernel, stride, dilation, in_h and out_h must be >= 1 and padding >= 0");
    if (!(l.row_bytes > 0 && l.row_bytes < kNever) || !(l.row_macs >= 0 && l.row_macs < kNever))
      refuse(name + ": row_bytes must be finite and > 0, row_macs finite and >= 0");
    if (l.inputs.empty()) refuse(name + " has no input");
    for (int u : l.inputs) {
      if (u < -1 || u >= i) refuse(name + " reads layer " + std::to_string(u) + ", expected -1.." + std::to_string(i - 1));
      const int h = u < 0 ? net_.input_h : net_.layers[u].out_h;
      if (h != l.in_h) refuse(name + ": in_h is " + std::to_string(l.in_h) + ", its input has " + std::to_string(h) + " rows");
      last_use[u + 1] = i;
      input_list_.push_back(u);
    }
    input_first_.push_back(static_cast<int>(input_list_.size()));
    offset_.push_back(stride_);
    stride_ += l.out_h + 1;
  }
  if (times_.size() != static_cast<size_t>(stride_) * providers_)
    refuse("times must hold " + std::to_string(static_cast<size_t>(stride_) * providers_) + " values, got " + std::to_string(times_.size()));
  for (double t : times_)
    if (!(t >= 0 && t < kNever)) refuse("times must be finite and >= 0, got " + std::to_string(t));
  for (double t : tail_)
    if (!(t >= 0 && t < kNever)) refuse("tail must be finite and >= 0, got " + std::to_string(t));
  crossing_ok_.assign(count + 1, 0);
  for (int bound = 0, deepest = 0; bound <= count; ++bound) {
    // deepest: the last reader of anything produced before the tensor that crosses here
    crossing_ok_[bound] = bound == 0 || bound == count || deepest < bound;
    if (crossing_ok_[bound]) cut_points_.push_back(bound);
    deepest = std::max(deepest, last_use[bound]);
  }
  std::vector<std::vector<char>> needed(count);
  for (int i = 0; i < count; ++i) needed[i].assign(net_.layers[i].out_h, i + 1 == count);
  for (int i = count - 1; i >= 0; --i)
    for (int h = 0; h < net_.layers[i].out_h; ++h)
      for (int u : net_.layers[i].inputs)
        if (needed[i][h] && u >= 0)
          for (int r = input_rows(net_.layers[i], {h, h + 1}).lo; r < input_rows(net_.layers[i], {h, h + 1}).hi; ++r) needed[u][r] = 1;
  for (const auto& rows : needed) sure_rows_.push_back(static_cast<int>(std::count(rows.begin(), rows.end(), 1)));
  for (int d = 0; d < providers_; ++d) {
    double sum = tail_[d];
    for (int i = 0; i < count; ++i) sum += layer_seconds(d, i, net_.layers[i].out_h);
    whole_.push_back(sum);
  }
  need_.resize(count);
  sent_.resize(providers_);
  scatter_pace_.resize(providers_);
  pace_.resize(static_cast<size_t>(providers_) * providers_);
  tabulate();
  links_.rates.assign(providers_, kNever);
  links_.up.assign(providers_, 1);
  set_links(links_);
}

void SpatialModel::set_links(SpatialLinks links) {
  if (links.rates.size() != static_cast<size_t>(providers_) || links.up.size() != static_cast<size_t>(providers_))
    refuse("rates and up must hold " + std::to_string(providers_) + " values, got " + std::to_string(links.rates.size()) + " and " +
           std::to_string(links.up.size()));
  int best = -1;
  for (int d = 0; d < providers_; ++d) {
    if (std::isnan(links.rates[d])) refuse("rates must not be NaN");
    if (links.up[d] && links.rates[d] > 0 && (best < 0 || whole_[d] < whole_[best])) best = d;
  }
  if (std::isnan(links.requester)) refuse("requester must not be NaN");
  if (!(links.latency >= 0 && links.latency < kNever)) refuse("latency must be finite and >= 0");
  root_ = best < 0 ? 0 : best;
  links_ = std::move(links);
  const auto pace = [](double rate) { return rate > 0 ? kBits / rate : kNever; };
  for (int d = 0; d < providers_; ++d) {
    scatter_pace_[d] = pace(std::min(links_.rates[d], links_.requester));
    for (int s = 0; s < providers_; ++s) pace_[d * providers_ + s] = pace(std::min(links_.rates[s], links_.rates[d]));
  }
}

void SpatialModel::tabulate() {
  const int count = layers(), width = count + 1;
  size_t numbers = 0;
  for (int end : cut_points_) numbers += static_cast<size_t>(height(end) + 1) * width;
  if (numbers > kMostReach) return;
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count && sure_rows_[i] == 0) return;
    for (int h = 0; h < net_.layers[i].out_h; ++h)
      if (input_rows(net_.layers[i], {h, h + 1}).empty()) return;
  }
  reach_at_.assign(width, 0);
  for (int end : cut_points_) {
    if (end == 0) continue;
    const int h = height(end);
    reach_at_[end] = static_cast<int>(first_need_.size());
    first_need_.resize(first_need_.size() + static_cast<size_t>(h + 1) * width);
    last_need_.resize(first_need_.size());
    for (int x = 0; x < h; ++x) {  // as the first row, and as the last one of a range that ends at x + 1
      for (int i = 0; i < end; ++i) need_[i] = {};
      need_[end - 1] = {x, x + 1};
      Rows input;
      for (int i = end - 1; i >= 0; --i) {
        if (need_[i].empty()) continue;
        const Rows in = input_rows(net_.layers[i], need_[i]);
        for (int k = input_first_[i]; k < input_first_[i + 1]; ++k) {
          Rows& at = input_list_[k] >= 0 ? need_[input_list_[k]] : input;
          at = at.empty() ? in : Rows{std::min(at.lo, in.lo), std::max(at.hi, in.hi)};
        }
      }
      int* first = first_need_.data() + reach_at_[end] + static_cast<size_t>(x) * width;
      int* last = last_need_.data() + reach_at_[end] + static_cast<size_t>(x + 1) * width;
      first[0] = input.lo;
      last[0] = input.hi;
      for (int i = 0; i < end; ++i) {
        first[i + 1] = need_[i].lo;
        last[i + 1] = need_[i].hi;
      }
    }
  }
}

// Calls visit(layer, rows of its output) from the last layer back; returns the rows of the volume's input. Hull at forks.
template <typename Visit>
Rows SpatialModel::walk(int begin, int end, Rows out, Visit visit) const {
  if (!reach_at_.empty()) {
    work += 2 + (end - begin) / 4;
    const int *first = first_need_.data() + reach_at_[end] + out.lo * (layers() + 1), *last = last_need_.data() + reach_at_[end] + out.hi * (layers() + 1);
    for (int i = end; i > begin; --i) visit(i - 1, Rows{first[i], last[i]});
    return {first[begin], last[begin]};
  }
  work += 2 * (end - begin);
  for (int i = begin; i < end; ++i) need_[i] = {};
  need_[end - 1] = out;
  Rows input;
  for (int i = end - 1; i >= begin; --i) {
    if (need_[i].empty()) continue;
    visit(i, need_[i]);
    const Rows in = input_rows(net_.layers[i], need_[i]);
    if (in.empty()) continue;
    for (int k = input_first_[i]; k < input_first_[i + 1]; ++k) {
      Rows& at = input_list_[k] >= begin ? need_[input_list_[k]] : input;
      at = at.empty() ? in : Rows{std::min(at.lo, in.lo), std::max(at.hi, in.hi)};
    }
  }
  return input;
}

Part SpatialModel::part(int provider, int begin, int end, Rows out) const {
  Part p;
  if (out.empty()) return p;
  const double* times = times_.data() + static_cast<size_t>(provider) * stride_;
  p.used = true;
  p.input = walk(begin, end, out, [&](int i, Rows r) { p.seconds += times[offset_[i] + (r.hi - r.lo)]; });
  if (!links_.up[provider]) p.seconds = kNever;
  return p;
}

void SpatialModel::advance(int begin, const Part* parts, const int* before, const double* finish, double* next) const {
  const int n = providers_;
  work += n;
  if (!links_.contention) {
    for (int d = 0; d < n; ++d) next[d] = parts[d].used ? ready(d, begin, parts[d].input, before, finish) + parts[d].seconds : finish[d];
    return;
  }
  const double bytes = row_bytes(begin);
  std::copy(finish, finish + n, sent_.begin());  // when each has sent what it sends
  double scattered = 0;
  for (int d = 0; d < n; ++d) {
    next[d] = finish[d];
    if (!parts[d].used) continue;
    const Rows in = parts[d].input;
    double at = finish[d];
    if (before == nullptr && !in.empty()) {
      scattered += bytes * (in.hi - in.lo) * scatter_pace_[d];
      at = links_.latency + scattered;
    }
    for (int s = 0; s < n && before != nullptr; ++s) {
      const int rows = std::min(in.hi, before[s + 1]) - std::max(in.lo, before[s]);
      if (s == d || rows <= 0) continue;
      sent_[s] += bytes * rows * pace_[d * n + s];
      at = std::max(at, sent_[s]);
    }
    next[d] = at + parts[d].seconds;
  }
}

double SpatialModel::gather(const int* cuts, const double* finish, int* from) const {
  double end = finish[root_];
  if (from != nullptr) *from = root_;
  for (int d = 0; d < providers_; ++d) {
    const double arrives = finish[d] + gather_seconds(d, cuts[d + 1] - cuts[d]);
    if (!(arrives > end)) continue;
    end = arrives;
    if (from != nullptr) *from = d;
  }
  return end + tail_[root_];
}

double SpatialModel::latency(const std::vector<int>& bounds, const std::vector<int>& cuts, std::vector<double>* finish) const {
  const int n = providers_, volumes = static_cast<int>(bounds.size()) - 1;
  if (volumes < 1 || bounds.front() != 0 || bounds.back() != layers())
    refuse("volumes must go from 0 to " + std::to_string(layers()));
  if (cuts.size() != static_cast<size_t>(volumes) * (n + 1))
    refuse("splits must hold " + std::to_string(volumes) + " x " + std::to_string(n + 1) + " rows, got " + std::to_string(cuts.size()));
  std::vector<double> now(n, 0.0), next(n);
  std::vector<Part> parts(n);
  const int* before = nullptr;
  for (int j = 0; j < volumes; ++j) {
    const int* e = cuts.data() + static_cast<size_t>(j) * (n + 1);
    if (bounds[j + 1] <= bounds[j]) refuse("volumes must rise, got " + std::to_string(bounds[j + 1]) + " after " + std::to_string(bounds[j]));
    if (!is_cut_point(bounds[j + 1])) refuse("several tensors cross after layer " + std::to_string(bounds[j + 1]) + ", a volume cannot end there");
    const int h = height(bounds[j + 1]);
    if (e[0] != 0 || e[n] != h)
      refuse("splits of volume " + std::to_string(j) + " must go from 0 to " + std::to_string(h) + ", got " + std::to_string(e[0]) + ".." + std::to_string(e[n]));
    for (int d = 0; d < n; ++d)
      if (e[d + 1] < e[d]) refuse("splits of volume " + std::to_string(j) + " must not fall, got " + std::to_string(e[d + 1]) + " after " + std::to_string(e[d]));
    for (int d = 0; d < n; ++d) parts[d] = part(d, bounds[j], bounds[j + 1], {e[d], e[d + 1]});
    advance(bounds[j], parts.data(), before, now.data(), next.data());
    now.swap(next);
    if (finish != nullptr) finish->insert(finish->end(), now.begin(), now.end());
    before = e;
  }
  return gather(before, now.data());
}

void SpatialModel::volume_costs(int end, const double* vectors, int count, double* bytes, double* macs) const {
  const int n = providers_, h_out = height(end);
  const int points = static_cast<int>(std::lower_bound(cut_points_.begin(), cut_points_.end(), end) - cut_points_.begin());
  std::fill_n(bytes, points, 0.0);
  std::fill_n(macs, points, 0.0);
  std::vector<Rows> need(layers() + 1);  // one walk to the input serves every volume that ends here: of the input, then of every layer
  for (int r = 0; r < count; ++r) {
    const double* u = vectors + static_cast<size_t>(r) * (n - 1);
    const auto at = [&](int h, int k) { return k == 0 ? 0 : k == n ? h : static_cast<int>(std::floor(h * u[k - 1] + 0.5)); };
    for (int d = 0; d < n; ++d) {
      const Rows out{at(h_out, d), at(h_out, d + 1)};
      if (out.empty()) continue;
      std::fill_n(need.begin(), end + 1, Rows{});
      need[0] = walk(0, end, out, [&](int i, Rows rows) { need[i + 1] = rows; });
      double sum = 0;
      for (int p = points - 1, i = end; p >= 0; --p) {
        const int begin = cut_points_[p], h_in = height(begin);
        for (; i > begin; --i) sum += net_.layers[i - 1].row_macs * std::max(0, need[i].hi - need[i].lo);
        const Rows in = need[begin];
        macs[p] += sum;
        if (in.empty()) continue;
        const int have = begin > 0 ? std::max(0, std::min(in.hi, at(h_in, d + 1)) - std::max(in.lo, at(h_in, d))) : 0;
        bytes[p] += in.hi - in.lo - have;
      }
    }
  }
  for (int p = 0; p < points; ++p) {
    bytes[p] = bytes[p] * row_bytes(cut_points_[p]) / count;
    macs[p] /= count;
  }
}

std::vector<int> SpatialModel::lcpss(const double* vectors, int count, double alpha, std::vector<double>* scores) const {
  // Every volume is split by the same vectors, so its cost does not depend on the other volumes: C(P) is a sum over volumes.
  const int points = static_cast<int>(cut_points_.size());
  std::vector<double> bytes(points * points), macs(points * points);  // [end, begin]
  for (int b = 1; b < points; ++b) volume_costs(cut_points_[b], vectors, count, &bytes[b * points], &macs[b * points]);
  const auto cost = [&](int a, int b, double* t, double* o) {
    *t += bytes[b * points + a];
    *o += macs[b * points + a];
  };
  double t0 = 0, o0 = 0, unused = 0;
  for (int p = 0; p + 1 < points; ++p) cost(p, p + 1, &t0, &unused);
  for (const SpatialLayer& l : net_.layers) o0 += l.row_macs * l.out_h;
  const auto score = [&](const std::vector<int>& at) {
    double t = 0, o = 0;
    for (size_t j = 0; j + 1 < at.size(); ++j) cost(at[j], at[j + 1], &t, &o);
    return (t0 > 0 ? alpha * t / t0 : 0.0) + (o0 > 0 ? (1 - alpha) * o / o0 : 0.0);
  };
  std::vector<int> chosen{0, points - 1};
  double best = score(chosen);
  if (scores != nullptr) scores->push_back(best);
  for (;;) {
    int cut = -1;
    for (int p = 1; p + 1 < points; ++p) {
      if (std::binary_search(chosen.begin(), chosen.end(), p)) continue;
      std::vector<int> with = chosen;
      with.insert(std::upper_bound(with.begin(), with.end(), p), p);
      const double c = score(with);
      if (c < best) {
        best = c;
        cut = p;
      }
    }
    if (cut < 0) break;
    chosen.insert(std::upper_bound(chosen.begin(), chosen.end(), cut), cut);
    if (scores != nullptr) scores->push_back(best);
  }
  std::vector<int> bounds;
  for (int p : chosen) bounds.push_back(cut_points_[p]);
  return bounds;
}

}  // namespace fastee::plan
