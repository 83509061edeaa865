/* fastee's C ABI for tensors on a CUDA device (libfastee_cuda): what fastee/fastee.h does on the CPU, queued on a stream.
 *
 * Its rules hold here too, and: every tensor and array lies on the device that is current; `stream` is a cudaStream_t, NULL the default
 * one; a function returns when its work is queued, allocates nothing, never waits, and may be captured into a graph. Counts are written
 * on the device. Any stream may be used, but work that shares `memory` must be ordered by the caller (one memory per stream does that).
 *
 * FASTEE_DEVICE_ERROR comes with CUDA's own text and the name of the launch. Where CUDA says that the context is broken by an earlier
 * kernel, the text says so and names the launch before this one: no later call can succeed in this process.
 */
#ifndef FASTEE_CUDA_H_
#define FASTEE_CUDA_H_
#include "fastee/fastee.h"

#if defined(FASTEE_CUDA_BUILDING)
#define FASTEE_CUDA_API __attribute__((visibility("default")))
#else
#define FASTEE_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

FASTEE_CUDA_API int32_t fastee_cuda_abi_version(void);
FASTEE_CUDA_API const char* fastee_cuda_last_error(void);

/* Working memory on the device. `sync` must be zero before its first use, and every call leaves it zero; `scratch` may hold anything. They
 * are aligned to 8 and 16 bytes. */
typedef struct {
  void* sync;
  int64_t sync_bytes;
  void* scratch;
  int64_t scratch_bytes;
} fastee_cuda_memory;

/* Bytes that suffice for B rows: of sync for every function; of scratch for a head of C classes on D features and, with exit_pack, `groups`
 * scales a row (else 0). compact takes the sync of ceil(B / 4096) rows, pack_planes that of ceil(values / 2048). */
FASTEE_CUDA_API int64_t fastee_cuda_sync_bytes(int64_t rows);
FASTEE_CUDA_API int64_t fastee_cuda_scratch_bytes(int64_t rows, int64_t features, int64_t classes, int64_t groups);

/* Heads of at most 20,480 features. One launch; two when the classes are divided over blocks and the pool reduces. */
FASTEE_CUDA_API fastee_status fastee_cuda_exit_head(const DLTensor* x, const fastee_head* head, const fastee_head_out* out,
                                                    const fastee_cuda_memory* memory, void* stream);

FASTEE_CUDA_API fastee_status fastee_cuda_compact(const DLTensor* mask, int64_t* index, int64_t* count, const fastee_cuda_memory* memory,
                                                  void* stream);

/* x fp32, bf16 or fp16; otherwise fastee_quantize_rows, bit for bit. */
FASTEE_CUDA_API fastee_status fastee_cuda_quantize_rows(const DLTensor* x, fastee_format format, int64_t group, const DLTensor* data,
                                                        const DLTensor* scale, void* stream);

/* x fp32, bf16 or fp16. `buffer` has room for the scales and the data of all rows (capacity checks that); extent [2], on the device: the
 * byte at which the packed rows begin, and their bytes. out.exits, index and count are needed. */
FASTEE_CUDA_API fastee_status fastee_cuda_exit_pack(const DLTensor* x, const fastee_head* head, fastee_format format, int64_t group,
                                                    const fastee_head_out* out, void* buffer, int64_t capacity, int64_t* extent,
                                                    const fastee_cuda_memory* memory, void* stream);

/* The bytes of fastee_pack_planes; nbytes [1] on the device, out aligned to 4 bytes. */
FASTEE_CUDA_API fastee_status fastee_cuda_pack_planes(const DLTensor* x, void* out, int64_t capacity, int64_t* nbytes,
                                                      const fastee_cuda_memory* memory, void* stream);

/* Values [first, first + elements of out) of `count` packed ones; the caller has read the header (fastee_planes_info) on the host, the dtype
 * of out being its dtype. damaged [1] on the device: the smallest block that is none, else -1; its values stay unwritten. Any bytes
 * are safe to hand in. data is aligned to 4 bytes. */
FASTEE_CUDA_API fastee_status fastee_cuda_unpack_planes(const void* data, int64_t nbytes, int64_t count, int64_t first, const DLTensor* out,
                                                        int64_t* damaged, void* stream);

/* An exit graph: the segments of a network with exits as one CUDA graph that skips on the device what nobody needs. Stage 0 always runs;
 * stage i runs when the count that stage i - 1 wrote is above 0, in the smallest of its buckets that holds so many rows. Nothing that is
 * skipped costs a node: a stage and all behind it stand in the body of one IF node; buckets are the bodies of a SWITCH node.
 *
 * graphs[b] is a captured cudaGraph_t that runs the stage on rows[b] rows, the survivors first (its first work gathers them), and writes its
 * survivors to `count` (NULL for the last stage): kernels, copies and memsets in one context, cloned here. What they work on, the count
 * included, is kept by the caller. rows grow; the largest is at least that of the stage before; stage 0 has one bucket. */
#define FASTEE_CUDA_BUCKETS 16
typedef struct {
  const int64_t* rows;
  void* const* graphs;
  int32_t buckets;
  const int64_t* count;
} fastee_cuda_stage;
typedef struct fastee_cuda_exit_graph fastee_cuda_exit_graph;

FASTEE_CUDA_API fastee_status fastee_cuda_exit_graph_create(const fastee_cuda_stage* stages, int32_t n, fastee_cuda_exit_graph** out);
FASTEE_CUDA_API fastee_status fastee_cuda_exit_graph_launch(fastee_cuda_exit_graph* graph, void* stream);
FASTEE_CUDA_API void fastee_cuda_exit_graph_destroy(fastee_cuda_exit_graph* graph); /* NULL: nothing */

#ifdef __cplusplus
}
#endif
#endif
