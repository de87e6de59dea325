// What surrounds the tile products of the locally-connected ops: layout changes, and the products of few samples.
//
// Roofline: lc_dot and lc_axpy read each weight once and lc_outer writes it once, two operations per weight and sample:
// memory bandwidth. lc_copy reads and writes each activation once; between layouts of different innermost dims its
// pieces lie pages apart, which bounds it.
#include "convert.h"
#include "lc.h"
#include "strided.h"
#include "transpose.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

// --- copies ---

BK_INLINE void convert_to(float x, float& y) { y = x; }
BK_INLINE void convert_to(double x, double& y) { y = x; }
BK_INLINE void convert_to(BF16 x, float& y) { y = to_float(x); }
BK_INLINE void convert_to(FP16 x, float& y) { y = to_float(x); }
BK_INLINE void convert_to(float x, BF16& y) { round_to(x, y); }
BK_INLINE void convert_to(float x, FP16& y) { round_to(x, y); }
BK_INLINE void convert_to(BF16 x, BF16& y) { y = x; }
BK_INLINE void convert_to(FP16 x, FP16& y) { y = x; }

template <typename From, typename To>
void copy_run(const From* from, To* to, int64_t n) {
  for (int64_t t = 0; t < n; ++t) {
    convert_to(from[t], to[t]);
  }
}

// to[i·ld_to + j] = from[j·ld_from + i].
template <typename From, typename To>
void transpose_edge(const From* from, int64_t ld_from, To* to, int64_t ld_to, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      convert_to(from[j * ld_from + i], to[i * ld_to + j]);
    }
  }
}

BK_INLINE const float* as_floats(const float* from, float*) { return from; }
template <typename From>
BK_INLINE const float* as_floats(const From* from, float* room) {
  for (int l = 0; l < 8; ++l) {
    convert_to(from[l], room[l]);
  }
  return room;
}

template <typename To>
BK_INLINE void store8(const F8& v, To* to) {
  float x[8];
  __builtin_memcpy(x, &v, sizeof v);
  for (int l = 0; l < 8; ++l) {
    convert_to(x[l], to[l]);
  }
}

template <typename From, typename To>
BK_INLINE void transpose_block(const From* from, int64_t ld_from, To* to, int64_t ld_to) {
  float room[8][8];
  const float* rows[8];
  F8 columns[8];
  for (int j = 0; j < 8; ++j) {
    rows[j] = as_floats(from + j * ld_from, room[j]);
  }
  transpose8(rows, columns);
  for (int i = 0; i < 8; ++i) {
    store8(columns[i], to + i * ld_to);
  }
}

BK_INLINE void transpose_block(const double* from, int64_t ld_from, double* to, int64_t ld_to) {
  transpose_edge(from, ld_from, to, ld_to, 8, 8);
}

// Blocks of 8 rows of `to`, along which lines are filled one after the other. `ahead` is the distance to what is read
// next: pieces of activations lie too far apart for the processor to foresee them.
template <typename From, typename To>
void transpose(const From* from, int64_t ld_from, To* to, int64_t ld_to, int64_t rows, int64_t cols, int64_t ahead) {
  const int64_t whole = cols / 8 * 8;
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    for (int64_t j = 0; j < whole; j += 8) {
      for (int64_t l = 0; l < 8; ++l) {
        __builtin_prefetch(from + ahead + (j + l) * ld_from + i);
      }
      transpose_block(from + j * ld_from + i, ld_from, to + i * ld_to + j, ld_to);
    }
    transpose_edge(from + whole * ld_from + i, ld_from, to + i * ld_to + whole, ld_to, 8, cols - whole);
  }
  transpose_edge(from + i, ld_from, to + i * ld_to, ld_to, rows - i, cols);
}

// The dim of stride 1; dims of size 1 have no stride to speak of.
int unit_dim(const int64_t* size, const int64_t* stride) {
  for (int d = 0; d < 3; ++d) {
    if (size[d] > 1 && stride[d] == 1) {
      return d;
    }
  }
  return -1;
}

template <typename From, typename To>
void copy_box(const LcCopy& c) {
  const From* from = static_cast<const From*>(c.from);
  To* to = static_cast<To*>(c.to);
  const int u = unit_dim(c.size, c.from_stride);
  const int v = unit_dim(c.size, c.to_stride);
  if (u < 0 || v < 0 || u == v) {
    const int inner = v >= 0 ? v : u >= 0 ? u : 2;
    const int a = inner == 0 ? 1 : 0;
    const int b = 3 - inner - a;
    const int64_t fs = c.from_stride[inner], ts = c.to_stride[inner], n = c.size[inner];
    for (int64_t i = 0; i < c.size[a]; ++i) {
      for (int64_t j = 0; j < c.size[b]; ++j) {
        const From* f = from + i * c.from_stride[a] + j * c.from_stride[b];
        To* t = to + i * c.to_stride[a] + j * c.to_stride[b];
        if (u == inner && v == inner) {
          copy_run(f, t, n);
        } else {
          for (int64_t l = 0; l < n; ++l) {
            convert_to(f[l * fs], t[l * ts]);
          }
        }
      }
    }
    return;
  }
  const int outer = 3 - u - v;
  for (int64_t i = 0; i < c.size[outer]; ++i) {
    transpose(from + i * c.from_stride[outer], c.from_stride[v], to + i * c.to_stride[outer], c.to_stride[u], c.size[u],
              c.size[v], c.from_stride[outer]);
  }
}

// --- few samples ---

// Rows of half types are widened piece by piece in the L1 cache.
constexpr int64_t kPiece = 1024;

const float* widen(const float* w, int64_t, float*) { return w; }
const double* widen(const double* w, int64_t, double*) { return w; }
template <typename T>
const float* widen(const T* w, int64_t n, float* scratch) {
  copy_run(w, scratch, n);
  return scratch;
}

// Of a register: sums in halves would be twice as many as there are registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename acc_t>
constexpr int64_t kLanes = kVectorBytes / sizeof(acc_t);

template <typename acc_t>
struct Lanes {
  typedef acc_t type __attribute__((vector_size(kVectorBytes)));
};

template <typename acc_t>
BK_INLINE typename Lanes<acc_t>::type load(const acc_t* x) {
  typename Lanes<acc_t>::type v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

template <typename acc_t>
BK_INLINE void store(acc_t* x, const typename Lanes<acc_t>::type& v) {
  __builtin_memcpy(x, &v, sizeof v);
}

// Some rows at a time against the same x.
template <int kRows, typename acc_t>
BK_INLINE void dot_rows(const acc_t* const* w, const acc_t* x, int64_t n, acc_t* y, int64_t stride_y) {
  constexpr int64_t lanes = kLanes<acc_t>;
  typename Lanes<acc_t>::type sum[kRows][2] = {};
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] += load(w[r] + j) * load(x + j);
      sum[r][1] += load(w[r] + j + lanes) * load(x + j + lanes);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    acc_t part[lanes];
    store(part, sum[r][0] + sum[r][1]);
    for (int64_t step = lanes / 2; step > 0; step /= 2) {
      for (int64_t l = 0; l < step; ++l) {
        part[l] += part[l + step];
      }
    }
    acc_t total = part[0];
    for (int64_t l = j; l < n; ++l) {
      total += w[r][l] * x[l];
    }
    y[r * stride_y] += total;
  }
}

template <typename acc_t, typename T>
void dot(const T* w, int64_t ldw, int64_t rows, int64_t cols, const acc_t* x, int64_t samples, acc_t* y) {
  constexpr int kRows = 4;
  alignas(64) acc_t scratch[kRows][sizeof(T) == sizeof(acc_t) ? 1 : kPiece];
  const int64_t piece = sizeof(T) == sizeof(acc_t) ? cols : kPiece;
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = rows - i < kRows ? rows - i : kRows;
    acc_t* yi = y + i * samples;
    for (int64_t r = 0; r < count * samples; ++r) {
      yi[r] = 0;
    }
    for (int64_t j = 0; j < cols; j += piece) {
      const int64_t n = cols - j < piece ? cols - j : piece;
      const acc_t* wide[kRows];
      for (int64_t r = 0; r < count; ++r) {
        wide[r] = widen(w + (i + r) * ldw + j, n, scratch[r]);
      }
      for (int64_t s = 0; s < samples; ++s) {
        if (count == kRows) {
          dot_rows<kRows>(wide, x + s * cols + j, n, yi + s, samples);
        } else {
          for (int64_t r = 0; r < count; ++r) {
            dot_rows<1>(wide + r, x + s * cols + j, n, yi + r * samples + s, samples);
          }
        }
      }
    }
  }
}

// sign_of (feedback.h) of a register.
template <typename V>
BK_INLINE V signs_of(const V& x) {
  return __builtin_convertvector((x < V{}) - (x > V{}), V);
}

// kRows terms are added among themselves first: a chain of additions loses by its length.
template <bool kSigns, int kRows, typename acc_t>
BK_INLINE void axpy_rows(const acc_t* const* w, const acc_t* g, int64_t n, acc_t* y) {
  constexpr int64_t lanes = kLanes<acc_t>;
  const auto term = [&](int r, int64_t j) {
    const auto x = load(w[r] + j);
    return (kSigns ? signs_of(x) : x) * g[r];
  };
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    auto sum = term(0, j);
    for (int r = 1; r < kRows; ++r) {
      sum += term(r, j);
    }
    store(y + j, load(y + j) + sum);
  }
  for (; j < n; ++j) {
    acc_t sum = 0;
    for (int r = 0; r < kRows; ++r) {
      sum += (kSigns ? sign_of<acc_t>(w[r][j]) : w[r][j]) * g[r];
    }
    y[j] += sum;
  }
}

template <bool kSigns, typename acc_t, typename T>
void axpy(const T* w, int64_t ldw, int64_t rows, int64_t cols, const acc_t* g, acc_t* y) {
  constexpr int kRows = 8;
  alignas(64) acc_t scratch[kRows][sizeof(T) == sizeof(acc_t) ? 1 : kPiece];
  const int64_t piece = sizeof(T) == sizeof(acc_t) ? cols : kPiece;
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = rows - i < kRows ? rows - i : kRows;
    for (int64_t j = 0; j < cols; j += piece) {
      const int64_t n = cols - j < piece ? cols - j : piece;
      const acc_t* wide[kRows];
      for (int64_t r = 0; r < count; ++r) {
        wide[r] = widen(w + (i + r) * ldw + j, n, scratch[r]);
      }
      if (count == kRows) {
        axpy_rows<kSigns, kRows>(wide, g + i, n, y + j);
      } else {
        for (int64_t r = 0; r < count; ++r) {
          axpy_rows<kSigns, 1>(wide + r, g + i + r, n, y + j);
        }
      }
    }
  }
}

template <typename acc_t, typename T>
void outer(T* w, int64_t ldw, int64_t rows, int64_t cols, const acc_t* g, const acc_t* x) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      convert_to(g[i] * x[j], w[i * ldw + j]);
    }
  }
}

template <typename acc_t>
void add(acc_t* to, int64_t ld_to, const acc_t* from, int64_t ld_from, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      to[i * ld_to + j] += from[i * ld_from + j];
    }
  }
}

template <typename acc_t>
void add_bias(acc_t* y, const acc_t* b, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      y[i * cols + j] += b[i];
    }
  }
}

// Calls f with a pointer of the dtype's type and one of its accumulation type.
template <typename F>
void with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32:
      return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case DType::Float64:
      return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case DType::BFloat16:
      return f(static_cast<BF16*>(nullptr), static_cast<float*>(nullptr));
    case DType::Float16:
      return f(static_cast<FP16*>(nullptr), static_cast<float*>(nullptr));
  }
}

}  // namespace

void lc_copy(const LcCopy& c) {
  const bool widens = size_of(c.to_dtype) > size_of(c.from_dtype);
  with_types(widens ? c.from_dtype : c.to_dtype, [&]<typename T, typename acc_t>(T*, acc_t*) {
    if (c.to_dtype == c.from_dtype) {
      copy_box<T, T>(c);
    } else if (widens) {
      copy_box<T, acc_t>(c);
    } else {
      copy_box<acc_t, T>(c);
    }
  });
}

void lc_dot(DType dtype, const void* w, int64_t ldw, int64_t rows, int64_t cols, const void* x, int64_t samples,
            void* y) {
  with_types(dtype, [&]<typename T, typename acc_t>(T*, acc_t*) {
    dot(static_cast<const T*>(w), ldw, rows, cols, static_cast<const acc_t*>(x), samples, static_cast<acc_t*>(y));
  });
}

void lc_axpy(DType dtype, bool signs, const void* w, int64_t ldw, int64_t rows, int64_t cols, const void* g, void* y) {
  with_types(dtype, [&]<typename T, typename acc_t>(T*, acc_t*) {
    (signs ? axpy<true, acc_t, T> : axpy<false, acc_t, T>)(static_cast<const T*>(w), ldw, rows, cols,
                                                           static_cast<const acc_t*>(g), static_cast<acc_t*>(y));
  });
}

void lc_outer(DType dtype, void* w, int64_t ldw, int64_t rows, int64_t cols, const void* g, const void* x) {
  with_types(dtype, [&]<typename T, typename acc_t>(T*, acc_t*) {
    outer(static_cast<T*>(w), ldw, rows, cols, static_cast<const acc_t*>(g), static_cast<const acc_t*>(x));
  });
}

void lc_add(bool wide, void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t rows, int64_t cols) {
  if (wide) {
    add(static_cast<double*>(to), ld_to, static_cast<const double*>(from), ld_from, rows, cols);
  } else {
    add(static_cast<float*>(to), ld_to, static_cast<const float*>(from), ld_from, rows, cols);
  }
}

void lc_add_bias(bool wide, void* y, const void* b, int64_t rows, int64_t cols) {
  if (wide) {
    add_bias(static_cast<double*>(y), static_cast<const double*>(b), rows, cols);
  } else {
    add_bias(static_cast<float*>(y), static_cast<const float*>(b), rows, cols);
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
