// The nearest neighbours that a warp has found for one query, ascending by (distance, row).
#pragma once

#include "common/device.cuh"

namespace avatar {
namespace {

// Rows compare as unsigned, so that none, -1, comes last.
template <typename A>
__device__ bool is_before(A distance, uint32_t row, A other_distance, uint32_t other_row) {
  return distance < other_distance || (distance == other_distance && row < other_row);
}

// At most one neighbour a lane.
template <typename A>
class RegisterList {
 public:
  static constexpr int64_t kMost = kWarpSize;

  template <typename Index>
  __device__ RegisterList(A*, Index*, int64_t k)
      : last_(static_cast<int>(k) - 1), distance_(std::numeric_limits<A>::infinity()), row_(~0u) {
    find_worst();
  }
  __device__ A worst_distance() const { return worst_distance_; }
  __device__ uint32_t worst_row() const { return worst_row_; }

  // The same of all lanes.
  __device__ void insert(A distance, uint32_t row) {
    const int lane = threadIdx.x % kWarpSize;
    const unsigned before = __ballot_sync(0xffffffffu, is_before(distance_, row_, distance, row));
    const int place = __popc(before);
    const A shifted_distance = __shfl_up_sync(0xffffffffu, distance_, 1);
    const uint32_t shifted_row = __shfl_up_sync(0xffffffffu, row_, 1);
    if (lane > place) {
      distance_ = shifted_distance;
      row_ = shifted_row;
    } else if (lane == place) {
      distance_ = distance;
      row_ = row;
    }
    find_worst();
  }

  // To what the list was made with, and from there.
  template <typename Index>
  __device__ void store(A* distances, Index* indices) const {
    const int lane = threadIdx.x % kWarpSize;
    if (lane > last_) return;
    distances[lane] = distance_;
    indices[lane] = static_cast<int32_t>(row_);
  }
  template <typename Index>
  __device__ void load(const A* distances, const Index* indices) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane <= last_) {
      distance_ = distances[lane];
      row_ = static_cast<uint32_t>(indices[lane]);
    }
    find_worst();
  }

 private:
  __device__ void find_worst() {
    worst_distance_ = __shfl_sync(0xffffffffu, distance_, last_);
    worst_row_ = __shfl_sync(0xffffffffu, row_, last_);
  }

  int last_;
  A distance_, worst_distance_;
  uint32_t row_, worst_row_;
};

// Any number of neighbours, kept where they are to be stored; "missing" everywhere before. With none, it
// touches no memory, and nothing may be inserted.
template <typename A, typename Index = int64_t>
class MemoryList {
 public:
  __device__ MemoryList(A* distances, Index* indices, int64_t k)
      : k_(k), distances_(distances), indices_(indices), worst_distance_(0), worst_row_(0) {
    if (k > 0) find_worst();
  }
  __device__ A worst_distance() const { return worst_distance_; }
  __device__ uint32_t worst_row() const { return worst_row_; }

  __device__ void insert(A distance, uint32_t row) {
    const int lane = threadIdx.x % kWarpSize;
    int64_t place = k_;
    // From the end, what comes after the new one moves up.
    for (int64_t first = (k_ - 1) / kWarpSize * kWarpSize; first >= 0; first -= kWarpSize) {
      const int64_t at = first + lane;
      A other = 0;
      uint32_t other_row = 0;
      if (at < k_) {
        other = distances_[at];
        other_row = static_cast<uint32_t>(indices_[at]);
      }
      const bool moves = at < k_ && is_before(distance, row, other, other_row);
      const unsigned moving = __ballot_sync(0xffffffffu, moves);
      if (moving == 0) break;
      place = first + __ffs(static_cast<int>(moving)) - 1;
      if (moves && at + 1 < k_) {
        distances_[at + 1] = other;
        indices_[at + 1] = static_cast<int32_t>(other_row);
      }
      __syncwarp();
    }
    if (lane == 0 && place < k_) {
      distances_[place] = distance;
      indices_[place] = static_cast<Index>(row);
    }
    __syncwarp();
    find_worst();
  }

  __device__ void store(A*, Index*) const {}
  __device__ void load(const A*, const Index*) {}

 private:
  __device__ void find_worst() {
    worst_distance_ = distances_[k_ - 1];
    worst_row_ = static_cast<uint32_t>(indices_[k_ - 1]);
  }

  int64_t k_;
  A* distances_;
  Index* indices_;
  A worst_distance_;
  uint32_t worst_row_;
};

// Each lane's candidate, where it exists.
template <typename List, typename A>
__device__ void consider(List& list, A distance, int32_t row, bool exists) {
  const auto enters = [&] {
    return __ballot_sync(0xffffffffu, exists && is_before(distance, static_cast<uint32_t>(row),
                                                          list.worst_distance(), list.worst_row()));
  };
  unsigned entering = enters();
  while (entering) {
    const int lane = __ffs(static_cast<int>(entering)) - 1;
    list.insert(__shfl_sync(0xffffffffu, distance, lane),
                static_cast<uint32_t>(__shfl_sync(0xffffffffu, row, lane)));
    if (lane == static_cast<int>(threadIdx.x % kWarpSize)) exists = false;
    entering = enters();
  }
}

}  // namespace
}  // namespace avatar
