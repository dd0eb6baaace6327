#include "modulated_conv2d/modulated_conv2d_scale_simd.h"

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Sums of several vectors of products, so that one need not wait for the last.
template <typename T>
class ProductSum {
 public:
  // Adds a * b for lanes 0 and 1 vectors from them.
  void add(Vector<T> a0, Vector<T> b0, Vector<T> a1, Vector<T> b1) {
    sum0_ += a0 * b0;
    sum1_ += a1 * b1;
  }
  void add(T a, T b) { rest_ += a * b; }
  T total() const {
    const Vector<T> sum = sum0_ + sum1_;
    T total = rest_;
    for (int64_t lane = 0; lane < Lanes<T>::kCount; ++lane) total += sum[lane];
    return total;
  }

 private:
  Vector<T> sum0_ = {}, sum1_ = {};
  T rest_ = 0;
};

template <bool kStore, typename T>
T scale(const T* images, const T* others, T factor, T* scaled, int64_t size) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  ProductSum<T> sum;
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const Vector<T> a0 = load(images + i), a1 = load(images + i + kLanes);
    sum.add(a0, load(others + i), a1, load(others + i + kLanes));
    if (!kStore) continue;
    store(scaled + i, a0 * factor);
    store(scaled + i + kLanes, a1 * factor);
  }
  for (; i < size; ++i) {
    sum.add(images[i], others[i]);
    if (kStore) scaled[i] = images[i] * factor;
  }
  return sum.total();
}

template <typename T>
T scale_backward(const T* images, const T* others, const T* grad_scaled, T factor, T grad_sum, T* grad_images,
                 T* grad_others, int64_t size) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  ProductSum<T> sum;
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const Vector<T> a0 = load(images + i), a1 = load(images + i + kLanes);
    const Vector<T> g0 = load(grad_scaled + i), g1 = load(grad_scaled + i + kLanes);
    sum.add(a0, g0, a1, g1);
    store(grad_images + i, g0 * factor + load(others + i) * grad_sum);
    store(grad_images + i + kLanes, g1 * factor + load(others + i + kLanes) * grad_sum);
    store(grad_others + i, a0 * grad_sum);
    store(grad_others + i + kLanes, a1 * grad_sum);
  }
  for (; i < size; ++i) {
    sum.add(images[i], grad_scaled[i]);
    grad_images[i] = grad_scaled[i] * factor + others[i] * grad_sum;
    grad_others[i] = images[i] * grad_sum;
  }
  return sum.total();
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                                  \
  T scale_row(const T* images, const T* others, T factor, T* scaled, int64_t size) {                      \
    return scaled ? scale<true>(images, others, factor, scaled, size)                                     \
                  : scale<false>(images, others, factor, scaled, size);                                   \
  }                                                                                                       \
  T scale_backward_row(const T* images, const T* others, const T* grad_scaled, T factor, T grad_sum,      \
                       T* grad_images, T* grad_others, int64_t size) {                                    \
    return scale_backward(images, others, grad_scaled, factor, grad_sum, grad_images, grad_others, size); \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
