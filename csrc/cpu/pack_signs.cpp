#include "pack_signs.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../common/form.h"

namespace bioplaus {

at::Tensor pack_signs_cpu(const at::Tensor& weight) {
  return form_packed(weight, [](const FeedbackParams& p, int32_t* planes) {
    const auto kernel = BK_PICK(pack_signs);
    const int64_t column_tiles = (p.cols + kPackColumns - 1) / kPackColumns;
    at::parallel_for(0, sign_tiles(p.rows) * column_tiles, 1,
                     [&](int64_t begin, int64_t end) { kernel(p, planes, begin, end); });
  });
}

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) { m.impl("pack_signs", pack_signs_cpu); }

}  // namespace bioplaus
