#include "edge_conv/edge_conv_simd.h"

#include <algorithm>

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Vectors of channels worked on at once: the running minima and slots stay in registers.
constexpr int kPanelVectors = kVectorBytes == 64 ? 4 : 2;
// The same where there is only a minimum to hold.
constexpr int kWidePanelVectors = 8;

// q is fetched for so many rows ahead: it may come from the third-level cache, or from memory.
constexpr int64_t kAhead = 2;

template <typename Slot>
constexpr Slot kNone = std::is_same_v<Slot, uint8_t> ? Slot(kNoByteSlot) : Slot(kNoSlot);

// Slots as lanes of T compare, and back.
template <typename T, typename Slot>
struct SlotLanes {
  typedef Slot Narrow __attribute__((vector_size(Lanes<T>::kCount * sizeof(Slot))));
  static Index<T> load(const Slot* source) {
    Narrow narrow;
    __builtin_memcpy(&narrow, source, sizeof narrow);
    return __builtin_convertvector(narrow, Index<T>);
  }
  static void store(Slot* target, Index<T> slots) {
    const Narrow narrow = __builtin_convertvector(slots, Narrow);
    __builtin_memcpy(target, &narrow, sizeof narrow);
  }
};

template <typename T>
Vector<T> leaky_relu(Vector<T> value, T negative_slope) {
  return value > 0 ? value : value * negative_slope;
}

// The slots of a row that hold a neighbour: the first one and how many; bad is the first out of range, or -1.
struct RowSlots {
  int64_t first, count, bad;
};

// Whether all slots hold one.
inline bool is_full_row(const int64_t* neighbors, int64_t k, int64_t num_points) {
  // The sign of either is set where a neighbour is below 0 or too large.
  uint64_t signs = 0;
  for (int64_t slot = 0; slot < k; ++slot) {
    const uint64_t neighbor = static_cast<uint64_t>(neighbors[slot]);
    signs |= neighbor | (static_cast<uint64_t>(num_points) - 1 - neighbor);
  }
  return signs >> 63 == 0;
}

RowSlots row_slots(const int64_t* neighbors, int64_t k, int64_t num_points) {
  if (k > 0 && is_full_row(neighbors, k, num_points)) return {0, k, -1};
  RowSlots found{-1, 0, -1};
  for (int64_t slot = k - 1; slot >= 0; --slot) {
    if (neighbors[slot] < -1 || neighbors[slot] >= num_points) found.bad = slot;
    if (neighbors[slot] >= 0) {
      found.first = slot;
      ++found.count;
    }
  }
  return found;
}

// Asks for q of a row's neighbours.
template <typename T>
void fetch_neighbors(const EdgeCloud<T>& cloud, int64_t row) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t* neighbors = cloud.neighbors + row * cloud.k;
  for (int64_t slot = 0; slot < cloud.k; ++slot) {
    if (neighbors[slot] < 0 || neighbors[slot] >= cloud.num_points) continue;
    const T* q = cloud.q + neighbors[slot] * cloud.stride;
    for (int64_t c = 0; c < cloud.stride; c += kLine) __builtin_prefetch(q + c);
  }
  // Without this GCC takes a function that only fetches for one that does nothing, and drops its calls.
  asm volatile("");
}

// Smallest q over the neighbours of a row in which no slot is empty; there is no NaN.
template <int kVectors, typename T>
void smallest_of_all(const T* q, int64_t stride, const int64_t* neighbors, int64_t k,
                     Vector<T> (&best_out)[kVectors]) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector<T> best[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) best[v] = load(q + neighbors[0] * stride + v * kLanes);
#pragma GCC unroll 4
  for (int64_t slot = 1; slot < k; ++slot) {
    const T* other = q + neighbors[slot] * stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) best[v] = smaller(load(other + v * kLanes), best[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) best_out[v] = best[v];
}

// Smallest q over the row's neighbours, the first on ties; NaN is smaller than all. kOrdered: there is no
// NaN.
template <int kVectors, bool kSlots, bool kOrdered, typename T>
void smallest(const T* q, int64_t stride, const int64_t* neighbors, int64_t first, int64_t k,
              Vector<T> (&best_out)[kVectors], Index<T> (&slots_out)[kVectors]) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  // What is handed out could alias q, and would be stored at every step. Unrolled early, vectors are
  // registers.
  Vector<T> best[kVectors];
  Index<T> slots[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    best[v] = load(q + neighbors[first] * stride + v * kLanes);
    slots[v] = Index<T>{} + typename Lanes<T>::Integer(first);
  }
  for (int64_t slot = first + 1; slot < k; ++slot) {
    if (neighbors[slot] < 0) continue;
    const T* other = q + neighbors[slot] * stride;
    const Index<T> here = Index<T>{} + typename Lanes<T>::Integer(slot);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> candidate = load(other + v * kLanes);
      const Vector<T> seen = best[v];
      if constexpr (kOrdered) {
        best[v] = smaller(candidate, seen);
        if constexpr (kSlots) slots[v] = candidate < seen ? here : slots[v];
      } else {
        const Vector<T> lower = candidate >= seen ? seen : candidate;
        best[v] = seen == seen ? lower : seen;
        if constexpr (kSlots) {
          const Index<T> chosen = candidate >= seen ? slots[v] : here;
          slots[v] = seen == seen ? chosen : slots[v];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) best_out[v] = best[v], slots_out[v] = slots[v];
}

// Mean of q over the row's neighbours and the sum of squared deviations from it.
template <int kVectors, typename T>
void row_statistics(const T* q, int64_t stride, const int64_t* neighbors, int64_t k, T inverse_count,
                    Vector<T> (&mean_out)[kVectors], Vector<T> (&squares_out)[kVectors]) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector<T> mean[kVectors] = {}, squares[kVectors] = {};
  for (int64_t slot = 0; slot < k; ++slot) {
    if (neighbors[slot] < 0) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) mean[v] += load(q + neighbors[slot] * stride + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) mean[v] *= inverse_count;
  for (int64_t slot = 0; slot < k; ++slot) {
    if (neighbors[slot] < 0) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> deviation = load(q + neighbors[slot] * stride + v * kLanes) - mean[v];
      squares[v] += deviation * deviation;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) mean_out[v] = mean[v], squares_out[v] = squares[v];
}

template <int kVectors, bool kOrdered, typename Slot, typename T>
void gather_panel(const EdgeGatherArgs<T>& args, int64_t row, int64_t column, const RowSlots& present,
                  const T* u, EdgeStatistics<T>* statistics) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const EdgeCloud<T>& cloud = args.cloud;
  const int64_t* neighbors = cloud.neighbors + row * cloud.k;
  const T* q = cloud.q + column;
  Vector<T> best[kVectors];
  Index<T> slots[kVectors];
  if (args.slots != nullptr) {
    smallest<kVectors, true, kOrdered>(q, cloud.stride, neighbors, present.first, cloud.k, best, slots);
    Slot* target = static_cast<Slot*>(args.slots) + row * cloud.stride + column;
    for (int v = 0; v < kVectors; ++v) SlotLanes<T, Slot>::store(target + v * kLanes, slots[v]);
  } else if (kOrdered && present.count == cloud.k) {
    smallest_of_all<kVectors>(q, cloud.stride, neighbors, cloud.k, best);
  } else {
    smallest<kVectors, false, kOrdered>(q, cloud.stride, neighbors, present.first, cloud.k, best, slots);
  }
  Vector<T> center[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * kLanes;
    const Vector<T> own = load(cloud.q + row * cloud.stride + c);
    center[v] = load(u + c) + own;
    // Neighbours' products differ little from the own one, so their difference comes first.
    Vector<T> hidden = load(u + c) + (own - best[v]);
    if (args.activate) hidden = leaky_relu<T>(hidden, args.negative_slope);
    store_some(args.output + row * cloud.channels + c, hidden, cloud.channels - c);
  }
  if (statistics == nullptr) return;

  // Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
  Vector<T> mean[kVectors], squares[kVectors];
  const T count = T(present.count), before = T(statistics->count);
  row_statistics<kVectors>(q, cloud.stride, neighbors, cloud.k, 1 / count, mean, squares);
  const T share = count / (before + count);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * kLanes;
    const Vector<T> seen = load(statistics->mean + c);
    const Vector<T> step = (center[v] - mean[v]) - seen;
    store(statistics->mean + c, seen + step * share);
    store(statistics->squares + c,
          load(statistics->squares + c) + squares[v] + step * step * (before * share));
  }
}

template <bool kOrdered, typename Slot, typename T>
int64_t gather(const EdgeGatherArgs<T>& args, int64_t begin, int64_t end, const T* u,
               EdgeStatistics<T>* statistics) {
  constexpr int64_t kPanel = kPanelVectors * Lanes<T>::kCount,
                    kWidePanel = kWidePanelVectors * Lanes<T>::kCount;
  const EdgeCloud<T>& cloud = args.cloud;
  const bool only_minimum = kOrdered && args.slots == nullptr && statistics == nullptr;
  for (int64_t row = begin; row < end; ++row, u += cloud.stride) {
    const int64_t* neighbors = cloud.neighbors + row * cloud.k;
    Slot* slots = args.slots == nullptr ? nullptr : static_cast<Slot*>(args.slots) + row * cloud.stride;
    T* output = args.output + row * cloud.channels;
    if (row + kAhead < end) fetch_neighbors(cloud, row + kAhead);
    const RowSlots present = row_slots(neighbors, cloud.k, cloud.num_points);
    if (present.bad >= 0) return row * cloud.k + present.bad;
    if (present.count == 0) {
      std::fill_n(output, cloud.channels, T(0));
      if (slots != nullptr) std::fill_n(slots, cloud.stride, kNone<Slot>);
      continue;
    }
    int64_t column = 0;
    if (only_minimum) {
      for (; column + kWidePanel <= cloud.stride; column += kWidePanel) {
        gather_panel<kWidePanelVectors, kOrdered, Slot>(args, row, column, present, u, statistics);
      }
    }
    for (; column + kPanel <= cloud.stride; column += kPanel) {
      gather_panel<kPanelVectors, kOrdered, Slot>(args, row, column, present, u, statistics);
    }
    for (; column < cloud.stride; column += Lanes<T>::kCount) {
      gather_panel<1, kOrdered, Slot>(args, row, column, present, u, statistics);
    }
    for (int64_t n = 0; n < args.num_first_channels; ++n) {
      const int64_t c = args.first_channels[n];
      const T* q = cloud.q + c;
      output[c] = u[c] + (q[row * cloud.stride] - q[neighbors[present.first] * cloud.stride]);
      if (slots != nullptr) slots[c] = Slot(present.first);
    }
    if (statistics != nullptr) statistics->count += present.count;
  }
  return -1;
}

template <int kVectors, typename Slot, typename T>
void norm_backward_panel(const EdgeNormBackwardArgs<T>& args, int64_t row, int64_t column, const T* u,
                         T* sum_grad, T* sum_grad_normalized) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const EdgeCloud<T>& cloud = args.cloud;
  const int64_t* neighbors = cloud.neighbors + row * cloud.k;
  const Slot* row_slots = static_cast<const Slot*>(args.slots) + row * cloud.stride + column;
  Vector<T> center[kVectors], deviation[kVectors] = {}, largest[kVectors] = {};
  Index<T> slots[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * kLanes;
    center[v] = load(u + c) + load(cloud.q + row * cloud.stride + c) - load(args.mean + c);
    slots[v] = SlotLanes<T, Slot>::load(row_slots + v * kLanes);
  }
  for (int64_t slot = 0; slot < cloud.k; ++slot) {
    if (neighbors[slot] < 0) continue;
    const T* q = cloud.q + neighbors[slot] * cloud.stride + column;
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> hidden = center[v] - load(q + v * kLanes);
      deviation[v] += hidden;
      largest[v] = slots[v] == typename Lanes<T>::Integer(slot) ? hidden : largest[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = column + v * kLanes, count = cloud.channels - c;
    const Vector<T> grad = load_some(args.grad + row * cloud.channels + c, count);
    const Vector<T> output = load_some(args.output + row * cloud.channels + c, count);
    const Vector<T> masked = slots[v] == typename Lanes<T>::Integer(kNone<Slot>) ? Vector<T>{} : grad;
    const Vector<T> linear = output > 0 ? masked : masked * args.negative_slope;
    store(args.grad_linear + row * cloud.stride + c, linear);
    store(args.centers + row * cloud.stride + c, center[v]);
    store(args.deviations + row * cloud.stride + c, deviation[v]);
    store(sum_grad + c, load(sum_grad + c) + linear);
    store(sum_grad_normalized + c,
          load(sum_grad_normalized + c) + linear * (largest[v] * load(args.inverse + c)));
  }
}

template <typename Slot, typename T>
void norm_backward(const EdgeNormBackwardArgs<T>& args, int64_t begin, int64_t end, const T* u, T* sum_grad,
                   T* sum_grad_normalized) {
  constexpr int64_t kPanel = kPanelVectors * Lanes<T>::kCount;
  for (int64_t row = begin; row < end; ++row, u += args.cloud.stride) {
    int64_t column = 0;
    for (; column + kPanel <= args.cloud.stride; column += kPanel) {
      norm_backward_panel<kPanelVectors, Slot>(args, row, column, u, sum_grad, sum_grad_normalized);
    }
    for (; column < args.cloud.stride; column += Lanes<T>::kCount) {
      norm_backward_panel<1, Slot>(args, row, column, u, sum_grad, sum_grad_normalized);
    }
  }
}

// Edges of one point, a few at a time: where their rows begin and which slot of them they are.
struct IncomingEdges {
  static constexpr int64_t kMost = 64;
  int64_t count, rows[kMost], slots[kMost];
};

// Adds the share of these edges.
template <int kVectors, typename Slot, typename T>
void reverse_panel(const EdgeReverseArgs<T>& args, const IncomingEdges& incoming, int64_t point,
                   int64_t column, T* grad_neighbor, T* deviations) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector<T> grad[kVectors], deviation[kVectors] = {}, own[kVectors] = {};
  const bool centered = args.centers != nullptr;
  for (int v = 0; v < kVectors; ++v) {
    grad[v] = load(grad_neighbor + column + v * kLanes);
    if (!centered) continue;
    deviation[v] = load(deviations + column + v * kLanes);
    own[v] = load(args.q + point * args.stride + column + v * kLanes);
  }
  for (int64_t i = 0; i < incoming.count; ++i) {
    const int64_t at = incoming.rows[i] + column;
    const Slot* slots = static_cast<const Slot*>(args.slots) + at;
    const Index<T> here = Index<T>{} + typename Lanes<T>::Integer(incoming.slots[i]);
    for (int v = 0; v < kVectors; ++v) {
      const Index<T> chosen = SlotLanes<T, Slot>::load(slots + v * kLanes) == here;
      grad[v] += (Vector<T>)((Index<T>)load(args.grad_linear + at + v * kLanes) & chosen);
    }
    if (!centered) continue;
    for (int v = 0; v < kVectors; ++v) deviation[v] += load(args.centers + at + v * kLanes) - own[v];
  }
  for (int v = 0; v < kVectors; ++v) {
    store(grad_neighbor + column + v * kLanes, grad[v]);
    if (centered) store(deviations + column + v * kLanes, deviation[v]);
  }
}

template <typename Slot, typename T>
void reverse(const EdgeReverseArgs<T>& args, int64_t begin, int64_t end, T* grad_neighbor, T* deviations) {
  constexpr int64_t kPanel = kPanelVectors * Lanes<T>::kCount;
  const double inverse_k = 1.0 / static_cast<double>(args.k);
  for (int64_t point = begin; point < end; ++point) {
    std::fill_n(grad_neighbor, args.stride, T(0));
    if (deviations != nullptr) std::fill_n(deviations, args.stride, T(0));
    for (int64_t e = args.offsets[point]; e < args.offsets[point + 1];) {
      IncomingEdges incoming;
      incoming.count = 0;
      const int64_t last = std::min(e + IncomingEdges::kMost, args.offsets[point + 1]);
      for (; e < last; ++e) {
        // The quotient is right but for rounding: a division takes much longer.
        int64_t row = static_cast<int64_t>(static_cast<double>(args.edges[e]) * inverse_k);
        row -= row * args.k > args.edges[e];
        row += (row + 1) * args.k <= args.edges[e];
        incoming.rows[incoming.count] = row * args.stride;
        incoming.slots[incoming.count++] = args.edges[e] - row * args.k;
      }
      int64_t column = 0;
      for (; column + kPanel <= args.stride; column += kPanel) {
        reverse_panel<kPanelVectors, Slot>(args, incoming, point, column, grad_neighbor, deviations);
      }
      for (; column < args.stride; column += Lanes<T>::kCount) {
        reverse_panel<1, Slot>(args, incoming, point, column, grad_neighbor, deviations);
      }
    }
    grad_neighbor += args.stride;
    if (deviations != nullptr) deviations += args.stride;
  }
}

template <typename T>
bool has_nan(const T* values, int64_t count) {
  Index<T> unordered = {};
  for (int64_t i = 0; i < count; i += Lanes<T>::kCount) {
    const Vector<T> value = load(values + i);
    unordered |= value != value;
  }
  bool found = false;
  for (int lane = 0; lane < Lanes<T>::kCount; ++lane) found |= unordered[lane] != 0;
  return found;
}

template <typename T>
void center_rows(const T* x, int64_t rows, int64_t inputs, const T* reference, T* centered, int64_t stride) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  for (int64_t row = 0; row < rows; ++row, x += inputs, centered += stride) {
    int64_t c = 0;
    for (; c + kLanes <= inputs; c += kLanes) {
      // The block after this one, which is next as a rule.
      __builtin_prefetch(x + c + rows * inputs, 0, 2);
      store(centered + c, load(x + c) - load(reference + c));
    }
    for (; c < inputs; ++c) centered[c] = x[c] - reference[c];
    for (; c < stride; ++c) centered[c] = 0;
  }
}

template <typename T>
int64_t gather_any(const EdgeGatherArgs<T>& args, int64_t begin, int64_t end, const T* u,
                   EdgeStatistics<T>* statistics) {
  const auto run = [&](auto slot) {
    using Slot = decltype(slot);
    return args.cloud.ordered ? gather<true, Slot>(args, begin, end, u, statistics)
                              : gather<false, Slot>(args, begin, end, u, statistics);
  };
  return args.cloud.k <= kByteSlots ? run(uint8_t{}) : run(int32_t{});
}

template <typename T>
void norm_backward_any(const EdgeNormBackwardArgs<T>& args, int64_t begin, int64_t end, const T* u,
                       T* sum_grad, T* sum_grad_normalized) {
  args.cloud.k <= kByteSlots ? norm_backward<uint8_t>(args, begin, end, u, sum_grad, sum_grad_normalized)
                             : norm_backward<int32_t>(args, begin, end, u, sum_grad, sum_grad_normalized);
}

template <typename T>
void reverse_any(const EdgeReverseArgs<T>& args, int64_t begin, int64_t end, T* grad_neighbor,
                 T* deviations) {
  args.k <= kByteSlots ? reverse<uint8_t>(args, begin, end, grad_neighbor, deviations)
                       : reverse<int32_t>(args, begin, end, grad_neighbor, deviations);
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                                    \
  bool edge_conv_has_nan(const T* values, int64_t count) {                                                  \
    return has_nan(values, count);                                                                          \
  }                                                                                                         \
  void edge_conv_center(const T* x, int64_t rows, int64_t inputs, const T* reference, T* centered,          \
                        int64_t stride) {                                                                   \
    center_rows(x, rows, inputs, reference, centered, stride);                                              \
  }                                                                                                         \
  int64_t edge_conv_gather(const EdgeGatherArgs<T>& args, int64_t begin, int64_t end, const T* u,           \
                           EdgeStatistics<T>* statistics) {                                                 \
    return gather_any(args, begin, end, u, statistics);                                                     \
  }                                                                                                         \
  void edge_conv_norm_backward(const EdgeNormBackwardArgs<T>& args, int64_t begin, int64_t end, const T* u, \
                               T* sum_grad, T* sum_grad_normalized) {                                       \
    norm_backward_any(args, begin, end, u, sum_grad, sum_grad_normalized);                                  \
  }                                                                                                         \
  void edge_conv_reverse(const EdgeReverseArgs<T>& args, int64_t begin, int64_t end, T* grad_neighbor,      \
                         T* deviations) {                                                                   \
    reverse_any(args, begin, end, grad_neighbor, deviations);                                               \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
