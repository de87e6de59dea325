// The scheduler of host_execution.h, and the part of CUDA's runtime that launchers and host code call.
#include "host_execution.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#error "host execution switches fibers by hand, for x86-64 only"
#endif

// Saves what a call preserves on the stack, whose pointer goes to *from, and goes on with the stack `to`.
extern "C" void bk_switch_fiber(void** from, void* to);
asm(R"(
.pushsection .text
bk_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");

namespace host_execution {

int order = 0;
bool truncating = false;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;
// What a block of sm_80 can ask for, and what it gets unasked.
constexpr int kMostShared = 163 << 10;
constexpr size_t kUnaskedShared = 48 << 10;

enum class State { Ready, AtBarrier, InWarp, Done };

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  State state;
  void* stack_pointer;
  void* fake_stack;
  uint3 index;
  Place place;
  std::vector<Copy> issued;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  const char* name;
  Place place;
  uint32_t mask, arrived;
  void* value[32];
};

struct Free {
  void operator()(void* p) const { free(p); }
};

struct Block {
  const char* kernel;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, std::unique_ptr<void, Free>> variables;
  void* dynamic;
  size_t dynamic_bytes;
  int current;
};

Block block;
void* scheduler;
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_bytes;
char* stacks;
int stack_count;
std::map<const void*, int> allowed_shared;
cudaError_t last_error = cudaSuccess;

char* stack_of(int thread) { return stacks + thread * (kStackBytes + kGuardBytes) + kGuardBytes; }

void to_scheduler(bool last) {
  Thread& t = block.threads[block.current];
  __sanitizer_start_switch_fiber(last ? nullptr : &t.fake_stack, scheduler_bottom, scheduler_bytes);
  bk_switch_fiber(&t.stack_pointer, scheduler);
  __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
  (*block.body)();
  block.threads[block.current].state = State::Done;
  to_scheduler(true);
}

void resume(int thread) {
  Thread& t = block.threads[thread];
  block.current = thread;
  threadIdx = t.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_of(thread), kStackBytes);
  bk_switch_fiber(&scheduler, t.stack_pointer);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void prepare(int thread) {
  Thread& t = block.threads[thread];
  // Six registers, the return address, and one word that aligns the stack as a call would.
  void** top = reinterpret_cast<void**>(stack_of(thread) + kStackBytes) - 8;
  memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(enter);
  t.stack_pointer = top;
  t.state = State::Ready;
}

void need_stacks(int count) {
  if (count <= stack_count) {
    return;
  }
  const size_t each = kStackBytes + kGuardBytes;
  if (stacks) {
    munmap(stacks, stack_count * each);
  }
  stacks = static_cast<char*>(
      mmap(nullptr, count * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) {
    fail("no memory for %d stacks", count);
  }
  for (int i = 0; i < count; ++i) {
    mprotect(stacks + i * each, kGuardBytes, PROT_NONE);
  }
  stack_count = count;
}

// The order'th order of 0 … count − 1: forwards, backwards, or shuffled in a fixed way.
std::vector<int> permutation(int count) {
  std::vector<int> p(count);
  std::iota(p.begin(), p.end(), 0);
  if (order == 1) {
    std::reverse(p.begin(), p.end());
  } else if (order == 2) {
    uint64_t state = 88172645463325252u;
    for (int i = count - 1; i > 0; --i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      std::swap(p[i], p[state % (i + 1)]);
    }
  }
  return p;
}

const char* file_of(Place place) {
  const char* slash = strrchr(place.file_name(), '/');
  return slash ? slash + 1 : place.file_name();
}

// All threads that are not done are blocked.
void release_barrier() {
  Thread* at_barrier = nullptr;
  int done = 0;
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& t = block.threads[i];
    if (t.state == State::InWarp) {
      const Warp& w = block.warps[i / 32];
      fail("%s at %s:%u: lanes %08x of warp %zu came, its mask is %08x", w.name, file_of(w.place), w.place.line(),
           w.arrived, i / 32, w.mask);
    }
    done += t.state == State::Done;
    if (t.state == State::AtBarrier) {
      at_barrier = at_barrier ? at_barrier : &t;
      if (t.place.line() != at_barrier->place.line()) {
        fail("barrier: threads wait at %s:%u and at %s:%u", file_of(t.place), t.place.line(),
             file_of(at_barrier->place), at_barrier->place.line());
      }
    }
  }
  if (done) {
    fail("barrier at %s:%u: %d threads have left the kernel before it", file_of(at_barrier->place),
         at_barrier->place.line(), done);
  }
  for (Thread& t : block.threads) {
    t.state = State::Ready;
  }
}

void run_block() {
  const int threads = static_cast<int>(block.threads.size());
  for (int i = 0; i < threads; ++i) {
    prepare(i);
  }
  for (Warp& w : block.warps) {
    w.arrived = 0;
  }
  const std::vector<int> warps = permutation(static_cast<int>(block.warps.size()));
  const std::vector<int> lanes = permutation(32);
  // In the shuffled order warps take turns at every collective; in the others each runs ahead to the barrier.
  const bool ahead = order != 2;
  for (bool left = true; left;) {
    bool moved = false;
    for (const int w : warps) {
      bool again = true;
      while (again) {
        again = false;
        for (const int lane : lanes) {
          const int i = 32 * w + lane;
          if (i < threads && block.threads[i].state == State::Ready) {
            resume(i);
            moved = true;
            again = ahead;
          }
        }
      }
    }
    if (!moved) {
      left = std::any_of(block.threads.begin(), block.threads.end(),
                         [](const Thread& t) { return t.state != State::Done; });
      if (left) {
        release_barrier();
      }
    }
  }
  for (Thread& t : block.threads) {
    for (auto& group : t.groups) {
      t.issued.insert(t.issued.end(), group.begin(), group.end());
    }
    for (const Copy& c : t.issued) {
      __asan_unpoison_memory_region(c.to, 16);
    }
    t.issued.clear();
    t.groups.clear();
  }
}

void* allocate(size_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max<size_t>(alignment, sizeof(void*)), bytes)) {
    fail("no memory");
  }
  memset(p, garbage(), bytes);
  return p;
}

}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  fprintf(stderr, "\nhost execution: %s, block (%u, %u, %u), thread %u, order %d: ", block.kernel, blockIdx.x,
          blockIdx.y, blockIdx.z, threadIdx.x, order);
  vfprintf(stderr, format, list);
  fprintf(stderr, "\n");
  va_end(list);
  abort();
}

unsigned char garbage() {
  // Not-a-number in every type; a large number; a small negative one.
  constexpr unsigned char kGarbage[kOrders] = {0xFF, 0x7B, 0xA5};
  return kGarbage[order];
}

void set_dynamic_shared(const void* kernel, int bytes) {
  if (bytes > kMostShared) {
    last_error = cudaErrorInvalidValue;
  } else {
    allowed_shared[kernel] = bytes;
  }
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 size, size_t shared_bytes,
            const std::function<void()>& thread) {
  block.kernel = name;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const size_t allowed = std::max<size_t>(kUnaskedShared, allowed_shared.count(kernel) ? allowed_shared[kernel] : 0);
  if (threads == 0 || threads > 1024 || size.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (shared_bytes > allowed) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  need_stacks(static_cast<int>(threads));
  gridDim = grid;
  blockDim = size;
  block.body = &thread;
  block.dynamic_bytes = shared_bytes;
  block.threads.clear();
  block.threads.resize(threads);
  block.warps.assign((threads + 31) / 32, Warp{});
  for (uint32_t i = 0; i < threads; ++i) {
    block.threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (const int b : permutation(static_cast<int>(blocks))) {
    const uint32_t i = static_cast<uint32_t>(b);
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    block.variables.clear();
    const std::unique_ptr<void, Free> dynamic(shared_bytes ? allocate(shared_bytes, 128) : nullptr);
    block.dynamic = dynamic.get();
    run_block();
  }
  block.variables.clear();
}

void* shared(int id, size_t bytes, size_t alignment) {
  auto& variable = block.variables[id];
  if (!variable) {
    variable.reset(allocate(bytes, alignment));
  }
  return variable.get();
}

void* dynamic_shared() {
  if (!block.dynamic) {
    fail("dynamic shared memory is used and none was asked for");
  }
  return block.dynamic;
}

void barrier(Place place) {
  Thread& t = block.threads[block.current];
  t.place = place;
  t.state = State::AtBarrier;
  to_scheduler(false);
}

void meet(const char* name, uint32_t mask, Place place, void* value, const std::function<void(void* const*)>& finish) {
  const int me = block.current, lane = me % 32;
  Warp& w = block.warps[me / 32];
  if (!(mask >> lane & 1)) {
    fail("%s at %s:%u: lane %d is not in its own mask %08x", name, file_of(place), place.line(), lane, mask);
  }
  const int last = static_cast<int>(block.threads.size()) - me / 32 * 32;
  if (last < 32 && mask >> last) {
    fail("%s at %s:%u: mask %08x in a warp of %d lanes", name, file_of(place), place.line(), mask, last);
  }
  if (w.arrived == 0) {
    w.name = name;
    w.mask = mask;
    w.place = place;
    std::fill(std::begin(w.value), std::end(w.value), nullptr);
  } else if (strcmp(w.name, name) != 0 || w.mask != mask || w.place.line() != place.line()) {
    fail("%s at %s:%u with mask %08x, while other lanes are in %s at %s:%u with mask %08x", name, file_of(place),
         place.line(), mask, w.name, file_of(w.place), w.place.line(), w.mask);
  }
  w.arrived |= 1u << lane;
  w.value[lane] = value;
  if (w.arrived != mask) {
    block.threads[me].state = State::InWarp;
    to_scheduler(false);
    return;
  }
  finish(w.value);
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) {
      block.threads[me / 32 * 32 + l].state = State::Ready;
    }
  }
  w.arrived = 0;
}

void copy_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("cp.async: addresses %p and %p are not aligned to 16 bytes", to, from);
  }
  // Faults where the place is none of the block's, or waits for another copy.
  memset(to, garbage(), 16);
  __asan_poison_memory_region(to, 16);
  block.threads[block.current].issued.push_back({to, from});
}

void commit_copies() {
  Thread& t = block.threads[block.current];
  t.groups.push_back(std::move(t.issued));
  t.issued.clear();
}

void wait_copies(int pending) {
  auto& groups = block.threads[block.current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& c : groups.front()) {
      __asan_unpoison_memory_region(c.to, 16);
      if (c.from) {
        memcpy(c.to, c.from, 16);
      } else {
        memset(c.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace host_execution

extern "C" __attribute__((visibility("default"))) void host_execution_configure(int order, int truncating) {
  host_execution::order = order;
  host_execution::truncating = truncating;
}

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(host_execution::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return host_execution::last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : error ? "invalid value" : "no error";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = host_execution::kMostShared;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      host_execution::fail("device attribute %d is not known to host execution", attribute);
  }
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  memset(to, byte, bytes);
  return cudaSuccess;
}

}  // extern "C"
