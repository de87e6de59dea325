// How a kernel is launched and gets dynamic shared memory. The tests run the same source on the CPU, where the header
// that they put in this one's place gives both a meaning.
#pragma once

#ifdef BK_HOST_EXECUTION
#include "host_execution.h"
#else

// A kernel with template arguments stands in parentheses. The kernel's cudaError_t comes from cudaGetLastError().
#define BK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

// `name` points to the block's dynamic shared memory, aligned for cp.async, ldmatrix and vectors.
#define BK_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(128) char bioplaus_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bioplaus_dynamic_shared)

#endif
