// The filter on a band of one plane, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Elements that may be read after the last of a buffer.
constexpr int64_t kBandSlack = 64;

// A term of a sum: coefficient * source[offset + position of the output].
template <typename T>
struct BandTap {
  int64_t offset;
  T coefficient;
};

// How bands of `count` rows of positions are filtered. Position m gives the outputs phases * m + r, r <
// phases, of its axis, each from samples around step * m. Of the samples, those whose place in a step is the
// same in both axes lie together, in rows of `stride`; so every tap is an offset, and sums run over all rows
// at once.
template <typename T>
struct BandPlan {
  int64_t height, width, out_height, out_width, phases, step;
  int64_t top, left;            // sample that the first position starts from
  int64_t stride, reach, size;  // columns, rows after the last position's own, and elements of one part
  int64_t count;
  bool separable;
  // Taps of phase r: [starts[r], starts[r + 1]). With a separable filter, `down` reads samples and has
  // taps for each place in a step after each other, and `across` reads what those sums gave; else `down` has
  // those of all phases of both axes.
  const BandTap<T>* down;
  const int64_t* down_starts;
  const BandTap<T>* across;
  const int64_t* across_starts;
};

// Elements of memory that a band takes: samples, sums down, sums across, each with what may be read past it.
template <typename T>
int64_t band_memory(const BandPlan<T>& plan) {
  const int64_t sums = plan.count * plan.stride + kBandSlack;
  return plan.step * plan.step * plan.size + kBandSlack + (plan.step + plan.phases) * sums;
}

// fir_band filters the positions [first, first + count) of rows, of a plane at `input`, to that at `output`;
// `memory` has band_memory elements, all finite.
#define AVATAR_DECLARE_TYPE(T) \
  void fir_band(const BandPlan<T>& plan, const T* input, T* output, int64_t first, int64_t count, T* memory);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
