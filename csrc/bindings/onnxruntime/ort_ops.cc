// The ops as an onnxruntime custom-op library: SessionOptions.register_custom_ops_library("libfastee_ort.so"), then nodes of the domain
// "fastee" (ExitStep, RowStats, Compact). onnxruntime's wheel brings no headers, so the part of its C interface that is used stands here:
// OrtApi is a table of functions whose places never change once released, and OrtCustomOp a list of callbacks that a version extends.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "fastee/fastee.h"

namespace {

constexpr uint32_t kVersion = 16;  // onnxruntime 1.16: the first whose kernels can return an error
enum Type { kAny = 0, kFloat = 1, kInt64 = 7, kBool = 9 };
struct Api;
struct Info;
struct Context;
struct Value;
struct Shape;
struct Status;
struct Domain;
struct Options;
struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version_string)();
};

// Places in the table, counted from its first entry; ReleaseCustomOpDomain ends version 1 at place 101, as onnxruntime itself asserts.
enum Place {
  kCreateStatus = 0, kCreateDomain = 26, kDomainAdd = 27, kAddDomain = 28, kMutableData = 51, kElementType = 60, kRank = 61, kSizes = 62, kTypeAndShape = 65,
  kAttributeFloat = 85, kAttributeInt = 86, kAttributeString = 87, kInputCount = 88, kInput = 90, kOutput = 91, kReleaseStatus = 93, kReleaseShape = 99,
};

template <typename... A>
Status* ask(const Api* api, Place place, A... a) {
  return reinterpret_cast<Status* (*)(A...)>(reinterpret_cast<void* const*>(api)[place])(a...);
}

Status* failed(const Api* api, const char* text) { return ask(api, kCreateStatus, 2 /* ORT_INVALID_ARGUMENT */, text); }

#define TRY(call) \
  if (Status* s_ = (call)) return s_

constexpr int kMaxRank = 8;

// An input as the C ABI takes it; absent (optional and not given) ones are NULL.
struct Input {
  DLTensor t;
  int64_t sizes[kMaxRank];
  bool given = false;
  const DLTensor* get() const { return given ? &t : nullptr; }

  Status* read(const Api* api, const Context* context, size_t index) {
    const Value* value = nullptr;
    TRY(ask(api, kInput, context, index, &value));
    if (!value) return nullptr;
    Shape* shape = nullptr;
    size_t rank = 0;
    int type = 0;
    void* data = nullptr;
    TRY(ask(api, kTypeAndShape, value, &shape));
    Status* status = ask(api, kRank, static_cast<const Shape*>(shape), &rank);
    if (!status) status = ask(api, kElementType, static_cast<const Shape*>(shape), &type);
    if (!status && rank > kMaxRank) status = failed(api, "fastee: a tensor of more than 8 dimensions");
    if (!status) status = ask(api, kSizes, static_cast<const Shape*>(shape), static_cast<int64_t*>(sizes), rank);
    reinterpret_cast<void (*)(Shape*)>(reinterpret_cast<void* const*>(api)[kReleaseShape])(shape);
    if (status) return status;
    TRY(ask(api, kMutableData, const_cast<Value*>(value), &data));
    const DLDataType dtype = type == kBool ? DLDataType{kDLBool, 8, 1} : type == kInt64 ? DLDataType{kDLInt, 64, 1} : DLDataType{kDLFloat, 32, 1};
    t = {data, {kDLCPU, 0}, static_cast<int32_t>(rank), dtype, sizes, nullptr, 0};
    given = true;
    return nullptr;
  }
};

template <typename T>
Status* output(const Api* api, Context* context, size_t index, std::initializer_list<int64_t> sizes, T** data) {
  Value* value = nullptr;
  TRY(ask(api, kOutput, context, index, sizes.begin(), sizes.size(), &value));
  *data = nullptr;
  if (!value) return nullptr;  // the node does not name this output
  TRY(ask(api, kMutableData, value, reinterpret_cast<void**>(data)));
  static int64_t nothing;  // an output of no rows has no memory, but NULL would mean "not wanted"
  if (!*data) *data = reinterpret_cast<T*>(&nothing);
  return nullptr;
}

// Attributes, each with a default.
struct Attributes {
  const Api* api;
  const Info* info;

  void release(Status* s) const { reinterpret_cast<void (*)(Status*)>(reinterpret_cast<void* const*>(api)[kReleaseStatus])(s); }
  float number(const char* name, float otherwise) const {
    float value = otherwise;
    if (Status* s = ask(api, kAttributeFloat, info, name, &value)) return release(s), otherwise;
    return value;
  }
  // Which of the words the attribute is; -1 for another.
  int word(const char* name, std::initializer_list<const char*> words) const {
    char text[32];
    size_t size = sizeof text;
    if (Status* s = ask(api, kAttributeString, info, name, static_cast<char*>(text), &size)) return release(s), 0;
    int i = 0;
    for (const char* w : words) {
      if (!std::strcmp(w, text)) return i;
      ++i;
    }
    return -1;
  }
};

struct Kernel {
  const Api* api;
  fastee_head head;
};

Status* make(const Api* api, const Info* info, void** kernel) {
  const Attributes a{api, info};
  const int pool = a.word("pool", {"mean", "mean_tokens", "cls", "last", "none"}), norm = a.word("norm", {"none", "layer", "rms", "affine"}),
            measure = a.word("measure", {"max_prob", "margin", "entropy", "energy"});
  if (pool < 0) return failed(api, "fastee: attribute pool must be mean, mean_tokens, cls, last or none");
  if (norm < 0) return failed(api, "fastee: attribute norm must be none, layer, rms or affine");
  if (measure < 0) return failed(api, "fastee: attribute measure must be max_prob, margin, entropy or energy");
  *kernel = new Kernel{api, {static_cast<fastee_pool_kind>(pool), static_cast<fastee_norm_kind>(norm), static_cast<fastee_measure>(measure), a.number("eps", 1e-5f),
                             a.number("temperature", 1.0f), a.number("threshold", 0.9f), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}};
  return nullptr;
}

Status* finish(const Api* api, fastee_status status) { return status == FASTEE_OK ? nullptr : failed(api, fastee_last_error()); }

Status* exit_step(void* kernel, Context* context) {
  const Kernel& k = *static_cast<Kernel*>(kernel);
  Input in[6];  // x, weight, bias, norm_weight, norm_bias, mask
  size_t count = 0;
  TRY(ask(k.api, kInputCount, static_cast<const Context*>(context), &count));
  for (size_t i = 0; i < count && i < 6; ++i) TRY(in[i].read(k.api, context, i));
  const int64_t rows = in[0].t.ndim ? in[0].sizes[0] : 0, classes = in[1].t.ndim ? in[1].sizes[0] : 0;
  fastee_head head = k.head;
  head.weight = in[1].get(), head.bias = in[2].get(), head.norm_weight = in[3].get(), head.norm_bias = in[4].get(), head.mask = in[5].get();
  if (in[5].given) in[5].t.dtype.code = kDLUInt;  // bool and uint8 look alike in memory
  fastee_head_out out{};
  TRY(output(k.api, context, 0, {rows}, &out.stats.label));
  TRY(output(k.api, context, 1, {rows}, &out.confidence));
  TRY(output(k.api, context, 2, {rows}, &out.exits));
  TRY(output(k.api, context, 3, {rows, classes}, &out.logits));
  TRY(output(k.api, context, 4, {rows}, &out.index));
  TRY(output(k.api, context, 5, {1}, &out.count));
  return finish(k.api, fastee_exit_head(&in[0].t, &head, &out, nullptr));
}

Status* row_stats(void* kernel, Context* context) {
  const Kernel& k = *static_cast<Kernel*>(kernel);
  Input z;
  TRY(z.read(k.api, context, 0));
  const int64_t rows = z.t.ndim ? z.sizes[0] : 0;
  fastee_row_stats_out out{};
  TRY(output(k.api, context, 0, {rows}, &out.label));
  TRY(output(k.api, context, 1, {rows}, &out.max_prob));
  TRY(output(k.api, context, 2, {rows}, &out.margin));
  TRY(output(k.api, context, 3, {rows}, &out.entropy));
  TRY(output(k.api, context, 4, {rows}, &out.lse));
  return finish(k.api, fastee_row_stats(&z.t, k.head.temperature, &out, nullptr));
}

Status* compact(void* kernel, Context* context) {
  const Kernel& k = *static_cast<Kernel*>(kernel);
  Input mask;
  TRY(mask.read(k.api, context, 0));
  int64_t *index, *count;
  TRY(output(k.api, context, 0, {mask.t.ndim ? mask.sizes[0] : 0}, &index));
  TRY(output(k.api, context, 1, {1}, &count));
  return finish(k.api, fastee_compact(&mask.t, index, count, nullptr));
}

// onnxruntime's OrtCustomOp, and behind it what this op is.
struct Op {
  uint32_t version = kVersion;
  void* (*create)(const Op*, const Api*, const Info*) = nullptr;
  const char* (*name)(const Op*) = [](const Op* op) { return op->own_name; };
  const char* (*provider)(const Op*) = [](const Op*) -> const char* { return nullptr; };
  int (*input_type)(const Op*, size_t) = [](const Op* op, size_t i) { return static_cast<int>(op->inputs[i]); };
  size_t (*input_count)(const Op*) = [](const Op* op) { return op->num_inputs; };
  int (*output_type)(const Op*, size_t) = [](const Op* op, size_t i) { return static_cast<int>(op->outputs[i]); };
  size_t (*output_count)(const Op*) = [](const Op* op) { return op->num_outputs; };
  void (*compute)(void*, Context*) = nullptr;
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  int (*input_characteristic)(const Op*, size_t) = [](const Op* op, size_t i) { return i < op->required_inputs ? 0 : 1; };  // 1: optional
  int (*output_characteristic)(const Op*, size_t) = [](const Op* op, size_t i) { return i < op->required_outputs ? 0 : 1; };
  int (*input_memory)(const Op*, size_t) = [](const Op*, size_t) { return 0; };
  int (*variadic[4])(const Op*) = {};
  Status* (*create2)(const Op*, const Api*, const Info*, void**) = [](const Op*, const Api* api, const Info* info, void** kernel) { return make(api, info, kernel); };
  Status* (*compute2)(void*, Context*);
  void* later[7] = {};  // callbacks of versions after 16, which onnxruntime does not ask this version for

  const char* own_name;
  size_t num_inputs, required_inputs, num_outputs, required_outputs;
  Type inputs[6], outputs[6];
};

Op made(const char* name, Status* (*compute)(void*, Context*), std::initializer_list<Type> inputs, size_t required_inputs, std::initializer_list<Type> outputs, size_t required_outputs) {
  Op op{};
  op.own_name = name, op.compute2 = compute, op.num_inputs = inputs.size(), op.required_inputs = required_inputs, op.num_outputs = outputs.size(),
  op.required_outputs = required_outputs;
  std::copy(inputs.begin(), inputs.end(), op.inputs);
  std::copy(outputs.begin(), outputs.end(), op.outputs);
  return op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(Options* options, const ApiBase* base) {
  static const Op ops[] = {
      made("ExitStep", exit_step, {kFloat, kFloat, kFloat, kFloat, kFloat, kBool}, 2, {kInt64, kFloat, kBool, kFloat, kInt64, kInt64}, 3),
      made("RowStats", row_stats, {kFloat}, 1, {kInt64, kFloat, kFloat, kFloat, kFloat}, 1),
      made("Compact", compact, {kBool}, 1, {kInt64, kInt64}, 2),
  };
  const Api* api = base->get(kVersion);
  if (!api) {  // this onnxruntime is older than 1.16; its oldest table can carry the message
    api = base->get(1);
    return api ? failed(api, "fastee: the op library needs onnxruntime 1.16 or newer") : nullptr;
  }
  if (fastee_abi_version() != FASTEE_ABI_VERSION) return failed(api, "fastee: libfastee.so is of another version than libfastee_ort.so");
  static Domain* domain = nullptr;  // sessions keep it; it lives as long as the library
  if (!domain) {
    TRY(ask(api, kCreateDomain, "fastee", &domain));
    for (const Op& op : ops) TRY(ask(api, kDomainAdd, domain, &op));
  }
  return ask(api, kAddDomain, options, domain);
}
