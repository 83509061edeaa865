/* fastee's C ABI: tensors as DLPack structures, scalars, a stream -> a status.
 *
 * Rules that hold for every function: the caller allocates all outputs; nothing is kept after the return; any thread may
 * call; a status other than FASTEE_OK leaves a text in fastee_last_error() (thread-local) that names the argument, what was
 * got and what was expected, and no output has a defined value. `stream` is NULL on the CPU. Sizes: B rows, D features,
 * C classes. Rows may have any stride; within a row memory is contiguous unless said otherwise. Offsets are 64-bit.
 */
#ifndef FASTEE_FASTEE_H_
#define FASTEE_FASTEE_H_
#include <stddef.h>
#include <stdint.h>

#include "fastee/dlpack.h"

#if defined(FASTEE_BUILDING)
#define FASTEE_API __attribute__((visibility("default")))
#else
#define FASTEE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTEE_ABI_VERSION 1

typedef enum {
  FASTEE_OK = 0,
  FASTEE_INVALID_ARGUMENT = 1, /* a shape, size or number is wrong */
  FASTEE_WRONG_TYPE = 2,       /* a dtype or device is wrong */
  FASTEE_UNSUPPORTED = 3,      /* right, but this build or machine cannot (a layout, an instruction set) */
  FASTEE_OUT_OF_MEMORY = 4,
  FASTEE_DEVICE_ERROR = 5      /* CUDA refused a launch, or an earlier kernel broke the device's context (fastee/cuda.h) */
} fastee_status;

typedef enum { FASTEE_POOL_MEAN = 0, FASTEE_POOL_MEAN_TOKENS = 1, FASTEE_POOL_CLS = 2, FASTEE_POOL_LAST = 3, FASTEE_POOL_NONE = 4 } fastee_pool_kind;
typedef enum { FASTEE_NORM_NONE = 0, FASTEE_NORM_LAYER = 1, FASTEE_NORM_RMS = 2, FASTEE_NORM_AFFINE = 3 } fastee_norm_kind;
typedef enum { FASTEE_MAX_PROB = 0, FASTEE_MARGIN = 1, FASTEE_ENTROPY = 2, FASTEE_ENERGY = 3 } fastee_measure;

FASTEE_API int32_t fastee_abi_version(void);
FASTEE_API const char* fastee_last_error(void);

/* The instruction set in use, and all that this build holds and this CPU runs (comma separated, best first). FASTEE_CPU_ISA
 * chooses at load time; fastee_select_isa() chooses later ("" = best) and affects calls that start after it returns. */
FASTEE_API const char* fastee_isa(void);
FASTEE_API const char* fastee_isas(void);
FASTEE_API fastee_status fastee_select_isa(const char* name);

/* Threads of one large call, its own included; results do not depend on it. 0 = FASTEE_NUM_THREADS, else the cores that the
 * process may use. Small calls (batch 1 among them) stay on their thread; workers sleep between calls; a second call at the
 * same time, and a child after fork(), get on without the first one's workers. */
FASTEE_API int32_t fastee_get_num_threads(void);
FASTEE_API fastee_status fastee_set_num_threads(int32_t count);

/* Activations and logits are fp32, bf16 or fp16 where a function says "float"; arithmetic and results are fp32. */

/* pool: x float -> out fp32 [B, D]. MEAN: [B, D, ...], each row contiguous or channels-last; MEAN_TOKENS: [B, T, D] with mask
 * uint8 [B, T] or NULL; CLS, LAST: [B, T, D]; NONE: [B, D]. */
FASTEE_API fastee_status fastee_pool(const DLTensor* x, fastee_pool_kind kind, const DLTensor* mask, const DLTensor* out, void* stream);

/* Per-row statistics, each array [B]; any pointer but `label` may be NULL. An invalid row (NaN or +inf among its logits, or all
 * -inf) has label -1 and NaN elsewhere. */
typedef struct {
  int64_t* label;
  float* max_prob;
  float* margin;
  float* entropy;
  float* lse;
  float* entropy_p2; /* entropy of p^2 / sum p^2; computed only when not NULL */
} fastee_row_stats_out;

FASTEE_API fastee_status fastee_row_stats(const DLTensor* logits, float temperature, const fastee_row_stats_out* out, void* stream);

/* The mean entropy (nats) of the frames of logits float [B, T, C] whose mask (uint8 or bool [B, T], NULL = all) is set -> out [B]; NaN
 * for a row without a frame. */
FASTEE_API fastee_status fastee_mean_entropy(const DLTensor* logits, const DLTensor* mask, float temperature, float* out, void* stream);

/* |a/|a| - b/|b|| per row of a, b float [B, ...] -> out [B]; +inf when a row is zero, NaN when its sum of squares is not finite. */
FASTEE_API fastee_status fastee_feature_delta(const DLTensor* a, const DLTensor* b, float* out, void* stream);

/* One exit: pool + norm + linear + statistics + rule, and the survivors' order when `index` is given. */
typedef struct {
  fastee_pool_kind pool;
  fastee_norm_kind norm;
  fastee_measure measure;
  float norm_eps;
  float temperature;           /* > 0; logits are divided by it */
  float threshold;             /* a row exits when its score is >= this; +inf: never */
  const DLTensor* weight;      /* float [C, D], or int8 [C, D] with weight_scale */
  const DLTensor* bias;        /* fp32 [C] or NULL */
  const DLTensor* norm_weight; /* fp32 [D] or NULL */
  const DLTensor* norm_bias;   /* fp32 [D] or NULL */
  const DLTensor* mask;        /* uint8 [B, T] or NULL */
  const DLTensor* weight_scale; /* fp32 [C] with an int8 weight, else NULL */
} fastee_head;

typedef struct {
  fastee_row_stats_out stats;
  float* confidence; /* [B], the score of the head's measure */
  uint8_t* exits;    /* [B], 1 = may leave */
  float* logits;     /* [B, C] or NULL */
  int64_t* index;    /* [B] or NULL: survivors in order, then the rest reversed */
  int64_t* count;    /* [1] or NULL: survivors */
} fastee_head_out;

FASTEE_API fastee_status fastee_exit_head(const DLTensor* x, const fastee_head* head, const fastee_head_out* out, void* stream);

/* mask uint8 or bool [B] -> index [B] (true rows in order, then the false ones reversed), count [1]. */
FASTEE_API fastee_status fastee_compact(const DLTensor* mask, int64_t* index, int64_t* count, void* stream);

/* out[i] = x[index[i]] and out[index[i]] = rows[i]; any dtype; index int64 [N], checked before anything is written. */
FASTEE_API fastee_status fastee_gather_rows(const DLTensor* x, const DLTensor* index, const DLTensor* out, void* stream);
FASTEE_API fastee_status fastee_scatter_rows(const DLTensor* out, const DLTensor* index, const DLTensor* rows, void* stream);

/* Rows of x float on a coarser grid, with one fp32 scale per `group` elements of a row (0 = the whole row): value = q * scale. max = the largest
 * |x| of the group, scale = max / limit, q = round_half_even(x * (limit / max)). A group of zeros has scale 0; one with NaN or inf has
 * scale NaN and q = 0.
 *   INT8      int8, the shape of x, limit 127
 *   INT4      uint8 [B, ceil(row / 2)], limit 7: two's complement, the even element in the low nibble, 0 above an odd last one
 *   FP8_E4M3  uint8, the shape of x, limit 448: OCP e4m3fn, rounded half to even
 *   BF16      bfloat16, the shape of x, no scale (NULL): rounded half to even, NaN quieted with sign and upper payload kept */
typedef enum { FASTEE_INT8 = 0, FASTEE_INT4 = 1, FASTEE_FP8_E4M3 = 2, FASTEE_BF16 = 3 } fastee_format;
FASTEE_API fastee_status fastee_quantize_rows(const DLTensor* x, fastee_format format, int64_t group, const DLTensor* data, const DLTensor* scale, void* stream);
FASTEE_API fastee_status fastee_dequantize_rows(const DLTensor* data, const DLTensor* scale, fastee_format format, int64_t group, const DLTensor* out, void* stream);

/* fastee_exit_head, and the rows that stay, quantised in order into one buffer, while the activation is in the cache:
 * out.exits needed. The packed rows begin at buffer + *offset: their scales (fp32 [count, row / group], not for BF16), then their data,
 * `*nbytes` in all: as fastee_quantize_rows of the gathered rows writes them. The buffer (4-byte aligned) holds `capacity` bytes: the
 * scales of B rows plus the data of the rows that stay, else FASTEE_INVALID_ARGUMENT. */
FASTEE_API fastee_status fastee_exit_pack(const DLTensor* x, const fastee_head* head, fastee_format format, int64_t group, const fastee_head_out* out,
                                          void* buffer, int64_t capacity, int64_t* offset, int64_t* nbytes, void* stream);

/* Lossless float planes of a contiguous fp32, bf16 or fp16 tensor (little-endian layout: fastee/reference/pack_planes.py). _bound: bytes
 * that always suffice. _info checks the header and says what the bytes hold. _unpack writes values [first, first + elements of out) into
 * out, contiguous and of the packed dtype; any bytes are safe to hand in. */
FASTEE_API int64_t fastee_pack_planes_bound(int64_t count, int64_t element_bytes);
FASTEE_API fastee_status fastee_pack_planes(const DLTensor* x, void* out, int64_t capacity, int64_t* nbytes, void* stream);
FASTEE_API fastee_status fastee_planes_info(const void* data, int64_t nbytes, DLDataType* dtype, int64_t* count);
FASTEE_API fastee_status fastee_unpack_planes(const void* data, int64_t nbytes, int64_t first, const DLTensor* out, void* stream);

#ifdef __cplusplus
}
#endif
#endif
