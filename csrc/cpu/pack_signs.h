#pragma once

#include "../common/feedback.h"
#include "level.h"

namespace bioplaus {

// One unit of work is a tile of 64 rows × kPackColumns columns, so that every flag has one writer; unit u is column
// tile u % column_tiles of row tile u / column_tiles.
constexpr int64_t kPackColumns = 1024;

// p.weight is read and the planes and flags are written to `planes`.
BK_DECLARE(void pack_signs(const FeedbackParams& p, int32_t* planes, int64_t begin, int64_t end))

}  // namespace bioplaus
