#include "level.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
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

#if defined(BK_X86_PRODUCT_LEVELS)
namespace {

// oneDNN's setting, in lower case.
std::string onednn_isa() {
  const char* value = std::getenv("ONEDNN_MAX_CPU_ISA");
  value = value ? value : std::getenv("DNNL_MAX_CPU_ISA");
  std::string isa = value ? value : "";
  std::transform(isa.begin(), isa.end(), isa.begin(), [](unsigned char c) { return std::tolower(c); });
  return isa;
}

// The highest level that it allows.
ProductLevel onednn_limit() {
  const std::string isa = onednn_isa();
  const auto starts_with = [&](const char* prefix) { return isa.rfind(prefix, 0) == 0; };
  if (isa == "sse41" || isa == "avx") {
    return ProductLevel::DEFAULT;
  }
  if (starts_with("avx2")) {
    return isa == "avx2" ? ProductLevel::AVX2 : ProductLevel::AVX2_VNNI;
  }
  if (isa == "avx512_core") {
    return ProductLevel::AVX512;
  }
  if ((starts_with("avx512") || starts_with("avx10")) && isa.find("amx") == std::string::npos) {
    return ProductLevel::AVX512_VNNI;
  }
  return ProductLevel::AMX;
}

}  // namespace
#endif

ProductLevel product_level() {
  static const ProductLevel level = [] {
#if defined(BK_X86_PRODUCT_LEVELS)
    const ProductLevel limit = onednn_limit();
    if (cpu_level() == Level::AVX512 && limit >= ProductLevel::AVX512) {
      const bool vnni = limit >= ProductLevel::AVX512_VNNI && __builtin_cpu_supports("avx512vnni");
#if defined(BK_EMULATED_AMX)
      const bool amx = limit >= ProductLevel::AMX;
#else
      const bool amx = limit >= ProductLevel::AMX && __builtin_cpu_supports("amx-int8") && at::cpu::init_amx();
#endif
      return vnni ? amx ? ProductLevel::AMX : ProductLevel::AVX512_VNNI : ProductLevel::AVX512;
    }
    if (cpu_level() >= Level::AVX2 && limit >= ProductLevel::AVX2) {
      const bool vnni = limit >= ProductLevel::AVX2_VNNI && __builtin_cpu_supports("avxvnni");
      return vnni ? ProductLevel::AVX2_VNNI : ProductLevel::AVX2;
    }
    return ProductLevel::DEFAULT;
#else
    switch (cpu_level()) {
      case Level::AVX512:
        return ProductLevel::AVX512;
      case Level::AVX2:
        return ProductLevel::AVX2;
      default:
        return ProductLevel::DEFAULT;
    }
#endif
  }();
  return level;
}

bool half_instructions(bool bfloat16) {
#if defined(BK_X86_PRODUCT_LEVELS)
  // Every processor with AMX has AVX512-FP16.
  static const bool bf16 = product_level() >= ProductLevel::AVX512_VNNI && onednn_isa() != "avx512_core_vnni" &&
                           __builtin_cpu_supports("avx512bf16");
  return bfloat16 ? bf16 : product_level() == ProductLevel::AMX;
#elif defined(BK_X86_LEVELS)
  return false;
#else
  return true;
#endif
}

const char* level_name(ProductLevel level) {
  switch (level) {
    case ProductLevel::AMX:
      return "AMX";
    case ProductLevel::AVX512_VNNI:
      return "AVX512_VNNI";
    case ProductLevel::AVX512:
      return "AVX512";
    case ProductLevel::AVX2_VNNI:
      return "AVX2_VNNI";
    case ProductLevel::AVX2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
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
