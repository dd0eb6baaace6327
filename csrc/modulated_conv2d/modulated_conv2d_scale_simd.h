// Rows of images scaled, and their products with other images, in one pass; built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// scale_row: scaled = factor * images, where it is not null, perhaps over images; returns the sum of images *
// others.
// scale_backward_row: from the gradients of both, grad_images = factor * grad_scaled + grad_sum * others and
// grad_others = grad_sum * images; returns the gradient of the factor.
#define AVATAR_DECLARE_TYPE(T)                                                                       \
  T scale_row(const T* images, const T* others, T factor, T* scaled, int64_t size);                  \
  T scale_backward_row(const T* images, const T* others, const T* grad_scaled, T factor, T grad_sum, \
                       T* grad_images, T* grad_others, int64_t size);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
