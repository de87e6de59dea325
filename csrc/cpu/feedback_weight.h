#pragma once

#include "../common/feedback.h"
#include "level.h"

namespace bioplaus {

// One unit of work is kChunk columns of one row; unit u is chunk u % chunks of row u / chunks.
constexpr int64_t kChunk = 1024;

BK_DECLARE(void feedback_weight(const FeedbackParams& p, int64_t begin, int64_t end))

// Columns first … first + n − 1 of one row, in p.out's dtype, into adjacent memory: B block by block.
BK_DECLARE(void feedback_run(const FeedbackParams& p, int64_t row, int64_t first, int64_t n, void* out))

}  // namespace bioplaus
