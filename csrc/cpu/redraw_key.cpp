#include "redraw_key.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <functional>

#include "../common/form.h"

namespace bioplaus {
namespace {

// Fewer words than this are not worth a second thread.
constexpr int64_t kGrain = 32768;

uint64_t hash(const RedrawParams& p) {
  if (p.key[0] == 1) {
    uint64_t h = 0;
    for (int k = 0; k < kRedrawSamples; ++k) {
      h ^= sample_hash(p, k);
    }
    return h;
  }
  const auto sum = [&p, kernel = BK_PICK(sum_words)](int64_t begin, int64_t end, uint64_t before) {
    return before + kernel(p, begin, end);
  };
  return hash_end(p.key, at::parallel_reduce(0, p.words, kGrain, uint64_t{0}, sum, std::plus<uint64_t>()));
}

at::Tensor redraw_key_cpu(const at::Tensor& key, const at::Tensor& weight) {
  return form_key(key, weight, [](const RedrawParams& p, int64_t* out) {
    out[0] = p.key[0];
    out[1] = p.key[1];
    out[2] = p.key[2] ^ static_cast<int64_t>(hash(p));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) { m.impl("redraw_key", redraw_key_cpu); }

}  // namespace bioplaus
