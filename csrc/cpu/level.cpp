#include "level.h"

#include <ATen/Version.h>

#include <string>

namespace bioplaus {

Level cpu_level() {
  static const Level level = [] {
#if defined(BK_X86_LEVELS)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return Level::AVX512;
    }
    if (capability == "AVX2") {
      return Level::AVX2;
    }
#endif
    return Level::DEFAULT;
  }();
  return level;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::AVX512:
      return "AVX512";
    case Level::AVX2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

}  // namespace bioplaus
