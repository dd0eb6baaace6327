#include "common/project_rows_simd.h"

#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {

void project_rows(int64_t rows, int64_t depth, int64_t columns, const float* a, const float* packed,
                  const float* bias, float* target) {
  project(rows, depth, columns, a, packed, bias, target);
}
void project_rows(int64_t rows, int64_t depth, int64_t columns, const double* a, const double* packed,
                  const double* bias, double* target) {
  project(rows, depth, columns, a, packed, bias, target);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
