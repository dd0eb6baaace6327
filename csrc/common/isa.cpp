#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace avatar {
namespace {

Isa strongest_isa() {
#if defined(AVATAR_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(AVATAR_EMULATE_AVX512)
  const bool avx512 = true;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{strongest_isa()};
  return isa;
}

}  // namespace

Isa current_isa() {
  return isa_in_use().load(std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int isa = 0; isa <= static_cast<int>(strongest_isa()); ++isa) {
    names.emplace_back(isa_name(static_cast<Isa>(isa)));
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (int isa = 0; isa <= static_cast<int>(strongest_isa()); ++isa) {
    if (name == isa_name(static_cast<Isa>(isa))) {
      isa_in_use().store(static_cast<Isa>(isa), std::memory_order_relaxed);
      return;
    }
    known += (isa ? ", " : "") + std::string(isa_name(static_cast<Isa>(isa)));
  }
  throw std::invalid_argument("instruction set: got '" + name + "', this build and processor have " + known);
}

}  // namespace avatar
