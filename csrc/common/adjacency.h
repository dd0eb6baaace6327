// Reverse adjacency of a neighbour list: for each point, the edges that lead to it. With it, gradients
// flow back along edges in a fixed order without atomics.
#pragma once

#include <cstdint>
#include <vector>

namespace avatar {

struct ReverseAdjacency {
  // The edges into point n of batch b are edges[offsets[b * num_points + n] .. offsets[b * num_points + n +
  // 1]), ascending; an edge is a flat position in neighbors (B, M, K).
  std::vector<int64_t> offsets;
  std::vector<int64_t> edges;
};

// neighbors (B, M, K), contiguous, every entry -1 (skipped) or in [0, num_points): check first.
ReverseAdjacency reverse_adjacency(const int64_t* neighbors, int64_t batch, int64_t rows, int64_t k,
                                   int64_t num_points);

// The smallest flat position whose entry is outside [-1, num_points), or -1. Parallel.
int64_t first_bad_neighbor(const int64_t* neighbors, int64_t count, int64_t num_points);

}  // namespace avatar
