#pragma once

#include "common/tensor.h"

namespace avatar {

// Asks the system to back a large fresh tensor by huge pages. With small ones, the first write to each 4 KiB
// is a page fault, which for what large tensors hold can take as long as computing it.
void advise_huge_pages(const Tensor& tensor);

}  // namespace avatar
