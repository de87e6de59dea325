// Runs the library's CUDA kernels on the CPU, for tests: what a .cu file needs beyond CUDA's own headers, which a C++
// compiler reads as they are. Every CUDA thread is a fiber that runs until it meets others: at a barrier or in a warp's
// collective. Threads therefore run as far ahead of one another as the program allows, in several orders.
//
// Shared memory is filled with garbage for each block and lies between AddressSanitizer's red zones. Reported, with the
// place, and fatal: a barrier that not all threads reach, or not at one place; a collective without all the lanes its
// mask names; more shared memory than was asked for; a launch no device takes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <source_location>
#include <type_traits>

namespace host_execution {

using Place = std::source_location;

// One of kOrders orders of threads, warps and blocks; whether tensor cores truncate their sums.
constexpr int kOrders = 3;
extern int order;
extern bool truncating;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& thread);
void set_dynamic_shared(const void* kernel, int bytes);

// The block's variable number `id`; what dynamic shared memory there is.
void* shared(int id, size_t bytes, size_t alignment);
void* dynamic_shared();

void barrier(Place place);

// Waits for all lanes of `mask` to come with their own `value`; then finish(values of the lanes, or null) runs once.
void meet(const char* name, uint32_t mask, Place place, void* value, const std::function<void(void* const*)>& finish);

unsigned char garbage();

// `from` null: zeros.
void copy_later(void* to, const void* from);
void commit_copies();
void wait_copies(int pending);

// The value of lane `from` of those in `mask`, or one's own where that is negative.
template <typename T>
T shuffle(const char* name, uint32_t mask, Place place, T value, int from) {
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, from};
  meet(name, mask, place, &mine, [name](void* const* lanes) {
    for (int to = 0; to < 32; ++to) {
      Lane* l = static_cast<Lane*>(lanes[to]);
      if (l && l->from >= 0) {
        if (!lanes[l->from]) {
          fail("%s: lane %d reads lane %d, which takes no part", name, to, l->from);
        }
        l->out = static_cast<Lane*>(lanes[l->from])->in;
      }
    }
  });
  return mine.out;
}

}  // namespace host_execution

// Hidden inline variables: the scheduler sets them before a thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define BK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                         \
  ((void)(stream), ::host_execution::launch(#kernel, reinterpret_cast<const void*>(&kernel), grid, block, \
                                            shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define BK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::host_execution::dynamic_shared())

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    ::host_execution::set_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
  }
  return cudaSuccess;
}

#define __launch_bounds__(...)
#define __noinline__

static inline void __syncthreads(host_execution::Place place = host_execution::Place::current()) {
  host_execution::barrier(place);
}

static inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu,
                              host_execution::Place place = host_execution::Place::current()) {
  host_execution::meet("__syncwarp", mask, place, &mask, [](void* const*) {});
}

static inline uint32_t __ballot_sync(uint32_t mask, bool bit,
                                     host_execution::Place place = host_execution::Place::current()) {
  uint32_t word = bit;
  host_execution::meet("__ballot_sync", mask, place, &word, [](void* const* lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      all |= lanes[lane] && *static_cast<uint32_t*>(lanes[lane]) ? 1u << lane : 0;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane]) {
        *static_cast<uint32_t*>(lanes[lane]) = all;
      }
    }
  });
  return word;
}

static inline int __any_sync(uint32_t mask, bool bit, host_execution::Place place = host_execution::Place::current()) {
  return __ballot_sync(mask, bit, place) != 0;
}

static inline int __all_sync(uint32_t mask, bool bit, host_execution::Place place = host_execution::Place::current()) {
  return __ballot_sync(mask, !bit, place) == 0;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32,
              host_execution::Place place = host_execution::Place::current()) {
  const int lane = threadIdx.x % 32;
  return host_execution::shuffle("__shfl_sync", mask, place, value, lane / width * width + from % width);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  host_execution::Place place = host_execution::Place::current()) {
  const int lane = threadIdx.x % 32;
  return host_execution::shuffle("__shfl_xor_sync", mask, place, value,
                                 (lane ^ bits) / width <= lane / width ? lane ^ bits : -1);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32,
                   host_execution::Place place = host_execution::Place::current()) {
  const int lane = threadIdx.x % 32;
  return host_execution::shuffle("__shfl_down_sync", mask, place, value, lane % width + by < width ? lane + by : -1);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32,
                 host_execution::Place place = host_execution::Place::current()) {
  const int lane = threadIdx.x % 32;
  return host_execution::shuffle("__shfl_up_sync", mask, place, value, lane % width >= by ? lane - by : -1);
}

template <typename T>
const T& __ldg(const T* p) {
  return *p;
}
static inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
static inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
static inline int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }
static inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
static inline int64_t __double_as_longlong(double x) { return std::bit_cast<int64_t>(x); }
static inline double __longlong_as_double(int64_t x) { return std::bit_cast<double>(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
static inline int64_t __double2ll_rn(double x) { return static_cast<int64_t>(nearbyint(x)); }
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline double __ll2double_rn(int64_t x) { return static_cast<double>(x); }
static inline int __popc(uint32_t x) { return std::popcount(x); }
static inline int __clz(uint32_t x) { return std::countl_zero(x); }
static inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
static inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) {
    y |= (x >> i & 1) << (31 - i);
  }
  return y;
}
// Selector digit: a byte of (x, y), or with its top bit set that byte's sign eight times.
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i);
    const uint32_t byte = static_cast<uint32_t>(both >> (8 * (digit & 7))) & 0xFF;
    out |= (digit & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return out;
}
using std::max;
using std::min;
