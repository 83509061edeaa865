#include "fastee/runner.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/hash.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "json.h"
#include "sched/scheduler.h"

namespace fastee {
namespace {

using runner::Json;
using runner::JsonReader;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kMaxManifest = 4 << 20, kFormat = 1;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string read_file(const std::filesystem::path& path, int64_t limit = std::numeric_limits<int64_t>::max()) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) throw std::runtime_error(path.string() + ": missing; the export is incomplete");
  if (static_cast<int64_t>(size) > limit) throw std::runtime_error(path.string() + ": " + std::to_string(size) + " bytes, expected at most " + std::to_string(limit));
  std::string bytes(size, '\0');
  if (!std::ifstream(path, std::ios::binary).read(bytes.data(), static_cast<std::streamsize>(size))) throw std::runtime_error(path.string() + ": cannot be read");
  return bytes;
}

// The file that `entry` names, once its name is harmless and its bytes are those of this export.
std::string checked(const std::filesystem::path& folder, const Json& entry, std::string* name) {
  *name = entry.string_at("name");
  const bool plain = !name->empty() && std::all_of(name->begin(), name->end(), [](char c) { return std::islower(static_cast<unsigned char>(c)) || std::isdigit(static_cast<unsigned char>(c)) || c == '_' || c == '.'; });
  if (!plain || name->front() == '.') throw std::runtime_error("'" + *name + "' is no name of an exported file");
  std::string bytes = read_file(folder / *name);
  if (c10::sha1(bytes).str() != entry.string_at("digest")) throw std::runtime_error((folder / *name).string() + ": not the file of this export (its digest differs)");
  return bytes;
}

at::ScalarType dtype_of(const std::string& name) {
  static const std::pair<const char*, at::ScalarType> known[] = {{"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf},
      {"bfloat16", at::kBFloat16}, {"int64", at::kLong}, {"int32", at::kInt}, {"int16", at::kShort}, {"int8", at::kChar}, {"uint8", at::kByte}, {"bool", at::kBool}};
  for (const auto& [text, type] : known)
    if (name == text) return type;
  throw std::runtime_error("unknown dtype '" + name + "'");
}

int position(const std::string& value, std::initializer_list<const char*> known, const char* what) {
  int i = 0;
  for (const char* k : known) {
    if (value == k) return i;
    ++i;
  }
  throw std::runtime_error(std::string(what) + " '" + value + "' is unknown");
}

struct Port {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;  // of one row; -1 may vary
};

// A DLTensor over a torch tensor, which must outlive it.
DLTensor view(const at::Tensor& t) {
  uint8_t code = t.is_floating_point() ? kDLFloat : kDLInt;
  if (t.scalar_type() == at::kBFloat16) code = kDLBfloat;
  if (t.scalar_type() == at::kBool) code = kDLBool;
  if (t.scalar_type() == at::kByte) code = kDLUInt;
  return {t.data_ptr(), {kDLCPU, 0}, static_cast<int32_t>(t.dim()), {code, static_cast<uint8_t>(8 * t.element_size()), 1},
          const_cast<int64_t*>(t.sizes().data()), const_cast<int64_t*>(t.strides().data()), 0};
}

void must(fastee_status status) {
  if (status != FASTEE_OK) throw std::invalid_argument(fastee_last_error());
}

struct Head {
  fastee_pool_kind pool;
  fastee_norm_kind norm;
  float eps, temperature;
  int mask;  // entry of the carry, -1 = none
  bool relu;
  at::Tensor weight, bias, norm_weight, norm_bias, last_weight, last_bias;  // undefined where the head has none
  DLTensor views[6];

  // The C ABI's description; `last`: the second of two layers.
  fastee_head describe(fastee_measure measure, double threshold, bool last) const {
    const auto given = [&](const at::Tensor& t, int i) { return t.defined() ? &views[i] : nullptr; };
    if (last) return {FASTEE_POOL_NONE, FASTEE_NORM_NONE, measure, 0.0f, temperature, static_cast<float>(threshold), &views[4], given(last_bias, 5), nullptr, nullptr, nullptr, nullptr};
    const bool two = last_weight.defined();
    return {pool, norm, measure, eps, two ? 1.0f : temperature, static_cast<float>(threshold), &views[0], given(bias, 1), given(norm_weight, 2), given(norm_bias, 3), nullptr, nullptr};
  }
};

// The fp32 tensors of a safetensors file.
std::vector<std::pair<std::string, at::Tensor>> tensors_of(const std::string& bytes) {
  uint64_t length = 0;
  if (bytes.size() < 8) throw std::runtime_error("no safetensors file");
  std::memcpy(&length, bytes.data(), 8);
  if (length > bytes.size() - 8 || length > static_cast<uint64_t>(kMaxManifest)) throw std::runtime_error("its header claims more bytes than there are");
  const Json header = JsonReader(std::string_view(bytes).substr(8, length)).read();
  const uint64_t payload = bytes.size() - 8 - length;
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const auto& [name, entry] : header.members) {
    if (name == "__metadata__") continue;
    if (entry.string_at("dtype") != "F32") throw std::runtime_error("tensor '" + name + "' is not fp32");
    std::vector<int64_t> shape;
    double count = 1;
    for (const Json& d : entry.list_at("shape")) {
      const double size = d.as(Json::kNumber, "shape").number;
      if (!(size >= 0 && size < 1e9) || size != std::floor(size)) throw std::runtime_error("tensor '" + name + "' has an impossible shape");
      shape.push_back(static_cast<int64_t>(size)), count *= size;
    }
    const auto& offsets = entry.list_at("data_offsets");
    if (offsets.size() != 2) throw std::runtime_error("tensor '" + name + "' has no place");
    const double begin = offsets[0].as(Json::kNumber, "data_offsets").number, end = offsets[1].as(Json::kNumber, "data_offsets").number;
    if (!(begin >= 0 && begin <= end && end <= static_cast<double>(payload)) || end - begin != 4 * count) throw std::runtime_error("tensor '" + name + "' does not lie in the file");
    at::Tensor t = at::empty(shape, at::kFloat);
    if (count > 0) std::memcpy(t.data_ptr(), bytes.data() + 8 + length + static_cast<uint64_t>(begin), static_cast<size_t>(end - begin));
    out.emplace_back(name, std::move(t));
  }
  return out;
}

}  // namespace

struct Runner::Parts {
  int64_t classes;
  fastee_measure measure;
  std::vector<double> thresholds;
  std::vector<Port> inputs;
  std::vector<Head> heads;
  std::vector<std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> segments;
  std::unique_ptr<sched::Scheduler> scheduler;
  std::vector<double> seconds;  // of every segment, from profile()
  int64_t profiled_rows = 0;
  std::vector<float> hidden;
  Step step;

  void read(const std::filesystem::path& folder, const std::string& fingerprint);
  void read_heads(const std::string& bytes, const std::vector<Json>& exits);
  void check(const std::vector<at::Tensor>& values) const;
  void make_scheduler();
};

void Runner::Parts::read(const std::filesystem::path& folder, const std::string& fingerprint) {
  const Json m = JsonReader(read_file(folder / "exits.json", kMaxManifest)).read();
  if (m.number_at("format") != kFormat) throw std::runtime_error("another format than " + std::to_string(kFormat) + "; export again with this fastee");
  if (m.string_at("kind") != "aoti") throw std::runtime_error("kind '" + m.string_at("kind") + "' does not run here, expected 'aoti'; export again with format='aoti'");
  if (!fingerprint.empty() && m.string_at("fingerprint") != fingerprint)
    throw std::runtime_error("exported from the network " + m.string_at("fingerprint") + ", expected " + fingerprint);
  const auto &exits = m.list_at("exits"), &parts = m.list_at("segments"), &values = m.list_at("thresholds");
  if (exits.empty() || parts.size() != exits.size() + 1 || values.size() != exits.size()) throw std::runtime_error("the numbers of segments, exits and thresholds do not match");
  measure = static_cast<fastee_measure>(position(m.string_at("measure"), {"max_prob", "margin", "entropy", "energy"}, "measure"));
  classes = static_cast<int64_t>(m.number_at("num_classes"));
  for (const Json& t : values) thresholds.push_back(t.null() ? kInfinity : t.as(Json::kNumber, "thresholds").number);
  for (const Json& p : parts[0].list_at("inputs")) {
    Port port{p.string_at("name"), dtype_of(p.string_at("dtype")), {}};
    for (const Json& d : p.list_at("shape")) port.shape.push_back(d.null() ? -1 : static_cast<int64_t>(d.as(Json::kNumber, "shape").number));
    inputs.push_back(std::move(port));
  }
  std::string name;
  read_heads(checked(folder, m.at("heads"), &name), exits);
  for (size_t i = 0; i < parts.size(); ++i) {
    checked(folder, parts[i].at("file"), &name);
    segments.push_back(std::make_unique<torch::inductor::AOTIModelPackageLoader>((folder / name).string()));
    if (i > 0 && i - 1 < heads.size() && heads[i - 1].mask >= static_cast<int>(parts[i].list_at("inputs").size())) throw std::runtime_error("a mask lies outside its carry");
  }
}

void Runner::Parts::read_heads(const std::string& bytes, const std::vector<Json>& exits) {
  const auto tensors = tensors_of(bytes);
  const auto find = [&](size_t i, const char* field) {
    const std::string name = std::to_string(i) + "." + field;
    for (const auto& [key, t] : tensors)
      if (key == name) return t;
    return at::Tensor();
  };
  for (size_t i = 0; i < exits.size(); ++i) {
    const Json& e = exits[i];
    Head h{};
    h.pool = static_cast<fastee_pool_kind>(position(e.string_at("pool"), {"mean", "mean_tokens", "cls", "last", "none"}, "pool"));
    h.norm = e.at("norm").null() ? FASTEE_NORM_NONE : position(e.string_at("norm"), {"layer", "rms"}, "norm") == 0 ? FASTEE_NORM_LAYER : FASTEE_NORM_RMS;
    h.eps = static_cast<float>(e.number_at("eps")), h.temperature = static_cast<float>(e.number_at("temperature"));
    h.mask = e.at("mask").null() ? -1 : static_cast<int>(e.number_at("mask"));
    h.relu = !e.at("activation").null() && e.string_at("activation") == "relu";
    at::Tensor* const fields[] = {&h.weight, &h.bias, &h.norm_weight, &h.norm_bias, &h.last_weight, &h.last_bias};
    const char* const names[] = {"weight", "bias", "norm_weight", "norm_bias", "last_weight", "last_bias"};
    for (int f = 0; f < 6; ++f) *fields[f] = find(i, names[f]);
    const at::Tensor& last = h.last_weight.defined() ? h.last_weight : h.weight;
    const auto vector = [](const at::Tensor& t, int64_t n) { return !t.defined() || (t.dim() == 1 && t.size(0) == n); };
    const bool fits = h.weight.defined() && h.weight.dim() == 2 && last.dim() == 2 && last.size(0) == classes && vector(h.bias, h.weight.size(0)) &&
                      vector(h.norm_weight, h.weight.size(1)) && vector(h.norm_bias, h.weight.size(1)) && vector(h.last_bias, last.size(0)) &&
                      (!h.last_weight.defined() || last.size(1) == h.weight.size(0));
    if (!fits) throw std::runtime_error("the tensors of exit " + std::to_string(i) + " do not make a head of " + std::to_string(classes) + " classes");
    heads.push_back(std::move(h));
  }
  for (Head& h : heads) {  // the vector no longer moves: the views may point into it
    const at::Tensor* const fields[] = {&h.weight, &h.bias, &h.norm_weight, &h.norm_bias, &h.last_weight, &h.last_bias};
    for (int f = 0; f < 6; ++f)
      if (fields[f]->defined()) h.views[f] = view(*fields[f]);
  }
}

void Runner::Parts::check(const std::vector<at::Tensor>& values) const {
  if (values.size() != inputs.size()) throw std::invalid_argument("inputs: expected " + std::to_string(inputs.size()) + " tensors, got " + std::to_string(values.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    const at::Tensor& t = values[i];
    bool fits = t.defined() && t.device().is_cpu() && t.scalar_type() == inputs[i].dtype && t.dim() == static_cast<int64_t>(inputs[i].shape.size()) + 1 && t.size(0) == values[0].size(0);
    for (size_t d = 0; fits && d < inputs[i].shape.size(); ++d) fits = inputs[i].shape[d] < 0 || inputs[i].shape[d] == t.size(static_cast<int64_t>(d) + 1);
    if (fits) continue;
    std::string expected = "[B";
    for (int64_t d : inputs[i].shape) expected += ", " + std::to_string(d);
    throw std::invalid_argument("inputs: '" + inputs[i].name + "' must be " + toString(inputs[i].dtype) + " " + expected + "] on the CPU, with the rows of the first input");
  }
}

void Runner::Parts::make_scheduler() {
  sched::Config c;
  const size_t s = segments.size();
  c.segments = static_cast<int>(s), c.nodes = c.codecs = 1;
  c.batch_sizes = {profiled_rows};
  c.mean = seconds, c.spread.assign(s, 0.0), c.wire_bytes.assign(s, 0.0), c.codec_seconds.assign(s, 0.0);
  c.bandwidth = c.delay = {0.0};
  c.hosts.assign(s, 1);
  c.thresholds = thresholds;
  scheduler = std::make_unique<sched::Scheduler>(c);
}

Runner::Runner(const std::string& folder, const std::string& fingerprint) : parts_(std::make_unique<Parts>()) {
  if (fastee_abi_version() != FASTEE_ABI_VERSION)
    throw std::runtime_error("libfastee has ABI " + std::to_string(fastee_abi_version()) + ", this runner was built for " + std::to_string(FASTEE_ABI_VERSION));
  try {
    parts_->read(folder, fingerprint);
  } catch (const std::exception& error) {
    throw std::runtime_error("fastee: " + folder + ": " + error.what());
  }
}

Runner::~Runner() = default;
int Runner::num_exits() const { return static_cast<int>(parts_->heads.size()); }
const std::vector<double>& Runner::thresholds() const { return parts_->thresholds; }

void Runner::set_thresholds(const std::vector<double>& values) {
  const bool fits = values.size() == parts_->thresholds.size() && std::none_of(values.begin(), values.end(), [](double t) { return std::isnan(t); });
  if (!fits) throw std::invalid_argument("thresholds: expected " + std::to_string(num_exits()) + " numbers, one per exit");
  parts_->thresholds = values;
  if (parts_->scheduler) parts_->make_scheduler();
}

std::vector<at::Tensor> Runner::run_segment(int segment, const std::vector<at::Tensor>& carry) {
  std::vector<at::Tensor> given;
  for (const at::Tensor& t : carry) given.push_back(t.contiguous());  // a package is compiled for contiguous tensors
  return parts_->segments[segment]->run(given);
}

void Runner::exit_step(int exit, const std::vector<at::Tensor>& carry, Step* step) {
  Parts& p = *parts_;
  const Head& h = p.heads[exit];
  const int64_t rows = carry[0].size(0);
  step->label.resize(rows), step->index.resize(rows), step->confidence.resize(rows), step->exits.resize(rows), step->logits.resize(rows * p.classes);
  fastee_head_out out{{step->label.data(), nullptr, nullptr, nullptr, nullptr, nullptr}, step->confidence.data(), step->exits.data(), step->logits.data(),
                      step->index.data(), &step->count};
  DLTensor x = view(carry[0]), mask;
  at::Tensor kept;
  fastee_head head = h.describe(p.measure, p.thresholds[exit], false);
  if (h.mask >= 0) {
    kept = carry[h.mask].ne(0).to(at::kByte).contiguous();
    mask = view(kept), head.mask = &mask;
  }
  if (!h.last_weight.defined()) return must(fastee_exit_head(&x, &head, &out, nullptr));
  int64_t shape[2] = {rows, h.weight.size(0)};
  p.hidden.resize(rows * shape[1]);
  fastee_head_out first{{step->label.data(), nullptr, nullptr, nullptr, nullptr, nullptr}, step->confidence.data(), step->exits.data(), p.hidden.data(), nullptr, nullptr};
  must(fastee_exit_head(&x, &head, &first, nullptr));
  if (h.relu)
    for (float& v : p.hidden) v = v > 0 || v != v ? v : 0.0f;
  const DLTensor z{p.hidden.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, nullptr, 0};
  head = h.describe(p.measure, p.thresholds[exit], true);
  must(fastee_exit_head(&z, &head, &out, nullptr));
}

void Runner::profile(const std::vector<at::Tensor>& inputs, int repeats) {
  Parts& p = *parts_;
  p.check(inputs);
  if (inputs[0].size(0) == 0 || repeats < 1) throw std::invalid_argument("profile: needs at least one row and one repeat");
  std::vector<std::vector<int64_t>> spent(p.segments.size());
  for (int r = 0; r < repeats + 1; ++r) {  // the first round warms up and is not counted
    std::vector<at::Tensor> carry = inputs;
    for (size_t i = 0; i < p.segments.size(); ++i) {
      const int64_t start = now();
      carry = run_segment(static_cast<int>(i), carry);
      if (i < p.heads.size()) exit_step(static_cast<int>(i), carry, &p.step);
      if (r) spent[i].push_back(now() - start);
    }
  }
  p.seconds.clear();
  for (auto& times : spent) {
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    p.seconds.push_back(static_cast<double>(times[repeats / 2]) / 1e9);
  }
  p.profiled_rows = inputs[0].size(0);
  p.make_scheduler();
}

Answer Runner::run(const std::vector<at::Tensor>& inputs) { return run(inputs, kInfinity); }

Answer Runner::run(const std::vector<at::Tensor>& inputs, double deadline) {
  const int64_t entry = now();
  Parts& p = *parts_;
  p.check(inputs);
  if (std::isnan(deadline)) throw std::invalid_argument("deadline: expected seconds, got NaN");
  const bool timed = deadline != kInfinity;
  if (timed && !p.scheduler) throw std::invalid_argument("deadline: call profile() first");
  const int64_t total = inputs[0].size(0), due = timed ? entry + static_cast<int64_t>(std::clamp(deadline, -1e9, 1e9) * 1e9) : sched::kNoDeadline;
  Answer a{at::empty({total, p.classes}, at::kFloat), std::vector<int64_t>(total), std::vector<float>(total), std::vector<int64_t>(total), std::vector<uint8_t>(total)};
  if (total == 0) return a;
  const auto give = [&](int64_t row, const Step& s, int64_t at, int64_t exit, bool forced) {
    a.label[row] = s.label[at], a.confidence[row] = s.confidence[at], a.exit[row] = exit, a.forced[row] = forced;
    std::memcpy(a.logits.data_ptr<float>() + row * p.classes, s.logits.data() + at * p.classes, sizeof(float) * p.classes);
  };
  std::vector<int64_t> rows(total), tasks(total, -1), keep;
  std::iota(rows.begin(), rows.end(), 0);
  if (timed)
    for (int64_t& t : tasks) t = p.scheduler->admit(entry, due);
  std::vector<at::Tensor> carry = inputs;
  int64_t start = entry;
  for (int i = 0; i < num_exits(); ++i) {
    carry = run_segment(i, carry);
    if (!timed && p.thresholds[i] == kInfinity) continue;
    exit_step(i, carry, &p.step);
    keep.clear();
    if (timed) {
      const int64_t t = now();
      p.scheduler->observe(i, 0, static_cast<int64_t>(rows.size()), std::max<int64_t>(1, t - start));
      start = t;
      for (size_t r = 0; r < rows.size(); ++r) {
        // a row that was late before it began is not the scheduler's: it leaves here, forced unless its own score lets it go
        sched::Decision d{sched::Action::kExit, 0, -1, !p.step.exits[r]};
        if (tasks[r] >= 0) d = p.scheduler->decide(tasks[r], i, p.step.confidence[r], t);
        if (d.action == sched::Action::kContinue) keep.push_back(static_cast<int64_t>(r));
        else {
          if (d.action == sched::Action::kWait) p.scheduler->finish(tasks[r]), d.forced = true;  // nothing happens here that a row could wait for
          give(rows[r], p.step, static_cast<int64_t>(r), i, d.forced);
        }
      }
    } else {
      keep.assign(p.step.index.begin(), p.step.index.begin() + p.step.count);
      for (size_t r = p.step.count; r < rows.size(); ++r) give(rows[p.step.index[r]], p.step, p.step.index[r], i, false);
    }
    if (keep.empty()) return a;
    if (keep.size() == rows.size()) continue;
    const at::Tensor index = at::from_blob(keep.data(), {static_cast<int64_t>(keep.size())}, at::kLong);
    for (at::Tensor& t : carry) t = t.index_select(0, index);
    for (size_t r = 0; r < keep.size(); ++r) rows[r] = rows[keep[r]], tasks[r] = tasks[keep[r]];  // keep rises: nothing is overwritten unread
    rows.resize(keep.size()), tasks.resize(keep.size());
  }
  const at::Tensor logits = run_segment(num_exits(), carry)[0].to(at::kFloat).contiguous();
  Step& end = p.step;
  const int64_t left = static_cast<int64_t>(rows.size());
  end.label.resize(left), end.confidence.resize(left), end.logits.assign(logits.data_ptr<float>(), logits.data_ptr<float>() + logits.numel());
  const DLTensor z = view(logits);
  fastee_row_stats_out stats{end.label.data(), nullptr, nullptr, nullptr, nullptr, nullptr};
  float** const score[] = {&stats.max_prob, &stats.margin, &stats.entropy, &stats.lse};
  *score[p.measure] = end.confidence.data();
  must(fastee_row_stats(&z, 1.0f, &stats, nullptr));
  if (p.measure == FASTEE_ENTROPY)
    for (float& u : end.confidence) u = -u;
  const int64_t t = now();
  if (timed) p.scheduler->observe(num_exits(), 0, left, std::max<int64_t>(1, t - start));
  for (int64_t r = 0; r < left; ++r) {
    if (timed && tasks[r] >= 0) p.scheduler->decide(tasks[r], num_exits(), end.confidence[r], t);
    give(rows[r], end, r, num_exits(), false);
  }
  return a;
}

}  // namespace fastee
