// Instruction-set levels of the CPU kernels.
//
// A source named *_kernel.cpp is compiled once per level, with the level's compiler flags and -DBK_LEVEL=<level>, and
// defines its entry points in namespace bioplaus::BK_LEVEL. It works on raw pointers and a parameter struct and
// includes no torch or C++ library header: an inline function of theirs, compiled at a high level and merged by the
// linker, would run on processors that lack the instructions. The host source beside it calls BK_PICK(name), which
// follows torch's own choice, so that ATEN_CPU_CAPABILITY forces a lower level.
//
// A new level is a row in CMakeLists.txt, a name in the enum and in the three macros below, and its test in level.cpp.
//
// A source named *_product_kernel.cpp is also compiled for the levels that add instructions for integer products. They
// follow ONEDNN_MAX_CPU_ISA too, and are declared and picked by BK_DECLARE_PRODUCT and BK_PICK_PRODUCT.
#pragma once

namespace bioplaus {

enum class Level { DEFAULT, AVX2, AVX512 };

// The best level that was built and that torch uses on this processor.
Level cpu_level();
const char* level_name(Level level);

enum class ProductLevel { DEFAULT, AVX2, AVX2_VNNI, AVX512, AVX512_VNNI, AMX };

// The same for integer products, which follow oneDNN's limit too.
ProductLevel product_level();
const char* level_name(ProductLevel level);

// Whether the processor multiplies bfloat16 (else float16) itself and oneDNN's limit lets it; said of any that is not
// x86.
bool half_instructions(bool bfloat16);

}  // namespace bioplaus

#if defined(BK_X86_LEVELS)
#define BK_LEVELS {"DEFAULT", "AVX2", "AVX512"}
#define BK_DECLARE(signature) \
  namespace DEFAULT {         \
  signature;                  \
  }                           \
  namespace AVX2 {            \
  signature;                  \
  }                           \
  namespace AVX512 {          \
  signature;                  \
  }
#define BK_PICK(name)                                                  \
  (::bioplaus::cpu_level() == ::bioplaus::Level::AVX512 ? AVX512::name \
   : ::bioplaus::cpu_level() == ::bioplaus::Level::AVX2 ? AVX2::name   \
                                                        : DEFAULT::name)
#else
#define BK_LEVELS {"DEFAULT"}
#define BK_DECLARE(signature) \
  namespace DEFAULT {         \
  signature;                  \
  }
#define BK_PICK(name) DEFAULT::name
#endif

#if defined(BK_X86_PRODUCT_LEVELS)
#define BK_DECLARE_PRODUCT(signature) \
  BK_DECLARE(signature)               \
  namespace AVX2_VNNI {               \
  signature;                          \
  }                                   \
  namespace AVX512_VNNI {             \
  signature;                          \
  }                                   \
  namespace AMX {                     \
  signature;                          \
  }
#define BK_PICK_PRODUCT(name)                                                                 \
  (::bioplaus::product_level() == ::bioplaus::ProductLevel::AMX           ? AMX::name         \
   : ::bioplaus::product_level() == ::bioplaus::ProductLevel::AVX512_VNNI ? AVX512_VNNI::name \
   : ::bioplaus::product_level() == ::bioplaus::ProductLevel::AVX512      ? AVX512::name      \
   : ::bioplaus::product_level() == ::bioplaus::ProductLevel::AVX2_VNNI   ? AVX2_VNNI::name   \
   : ::bioplaus::product_level() == ::bioplaus::ProductLevel::AVX2        ? AVX2::name        \
                                                                          : DEFAULT::name)
#else
#define BK_DECLARE_PRODUCT(signature) BK_DECLARE(signature)
#define BK_PICK_PRODUCT(name) BK_PICK(name)
#endif
