// The exit graph: conditional nodes choose on the device which captured stages run. A level of the graph is
//
//   stage (a child graph, or a SWITCH over its buckets) -> choose: reads the count, sets the next level's conditions -> IF { next level }
//
// so levels nest, the number of nodes grows with the number of buckets, not with their combinations, and what is skipped is never visited.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace fastee::cuda {
namespace {

struct Choice {
  const int64_t* count;
  cudaGraphConditionalHandle more, bucket;  // whether anyone is left; which bucket holds them
  int buckets;
  int64_t rows[FASTEE_CUDA_BUCKETS];
};

__global__ void __launch_bounds__(32) choose(const __grid_constant__ Choice c) {
  if (threadIdx.x) return;
  const int64_t count = *c.count;
  cudaGraphSetConditional(c.more, count > 0);
  if (c.buckets == 1) return;
  unsigned bucket = 0;
#pragma unroll
  for (int b = 0; b < FASTEE_CUDA_BUCKETS; ++b)
    if (b + 1 < c.buckets && count > c.rows[b]) bucket = static_cast<unsigned>(b + 1);
  cudaGraphSetConditional(c.bucket, bucket);
}

cudaError_t add_conditional(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphConditionalHandle handle,
                            cudaGraphConditionalNodeType type, int bodies, cudaGraphNode_t* node, cudaGraph_t* body) {
  cudaGraphNodeParams p{};
  p.type = cudaGraphNodeTypeConditional;
  p.conditional.handle = handle, p.conditional.type = type, p.conditional.size = static_cast<unsigned>(bodies);
#if CUDART_VERSION >= 13000
  const cudaError_t e = cudaGraphAddNode(node, graph, after, nullptr, after ? 1 : 0, &p);
#else
  const cudaError_t e = cudaGraphAddNode(node, graph, after, after ? 1 : 0, &p);
#endif
  for (int i = 0; i < bodies && e == cudaSuccess; ++i) body[i] = p.conditional.phGraph_out[i];
  return e;
}

struct Builder {
  const fastee_cuda_stage* stages;
  int n;
  cudaGraph_t root = nullptr;

  // Level i into `graph`; `bucket` is the handle of its SWITCH.
  cudaError_t level(cudaGraph_t graph, int i, cudaGraphConditionalHandle bucket) {
    const fastee_cuda_stage& s = stages[i];
    cudaGraphNode_t stage, chosen, rest;
    if (s.buckets == 1) {
      if (const cudaError_t e = cudaGraphAddChildGraphNode(&stage, graph, nullptr, 0, static_cast<cudaGraph_t>(s.graphs[0]))) return e;
    } else {
      cudaGraph_t bodies[FASTEE_CUDA_BUCKETS];
      if (const cudaError_t e = add_conditional(graph, nullptr, bucket, cudaGraphCondTypeSwitch, s.buckets, &stage, bodies)) return e;
      for (int b = 0; b < s.buckets; ++b) {
        cudaGraphNode_t inner;
        if (const cudaError_t e = cudaGraphAddChildGraphNode(&inner, bodies[b], nullptr, 0, static_cast<cudaGraph_t>(s.graphs[b])))
          return e;
      }
    }
    if (i + 1 == n) return cudaSuccess;
    const fastee_cuda_stage& next = stages[i + 1];
    Choice c{s.count, 0, 0, next.buckets, {}};
    for (int b = 0; b < next.buckets; ++b) c.rows[b] = next.rows[b];
    // Handles belong to the whole graph. They are set by every launch before anyone reads them, so they need no default.
    if (const cudaError_t e = cudaGraphConditionalHandleCreate(&c.more, root, 0, 0)) return e;
    if (next.buckets > 1)
      if (const cudaError_t e = cudaGraphConditionalHandleCreate(&c.bucket, root, 0, 0)) return e;
    void* arguments[] = {&c};
    cudaKernelNodeParams p{};
    p.func = KernelAddress(choose), p.gridDim = dim3(1), p.blockDim = dim3(32), p.kernelParams = arguments;
    if (const cudaError_t e = cudaGraphAddKernelNode(&chosen, graph, &stage, 1, &p)) return e;
    cudaGraph_t body;
    if (const cudaError_t e = add_conditional(graph, &chosen, c.more, cudaGraphCondTypeIf, 1, &rest, &body)) return e;
    return level(body, i + 1, c.bucket);
  }
};

fastee_status expect_stages(const fastee_cuda_stage* stages, int32_t n) {
  if (!stages || n < 1) return fail(FASTEE_INVALID_ARGUMENT, "exit_graph: stages must be at least one, got " + number(stages ? n : 0));
  for (int i = 0; i < n; ++i) {
    const fastee_cuda_stage& s = stages[i];
    const std::string name = "exit_graph: stages[" + number(i) + "]";
    if (s.buckets < 1 || s.buckets > (i ? FASTEE_CUDA_BUCKETS : 1) || !s.rows || !s.graphs)
      return fail(FASTEE_INVALID_ARGUMENT, name + " must have " + (i ? "1 to " + number(FASTEE_CUDA_BUCKETS) + " buckets" : "one bucket") +
                                               " with rows and graphs, got " + number(s.buckets));
    if (!s.count && i + 1 < n) return fail(FASTEE_INVALID_ARGUMENT, name + ".count must not be NULL, only the last stage has none");
    for (int b = 0; b < s.buckets; ++b) {
      if (!s.graphs[b]) return fail(FASTEE_INVALID_ARGUMENT, name + ".graphs[" + number(b) + "] must not be NULL");
      if (s.rows[b] < 1 || (b && s.rows[b] <= s.rows[b - 1]))
        return fail(FASTEE_INVALID_ARGUMENT, name + ".rows must be positive and grow, got " + number(s.rows[b]) + " at " + number(b));
    }
    if (i && s.rows[s.buckets - 1] < stages[i - 1].rows[stages[i - 1].buckets - 1])
      return fail(FASTEE_INVALID_ARGUMENT, name + ".rows must reach the " + number(stages[i - 1].rows[stages[i - 1].buckets - 1]) +
                                               " rows of the stage before, got " + number(s.rows[s.buckets - 1]));
  }
  return FASTEE_OK;
}
}  // namespace
}  // namespace fastee::cuda

using namespace fastee;

struct fastee_cuda_exit_graph {
  cudaGraphExec_t executable;
};

extern "C" fastee_status fastee_cuda_exit_graph_create(const fastee_cuda_stage* stages, int32_t n, fastee_cuda_exit_graph** out) {
  static const char op[] = "exit_graph";
  if (!out) return fail(FASTEE_INVALID_ARGUMENT, "exit_graph: out must not be NULL");
  FASTEE_TRY(cuda::expect_stages(stages, n));
  cudaGraph_t root = nullptr;
  FASTEE_TRY(cuda::report(op, cudaGraphCreate(&root, 0)));
  cudaGraphExec_t executable = nullptr;
  cudaError_t e = cuda::Builder{stages, n, root}.level(root, 0, 0);
  if (e == cudaSuccess) e = cudaGraphInstantiate(&executable, root, 0);
  cudaGraphDestroy(root);  // the executable graph stands on its own
  FASTEE_TRY(cuda::report(op, e));
  *out = new fastee_cuda_exit_graph{executable};
  return FASTEE_OK;
}

extern "C" fastee_status fastee_cuda_exit_graph_launch(fastee_cuda_exit_graph* graph, void* stream) {
  if (!graph) return fail(FASTEE_INVALID_ARGUMENT, "exit_graph: graph must not be NULL");
  return cuda::report("exit_graph", cudaGraphLaunch(graph->executable, static_cast<cudaStream_t>(stream)));
}

extern "C" void fastee_cuda_exit_graph_destroy(fastee_cuda_exit_graph* graph) {
  if (!graph) return;
  cudaGraphExecDestroy(graph->executable);
  delete graph;
}
