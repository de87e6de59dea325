#pragma once

#include "../common/feedback.h"
#include "level.h"

namespace bioplaus {

// One unit of work is kChunk columns of one row; unit u is chunk u % chunks of row u / chunks.
constexpr int64_t kChunk = 1024;

BK_DECLARE(void feedback_weight(const FeedbackParams& p, int64_t begin, int64_t end))

}  // namespace bioplaus
