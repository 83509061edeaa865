// The C ABI on the CPU: check every argument, describe it to a kernel as pointers and strides, call the table in use.
#include <cstring>
#include <string>

#include "core/check.h"
#include "core/parallel.h"

namespace fastee {
namespace {

// index int64 [N], contiguous, every entry in [0, rows).
fastee_status expect_index(const char* op, const DLTensor* index, int64_t rows) {
  FASTEE_TRY(expect(op, "index", index, kDLInt, 64, 1, "int64 [N], contiguous"));
  if (!contiguous_from(*index, 0)) return wrong(FASTEE_UNSUPPORTED, op, "index", "int64 [N], contiguous", index);
  const int64_t* at = bytes_of<int64_t>(*index);
  for (int64_t i = 0; i < index->shape[0]; ++i)
    if (at[i] < 0 || at[i] >= rows) return fail(FASTEE_INVALID_ARGUMENT, std::string(op) + ": index must lie in [0, " + number(rows) + "), got " + number(at[i]));
  return FASTEE_OK;
}

// `part` [N, ...] matches `whole` [B, ...] in dtype and row shape; both have contiguous rows.
fastee_status expect_rows(const char* op, const char* whole_name, const DLTensor* whole, const char* part_name, const DLTensor* part, int64_t n) {
  for (auto [name, t] : {std::pair{whole_name, whole}, std::pair{part_name, part}}) {
    if (!t || t->ndim < 1 || !t->shape) return wrong(FASTEE_INVALID_ARGUMENT, op, name, "a tensor [B, ...]", t && t->shape ? t : nullptr);
    if (t->device.device_type != kDLCPU) return wrong(FASTEE_WRONG_TYPE, op, name, "on the CPU", t);
    if (t->dtype.bits % 8 || t->dtype.lanes != 1) return wrong(FASTEE_WRONG_TYPE, op, name, "of whole-byte elements", t);
    if (!contiguous_from(*t, 1)) return unsupported_rows(op, name, *t);
  }
  bool same = whole->ndim == part->ndim && std::memcmp(&whole->dtype, &part->dtype, sizeof(DLDataType)) == 0 && part->shape[0] == n;
  for (int i = 1; same && i < whole->ndim; ++i) same = whole->shape[i] == part->shape[i];
  return same ? FASTEE_OK : wrong(FASTEE_INVALID_ARGUMENT, op, part_name, "[" + number(n) + ", ...] with the rows of " + whole_name + " " + describe(*whole), part);
}

}  // namespace
}  // namespace fastee

using namespace fastee;

extern "C" fastee_status fastee_pool(const DLTensor* x, fastee_pool_kind kind, const DLTensor* mask, const DLTensor* out, void*) {
  cpu::Activation a;
  FASTEE_TRY(see_activation("pool", x, kind, mask, &a));
  FASTEE_TRY(expect("pool", "out", out, kDLFloat, 32, 2, "float32 [B, D]"));
  if (out->shape[0] != a.rows || out->shape[1] != a.features || (a.features > 1 && stride(*out, 1) != 1))
    return wrong(FASTEE_INVALID_ARGUMENT, "pool", "out", "float32 [" + number(a.rows) + ", " + number(a.features) + "] with contiguous rows", out);
  cpu::kernels().pool(a, data_of(*out), stride(*out, 0));
  return FASTEE_OK;
}

extern "C" fastee_status fastee_row_stats(const DLTensor* logits, float temperature, const fastee_row_stats_out* out, void*) {
  int element;
  FASTEE_TRY(expect_float("row_stats", "logits", logits, 2, "float32, bfloat16 or float16 [B, C]", &element));
  if (logits->shape[1] == 0) return wrong(FASTEE_INVALID_ARGUMENT, "row_stats", "logits", "float32 [B, C] with at least one class", logits);
  if (logits->shape[1] > 1 && stride(*logits, 1) != 1) return unsupported_rows("row_stats", "logits", *logits);
  FASTEE_TRY(expect_temperature("row_stats", temperature));
  if (!out || !out->label) return fail(FASTEE_INVALID_ARGUMENT, "row_stats: out.label must not be NULL");
  parallel::row_stats({bytes_of<void>(*logits), element, logits->shape[0], logits->shape[1], stride(*logits, 0), 1.0f / temperature, out->label, out->max_prob,
                            out->margin, out->entropy, out->lse, out->entropy_p2});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_exit_head(const DLTensor* x, const fastee_head* head, const fastee_head_out* out, void*) {
  cpu::HeadArgs a;
  FASTEE_TRY(head_args("exit_head", x, head, out, &a));
  if (!parallel::exit_head(a)) return fail(FASTEE_OUT_OF_MEMORY, "exit_head: no memory for the working buffer");
  if (out->index) *out->count = cpu::kernels().compact(out->exits, a.x.rows, 1, 1, out->index);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_mean_entropy(const DLTensor* logits, const DLTensor* mask, float temperature, float* out, void*) {
  static const char op[] = "mean_entropy";
  int element;
  FASTEE_TRY(expect_float(op, "logits", logits, 3, "float32, bfloat16 or float16 [B, T, C]", &element));
  if (logits->shape[1] == 0 || logits->shape[2] == 0) return wrong(FASTEE_INVALID_ARGUMENT, op, "logits", "[B, T, C], empty in B only", logits);
  if (logits->shape[2] > 1 && stride(*logits, 2) != 1) return unsupported_rows(op, "logits", *logits);
  FASTEE_TRY(expect_temperature(op, temperature));
  if (!out && logits->shape[0]) return fail(FASTEE_INVALID_ARGUMENT, "mean_entropy: out must not be NULL");
  cpu::MeanEntropyArgs a{bytes_of<void>(*logits), element, logits->shape[0], logits->shape[1], logits->shape[2], stride(*logits, 0), stride(*logits, 1),
                         nullptr, 0, 1.0f / temperature, out};
  if (mask) {
    const uint8_t code = mask->dtype.code == kDLBool ? kDLBool : kDLUInt;
    FASTEE_TRY(expect(op, "mask", mask, code, 8, 2, "uint8 or bool [B, T]"));
    if (mask->shape[0] != a.rows || mask->shape[1] != a.frames) return wrong(FASTEE_INVALID_ARGUMENT, op, "mask", "[B, T] like logits", mask);
    if (a.frames > 1 && stride(*mask, 1) != 1) return unsupported_rows(op, "mask", *mask);
    a.mask = bytes_of<uint8_t>(*mask), a.mask_stride = stride(*mask, 0);
  }
  parallel::mean_entropy(a);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_feature_delta(const DLTensor* a, const DLTensor* b, float* out, void*) {
  static const char op[] = "feature_delta";
  int element, other;
  FASTEE_TRY(expect_float(op, "a", a, -1, "float32, bfloat16 or float16 [B, ...]", &element));
  FASTEE_TRY(expect_float(op, "b", b, a->ndim, "of the type and shape of a", &other));
  if (a->ndim < 1 || element != other || !same_shape(*a, *b)) return wrong(FASTEE_INVALID_ARGUMENT, op, "b", "of the type and shape of a, " + describe(*a), b);
  if (!contiguous_from(*a, 1)) return unsupported_rows(op, "a", *a);
  if (!contiguous_from(*b, 1)) return unsupported_rows(op, "b", *b);
  if (!out && a->shape[0]) return fail(FASTEE_INVALID_ARGUMENT, "feature_delta: out must not be NULL");
  parallel::feature_delta({bytes_of<void>(*a), bytes_of<void>(*b), element, a->shape[0], product(*a, 1, a->ndim), stride(*a, 0), stride(*b, 0), out});
  return FASTEE_OK;
}

extern "C" fastee_status fastee_compact(const DLTensor* mask, int64_t* index, int64_t* count, void*) {
  const uint8_t code = mask && mask->dtype.code == kDLBool ? kDLBool : kDLUInt;
  FASTEE_TRY(expect("compact", "mask", mask, code, 8, 1, "bool or uint8 [B]"));
  if (!count || (mask->shape[0] && !index)) return fail(FASTEE_INVALID_ARGUMENT, "compact: index and count must not be NULL");
  *count = cpu::kernels().compact(bytes_of<uint8_t>(*mask), mask->shape[0], stride(*mask, 0), 0, index);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_gather_rows(const DLTensor* x, const DLTensor* index, const DLTensor* out, void*) {
  if (!x || x->ndim < 1 || !x->shape) return wrong(FASTEE_INVALID_ARGUMENT, "gather_rows", "x", "a tensor [B, ...]", nullptr);
  FASTEE_TRY(expect_index("gather_rows", index, x->shape[0]));
  FASTEE_TRY(expect_rows("gather_rows", "x", x, "out", out, index->shape[0]));
  const int64_t bytes = product(*x, 1, x->ndim) * (x->dtype.bits / 8);
  const int64_t from = stride(*x, 0) * (x->dtype.bits / 8), to = stride(*out, 0) * (x->dtype.bits / 8);
  const int64_t* at = bytes_of<int64_t>(*index);
  if (bytes) parallel::gather_rows(bytes_of<char>(*out), to, bytes_of<const char>(*x), from, at, index->shape[0], bytes);
  return FASTEE_OK;
}

extern "C" fastee_status fastee_scatter_rows(const DLTensor* out, const DLTensor* index, const DLTensor* rows, void*) {
  if (!out || out->ndim < 1 || !out->shape) return wrong(FASTEE_INVALID_ARGUMENT, "scatter_rows", "out", "a tensor [B, ...]", nullptr);
  FASTEE_TRY(expect_index("scatter_rows", index, out->shape[0]));
  FASTEE_TRY(expect_rows("scatter_rows", "out", out, "rows", rows, index->shape[0]));
  const int64_t bytes = product(*out, 1, out->ndim) * (out->dtype.bits / 8);
  const int64_t from = stride(*rows, 0) * (out->dtype.bits / 8), to = stride(*out, 0) * (out->dtype.bits / 8);
  const int64_t* at = bytes_of<int64_t>(*index);
  if (bytes) parallel::scatter_rows(bytes_of<char>(*out), to, out->shape[0], bytes_of<const char>(*rows), from, at, index->shape[0], bytes);
  return FASTEE_OK;
}
