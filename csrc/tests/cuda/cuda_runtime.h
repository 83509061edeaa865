// CUDA's language and the part of its runtime that csrc/cuda uses, on the host: the very sources of the kernels and launchers are compiled
// with a C++ compiler against this header and run without a device, so that an index that is off by one, a missing barrier or a missing
// wait is found in CI, by the address sanitizer too.
//
// A thread is a fiber. Blocks start in order, as on a device, and several are resident at once; which fiber runs next is drawn from a
// seed, so that orders differ from run to run (Emulation::seed) and code that leans on one of them fails. Barriers and warp collectives
// block; a collective takes the whole warp. Shared memory is a heap block of exactly the size that the launch asked for. An
// asynchronous copy happens when it is waited for, never before. What this cannot show: memory ordering, speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <csetjmp>
#include <functional>
#include <memory>
#include <type_traits>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define FASTEE_EMULATED_DEVICE 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

struct Block;

struct Warp {
  uint64_t slots[2][32];  // alternate, so that a fast thread's next collective does not overwrite what a slow one still reads
  int arrived = 0;
  std::vector<struct Fiber*> waiting;
};

constexpr size_t kStack = 256 << 10;

struct Fiber {
  void prepare();
  ucontext_t context;  // of the first entry; later ones are long jumps, which spare swapcontext's system call
  jmp_buf resume;
  bool entered = false;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  dim3 thread;
  unsigned rank = 0, collectives = 0;
  bool finished = false;
  struct Copy {
    void* to;
    const void* from;
  };
  std::deque<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open;
};

struct Block {
  dim3 index;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  int arrived = 0, alive = 0;
  std::vector<Fiber*> waiting;
};

struct Emulation {
  uint64_t seed = 1;  // 0: threads run in order
  int resident = 3;   // blocks at once
  int64_t launches = 0;
  int fail_launch = 0;  // the error that launches return, for tests
};
inline Emulation& options() {
  static Emulation e;
  return e;
}

struct Machine {
  ucontext_t scheduler;
  jmp_buf resume;
  Fiber* now = nullptr;
  dim3 grid, block;
  std::vector<Fiber*> ready;
  std::function<void()> body;
  uint64_t state = 1;
  int64_t spins = 0;

  unsigned random() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>(state >> 33);
  }
  [[noreturn]] static void stop(const char* why) {
    std::fprintf(stderr, "emulation: %s\n", why);
    std::abort();
  }
};
inline Machine& machine() {
  static Machine m;
  return m;
}

// The caller has put itself on a list, or is finished. The address sanitizer knows swapcontext, but not jumps between stacks.
__attribute__((noinline)) inline void block_here() {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&machine().now->context, &machine().scheduler);
#else
  if (_setjmp(machine().now->resume) == 0) _longjmp(machine().resume, 1);
#endif
}
__attribute__((noinline)) inline void enter(Fiber* f) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&machine().scheduler, &f->context);
#else
  if (_setjmp(machine().resume)) return;
  if (f->entered) _longjmp(f->resume, 1);
  f->entered = true;
  setcontext(&f->context);
#endif
}
inline void yield() {
  machine().ready.push_back(machine().now);
  if (++machine().spins > 200'000'000) Machine::stop("threads spin and nothing else happens");
  block_here();
}
inline void wake(std::vector<Fiber*>& waiting) {
  machine().spins = 0;
  machine().ready.insert(machine().ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

inline void barrier() {
  Fiber* f = machine().now;
  Block& b = *f->block;
  b.waiting.push_back(f);
  if (++b.arrived == static_cast<int>(b.fibers.size())) b.arrived = 0, wake(b.waiting);
  block_here();
}

// Every thread of the warp hands in a value and then sees all of them.
inline const uint64_t* collect(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) Machine::stop("a collective takes the whole warp");
  Fiber* f = machine().now;
  Warp& w = f->block->warps[f->rank / 32];
  uint64_t* slots = w.slots[f->collectives++ & 1];
  slots[f->rank % 32] = value;
  w.waiting.push_back(f);
  if (++w.arrived == 32) w.arrived = 0, wake(w.waiting);
  block_here();
  return slots;
}

template <typename T>
uint64_t to_slot(T v) {
  uint64_t u = 0;
  static_assert(sizeof(T) <= 8);
  std::memcpy(&u, &v, sizeof(T));
  return u;
}
template <typename T>
T of_slot(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof(T));
  return v;
}

inline void fiber_main() {
  machine().body();
  machine().now->finished = true;
  block_here();
}

inline void Fiber::prepare() {  // in a function of its own: getcontext returns twice
  entered = false;
  getcontext(&context);
  context.uc_stack.ss_sp = stack.get(), context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
}

inline void run(dim3 grid, dim3 block, size_t shared, std::function<void()> body) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || threads % 32 || blocks == 0)
    Machine::stop("a launch takes 32 to 1024 threads in whole warps and at least one block");
  m.grid = grid, m.block = block, m.body = std::move(body), m.state = options().seed * 2654435761u + 1, m.spins = 0;
  static std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Fiber*> spare;
  for (auto& f : pool) spare.push_back(f.get());
  std::vector<std::unique_ptr<Block>> live;
  int64_t next = 0;
  auto start = [&] {
    auto b = std::make_unique<Block>();
    b->index = dim3(static_cast<unsigned>(next % grid.x), static_cast<unsigned>(next / grid.x % grid.y),
                    static_cast<unsigned>(next / grid.x / grid.y));
    b->warps.resize(threads / 32);
    b->shared.reset(new unsigned char[shared]);
    std::memset(b->shared.get(), 0xa5, shared);
    b->alive = static_cast<int>(threads);
    for (unsigned t = 0; t < threads; ++t) {
      if (spare.empty()) {
        pool.push_back(std::make_unique<Fiber>());
        pool.back()->stack.reset(new char[kStack]);
        spare.push_back(pool.back().get());
      }
      Fiber* f = spare.back();
      spare.pop_back();
      f->block = b.get(), f->rank = t, f->thread = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      f->collectives = 0, f->finished = false, f->groups.clear(), f->open.clear();
      f->prepare();
      b->fibers.push_back(f);
      m.ready.push_back(f);
    }
    live.push_back(std::move(b));
    ++next;
  };
  while (next < blocks && static_cast<int>(live.size()) < options().resident) start();
  while (!live.empty()) {
    if (m.ready.empty()) Machine::stop("deadlock: threads wait at different barriers, or one has left early");
    const size_t at = options().seed ? m.random() % m.ready.size() : 0;
    Fiber* f = m.ready[at];
    m.ready[at] = m.ready.back();
    if (options().seed) {
      m.ready.pop_back();
    } else {
      m.ready[at] = f;
      m.ready.erase(m.ready.begin());
    }
    m.now = f;
    enter(f);
    if (!f->finished) continue;
    spare.push_back(f);
    if (!f->groups.empty() || !f->open.empty()) {
      bool pending = !f->open.empty();
      for (auto& g : f->groups) pending = pending || !g.empty();
      if (pending) Machine::stop("a thread has left with an asynchronous copy under way");
    }
    Block* b = f->block;
    if (--b->alive) continue;
    live.erase(std::find_if(live.begin(), live.end(), [&](auto& p) { return p.get() == b; }));
    if (next < blocks) start();
  }
}
}  // namespace emulation

// Objects, not macros: a graph's node parameters have members of these names.
namespace emulation {
inline dim3& thread_index() { return machine().now->thread; }
inline dim3& block_index() { return machine().now->block->index; }
inline dim3& block_size() { return machine().block; }
inline dim3& grid_size() { return machine().grid; }
template <dim3& (*Get)(), unsigned dim3::*Axis>
struct Coordinate {
  operator unsigned() const { return Get().*Axis; }
};
template <dim3& (*Get)()>
struct Coordinates {
  Coordinate<Get, &dim3::x> x;
  Coordinate<Get, &dim3::y> y;
  Coordinate<Get, &dim3::z> z;
};
}  // namespace emulation
inline constexpr emulation::Coordinates<emulation::thread_index> threadIdx{};
inline constexpr emulation::Coordinates<emulation::block_index> blockIdx{};
inline constexpr emulation::Coordinates<emulation::block_size> blockDim{};
inline constexpr emulation::Coordinates<emulation::grid_size> gridDim{};

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::collect(mask, 0); }
inline void __threadfence() { emulation::yield(); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = emulation::collect(mask, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int lane) {
  return emulation::of_slot<T>(emulation::collect(mask, emulation::to_slot(v))[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int with) {
  const int lane = static_cast<int>(emulation::machine().now->rank % 32);
  return emulation::of_slot<T>(emulation::collect(mask, emulation::to_slot(v))[lane ^ with]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = emulation::machine().now->rank % 32;
  return emulation::of_slot<T>(emulation::collect(mask, emulation::to_slot(v))[lane >= by ? lane - by : lane]);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  const uint64_t* all = emulation::collect(mask, v);
  return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  const uint64_t* all = emulation::collect(mask, v);
  return static_cast<unsigned>(*std::min_element(all, all + 32));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  const uint64_t* all = emulation::collect(mask, v);
  uint64_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i];
  return static_cast<unsigned>(sum);
}
template <typename T, typename F>
T emulated_atomic(T* p, F f) {
  emulation::yield();
  const T old = *p;
  *p = f(old);
  return old;
}
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return emulated_atomic(p, [&](T old) { return static_cast<T>(old + v); });
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return emulated_atomic(p, [&](T old) { return old > v ? old : v; });
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return emulated_atomic(p, [&](T old) { return old < v ? old : v; });
}
inline unsigned atomicOr(unsigned* p, unsigned v) {
  return emulated_atomic(p, [&](unsigned old) { return old | v; });
}
inline float __ldcg(const float* p) { return *p; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline unsigned __float_as_uint(float f) { return emulation::of_slot<unsigned>(emulation::to_slot(f)); }
inline float __uint_as_float(unsigned u) { return emulation::of_slot<float>(emulation::to_slot(u)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// The runtime.
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100, cudaErrorIllegalAddress = 700, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorIllegalAddress ? "an illegal memory access was encountered"
         : e == cudaErrorNoDevice     ? "no CUDA-capable device is detected"
                                      : "an error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  ++emulation::options().launches;
  if (emulation::options().fail_launch) return emulation::options().fail_launch;
  emulation::run(grid, block, shared, [=] {
    [&]<size_t... I>(std::index_sequence<I...>) {
      kernel(*static_cast<std::decay_t<P>*>(arguments[I])...);
    }(std::index_sequence_for<P...>{});
  });
  return cudaSuccess;
}

// Graphs: what exit_graph builds, kept as it was built, and run as a device would: a node runs after the ones it names.
namespace emulation {
struct AnyKernel {  // a kernel with the types of its arguments, which a graph's node copies
  AnyKernel() = default;
  template <typename... P>
  AnyKernel(void (*kernel)(P...)) {
    bind = [=](void** arguments) -> std::function<void()> {
      return [&]<size_t... I>(std::index_sequence<I...>) {
        return std::function<void()>(
            [=, copies = std::make_tuple(*static_cast<std::decay_t<P>*>(arguments[I])...)] { std::apply(kernel, copies); });
      }(std::index_sequence_for<P...>{});
    };
  }
  std::function<std::function<void()>(void**)> bind;
};
struct Node;
struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<std::unique_ptr<unsigned>> handles;
  Graph() { ++alive(); }
  ~Graph() { --alive(); }
  Graph(const Graph&) = delete;
  static int& alive() {
    static int n = 0;
    return n;
  }
};
struct Node {
  std::vector<Node*> after;
  std::function<void()> action;
  const Graph* child = nullptr;
  unsigned* handle = nullptr;
  bool is_switch = false;
  std::vector<std::unique_ptr<Graph>> bodies;
  std::vector<Graph*> faces;
  bool done = false;
};
inline void run_graph(const Graph& g) {
  for (auto& n : g.nodes) n->done = false;
  for (auto& n : g.nodes) {
    for (const Node* before : n->after)
      if (!before->done) Machine::stop("a node runs before one that it waits for");
    if (n->action) n->action();
    if (n->child) run_graph(*n->child);
    if (n->handle) {
      const unsigned v = *n->handle, body = n->is_switch ? v : v ? 0u : 1u;
      if (body < n->bodies.size()) run_graph(*n->bodies[body]);
    }
    n->done = true;
  }
}
// The call number `at` (from 1) of the graph functions fails.
inline int& failing_call() {
  static int at = 0;
  return at;
}
inline bool fails() { return failing_call() > 0 && --failing_call() == 0; }
}  // namespace emulation

#define CUDART_VERSION 13000
using cudaGraph_t = emulation::Graph*;
using cudaGraphExec_t = emulation::Graph*;
using cudaGraphNode_t = emulation::Node*;
using cudaGraphConditionalHandle = unsigned long long;
enum cudaGraphConditionalNodeType { cudaGraphCondTypeIf = 0, cudaGraphCondTypeWhile = 1, cudaGraphCondTypeSwitch = 2 };
enum cudaGraphNodeType { cudaGraphNodeTypeConditional = 13 };
struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  struct {
    cudaGraphConditionalHandle handle;
    cudaGraphConditionalNodeType type;
    unsigned size;
    cudaGraph_t* phGraph_out;
  } conditional;
};
struct cudaKernelNodeParams {
  emulation::AnyKernel func;
  dim3 gridDim, blockDim;
  unsigned sharedMemBytes;
  void** kernelParams;
};
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) { *reinterpret_cast<unsigned*>(handle) = value; }
inline cudaError_t cudaGraphCreate(cudaGraph_t* g, unsigned) {
  if (emulation::fails()) return 2;
  *g = new emulation::Graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete g;
  return cudaSuccess;
}
inline emulation::Node* add_node(cudaGraph_t g, const cudaGraphNode_t* after, size_t n) {
  g->nodes.push_back(std::make_unique<emulation::Node>());
  if (n) g->nodes.back()->after.assign(after, after + n);
  return g->nodes.back().get();
}
inline cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t g, const cudaGraphNode_t* after, size_t n,
                                              cudaGraph_t child) {
  if (emulation::fails()) return 2;
  *node = add_node(g, after, n);
  (*node)->child = child;
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t g, const cudaGraphNode_t* after, size_t n,
                                          const cudaKernelNodeParams* p) {
  if (emulation::fails()) return 2;
  *node = add_node(g, after, n);
  (*node)->action = [grid = p->gridDim, block = p->blockDim, shared = p->sharedMemBytes, body = p->func.bind(p->kernelParams)] {
    emulation::run(grid, block, shared, body);
  };
  return cudaSuccess;
}
inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t g, unsigned, unsigned) {
  if (emulation::fails()) return 2;
  g->handles.push_back(std::make_unique<unsigned>(77u));
  *handle = reinterpret_cast<cudaGraphConditionalHandle>(g->handles.back().get());
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t g, const cudaGraphNode_t* after, const void*, size_t n,
                                    cudaGraphNodeParams* p) {
  if (emulation::fails()) return 2;
  *node = add_node(g, after, n);
  emulation::Node& c = **node;
  c.handle = reinterpret_cast<unsigned*>(p->conditional.handle);
  c.is_switch = p->conditional.type == cudaGraphCondTypeSwitch;
  for (unsigned i = 0; i < p->conditional.size; ++i)
    c.bodies.push_back(std::make_unique<emulation::Graph>()), c.faces.push_back(c.bodies.back().get());
  p->conditional.phGraph_out = c.faces.data();
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  if (emulation::fails()) return 2;
  *e = new emulation::Graph;  // takes over what the template holds, which its maker then destroys
  (*e)->nodes.swap(g->nodes), (*e)->handles.swap(g->handles);
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
  emulation::run_graph(*e);
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return cudaGraphDestroy(e); }
