#pragma once

#include "../common/redraw.h"
#include "level.h"

namespace bioplaus {

// The sum of word_hash over words begin … end − 1 in the order of the dims.
BK_DECLARE(uint64_t sum_words(const RedrawParams& p, int64_t begin, int64_t end))

}  // namespace bioplaus
