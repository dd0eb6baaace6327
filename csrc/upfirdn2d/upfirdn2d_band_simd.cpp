#include "upfirdn2d/upfirdn2d_band_simd.h"

#include <algorithm>

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Sums of kVectors vectors at source, of the taps in order.
template <typename T, int64_t kVectors>
inline void fir_step(const BandTap<T>* taps, int64_t num_taps, const T* source, T* target) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector<T> sums[kVectors] = {};
  for (int64_t t = 0; t < num_taps; ++t) {
    const T* samples = source + taps[t].offset;
    for (int64_t v = 0; v < kVectors; ++v) sums[v] += taps[t].coefficient * load(samples + v * kLanes);
  }
  for (int64_t v = 0; v < kVectors; ++v) store(target + v * kLanes, sums[v]);
}

// kTaps: their number, for which the coefficients stay in registers, or 0 for any.
template <typename T, int64_t kTaps>
void fir_loop(const BandTap<T>* taps, int64_t num_taps, const T* source, T* target, int64_t count) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  BandTap<T> kept[kTaps > 0 ? kTaps : 1];
  if constexpr (kTaps > 0) {
    std::copy_n(taps, kTaps, kept);
    taps = kept;
    num_taps = kTaps;
  }
  int64_t m = 0;
  for (; m + 4 * kLanes <= count; m += 4 * kLanes) {
    fir_step<T, 4>(taps, num_taps, source + m, target + m);
  }
  for (; m < count; m += kLanes) fir_step<T, 1>(taps, num_taps, source + m, target + m);
}

template <typename T>
void fir(const BandTap<T>* taps, int64_t num_taps, const T* source, T* target, int64_t count) {
  switch (num_taps) {
    case 2:
      return fir_loop<T, 2>(taps, num_taps, source, target, count);
    case 4:
      return fir_loop<T, 4>(taps, num_taps, source, target, count);
    default:
      return fir_loop<T, 0>(taps, num_taps, source, target, count);
  }
}

// std::copy_n without a call for short rows.
template <typename T>
inline void copy(const T* __restrict__ source, T* __restrict__ target, int64_t count) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) target[i] = source[i];
    return;
  }
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(target + i, load(source + i));
  store(target + count - kLanes, load(source + count - kLanes));
}

// Samples first + step * m of a row; those for m in [begin, end) lie inside it.
struct Span {
  int64_t first, begin, end;

  Span(int64_t first, int64_t step, int64_t size, int64_t count) : first(first) {
    begin = std::clamp<int64_t>(first >= 0 ? 0 : (step - 1 - first) / step, 0, count);
    end = std::clamp<int64_t>(first >= size ? 0 : (size - first + step - 1) / step, begin, count);
  }
};

// target[m] = row[step * m + first] where that lies inside the row, else 0.
template <typename T>
inline void split(const T* __restrict__ row, const Span& span, int64_t step, T* __restrict__ target,
                  int64_t count) {
  const int64_t first = span.first, begin = span.begin, end = span.end;
  for (int64_t m = 0; m < begin; ++m) target[m] = 0;
  for (int64_t m = end; m < count; ++m) target[m] = 0;
  if (begin == end) return;
  if (step == 1) {
    copy(row + first + begin, target + begin, end - begin);
  } else if (step == 2) {
    for (int64_t m = begin; m < end; ++m) target[m] = row[2 * m + first];
  } else {
    for (int64_t m = begin; m < end; ++m) target[m] = row[step * m + first];
  }
}

// row[phases * m + r] = source[r * part + m].
template <typename T>
inline void merge(const T* __restrict__ source, int64_t part, int64_t phases, T* __restrict__ row,
                  int64_t size) {
  if (phases == 1) return copy(source, row, size);
  if (phases == 2) {
    const T* __restrict__ odd = source + part;
    for (int64_t m = 0; m < size / 2; ++m) {
      row[2 * m] = source[m];
      row[2 * m + 1] = odd[m];
    }
    if (size % 2) row[size - 1] = source[size / 2];
    return;
  }
  for (int64_t r = 0; r < phases; ++r) {
    for (int64_t m = 0, position = r; position < size; ++m, position += phases) {
      row[position] = source[r * part + m];
    }
  }
}

template <typename T>
void filter(const BandPlan<T>& plan_in, const T* input, T* output, int64_t first, int64_t count, T* memory) {
  const BandPlan<T> plan = plan_in;
  const int64_t step = plan.step, phases = plan.phases, stride = plan.stride;
  const int64_t size = count * stride, part = plan.count * stride + kBandSlack;
  T* samples = memory;
  T* sums_down = samples + step * step * plan.size + kBandSlack;
  T* sums = sums_down + step * part;

  for (int64_t column = 0; column < step; ++column) {
    const Span span(plan.left + column, step, plan.width, stride);
    for (int64_t place = 0; place < step; ++place) {
      T* target = samples + (place * step + column) * plan.size;
      int64_t row = plan.top + first * step + place;
      for (int64_t r = 0; r < count + plan.reach; ++r, row += step, target += stride) {
        if (row < 0 || row >= plan.height) {
          for (int64_t m = 0; m < stride; ++m) target[m] = 0;
        } else {
          split(input + row * plan.width, span, step, target, stride);
        }
      }
    }
  }
  const auto sum = [&](const BandTap<T>* taps, const int64_t* starts, int64_t list, const T* source,
                       T* target) {
    fir(taps + starts[list], starts[list + 1] - starts[list], source, target, size);
  };
  for (int64_t q = 0; q < phases; ++q) {
    if (plan.separable) {
      for (int64_t column = 0; column < step; ++column) {
        sum(plan.down, plan.down_starts, q, samples + column * plan.size, sums_down + column * part);
      }
    }
    for (int64_t r = 0; r < phases; ++r) {
      if (plan.separable) {
        sum(plan.across, plan.across_starts, r, sums_down, sums + r * part);
      } else {
        sum(plan.down, plan.down_starts, q * phases + r, samples, sums + r * part);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      const int64_t row = (first + m) * phases + q;
      if (row >= plan.out_height) break;
      merge(sums + m * stride, part, phases, output + row * plan.out_width, plan.out_width);
    }
  }
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                          \
  void fir_band(const BandPlan<T>& plan, const T* input, T* output, int64_t first, int64_t count, \
                T* memory) {                                                                      \
    filter(plan, input, output, first, count, memory);                                            \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
