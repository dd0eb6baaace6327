#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace avatar {

void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__)
  constexpr size_t kHugePage = size_t{1} << 21;
  const size_t begin = reinterpret_cast<size_t>(tensor.data_ptr());
  const size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const size_t last = (begin + tensor.numel() * tensor.element_size()) / kHugePage * kHugePage;
  // Advice that is not taken does no harm.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace avatar
