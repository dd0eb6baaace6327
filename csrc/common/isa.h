// Instruction sets that the CPU kernels are built for, and the one in use.
#pragma once

#include <string>
#include <vector>

#define AVATAR_EXPORT __attribute__((visibility("default")))

namespace avatar {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

AVATAR_EXPORT Isa current_isa();
AVATAR_EXPORT const char* isa_name(Isa isa);
// Those that were built and that this processor runs, weakest first.
AVATAR_EXPORT std::vector<std::string> available_isas();
// Throws std::invalid_argument unless `name` is one of available_isas().
AVATAR_EXPORT void set_isa(const std::string& name);

}  // namespace avatar

// A header `<op>_simd.h` declares its functions once, inside this, for every instruction set.
#if defined(AVATAR_X86_ISAS)
#define AVATAR_FOR_EACH_ISA(DECLARE) DECLARE(baseline) DECLARE(avx2) DECLARE(avx512)
// Calls `function(...)` of an instruction set.
#define AVATAR_ISA_CALL_OF(isa, function, ...)                    \
  ((isa) == ::avatar::Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : (isa) == ::avatar::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                  : baseline::function(__VA_ARGS__))
#else
#define AVATAR_FOR_EACH_ISA(DECLARE) DECLARE(baseline)
#define AVATAR_ISA_CALL_OF(isa, function, ...) ((void)(isa), baseline::function(__VA_ARGS__))
#endif
// The same of the one in use. Decide once, outside parallel loops, where it matters.
#define AVATAR_ISA_CALL(function, ...) AVATAR_ISA_CALL_OF(::avatar::current_isa(), function, __VA_ARGS__)
