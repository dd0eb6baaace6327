#include "common/adjacency.h"

#include <algorithm>

#include "common/tensor.h"

namespace avatar {
namespace {

// Edges of one batch are cut into this many blocks at most: each counts its own share, so that the order of
// edges does not depend on the number of threads.
constexpr int64_t kBlocks = 8;
constexpr int64_t kBlockRowsMin = 1 << 15;

}  // namespace

ReverseAdjacency reverse_adjacency(const int64_t* neighbors, int64_t batch, int64_t rows, int64_t k,
                                   int64_t num_points) {
  const int64_t per_batch = rows * k;
  const int64_t blocks = std::clamp<int64_t>(per_batch / kBlockRowsMin, 1, kBlocks);
  const int64_t block_size = (per_batch + blocks - 1) / blocks;
  const int64_t tasks = batch * blocks;
  const auto range = [&](int64_t task) {
    const int64_t begin = std::min(task % blocks * block_size, per_batch);
    return std::pair{task / blocks * per_batch + begin,
                     task / blocks * per_batch + std::min(begin + block_size, per_batch)};
  };

  // counts[block][point], then turned into the place where the block's first edge to that point goes.
  std::vector<int64_t> counts(tasks * num_points, 0);
  parallel_tasks(tasks, [&](int64_t task) {
    int64_t* count = counts.data() + task * num_points;
    const auto [begin, end] = range(task);
    for (int64_t e = begin; e < end; ++e) {
      if (neighbors[e] >= 0) ++count[neighbors[e]];
    }
  });

  ReverseAdjacency reverse;
  reverse.offsets.resize(batch * num_points + 1);
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < num_points; ++n) {
      reverse.offsets[b * num_points + n] = total;
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t& count = counts[(b * blocks + block) * num_points + n];
        total += std::exchange(count, total);
      }
    }
  }
  reverse.offsets[batch * num_points] = total;

  reverse.edges.resize(total);
  parallel_tasks(tasks, [&](int64_t task) {
    int64_t* place = counts.data() + task * num_points;
    const auto [begin, end] = range(task);
    for (int64_t e = begin; e < end; ++e) {
      if (neighbors[e] >= 0) reverse.edges[place[neighbors[e]]++] = e;
    }
  });
  return reverse;
}

int64_t first_bad_neighbor(const int64_t* neighbors, int64_t count, int64_t num_points) {
  FirstBad bad;
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (neighbors[e] < -1 || neighbors[e] >= num_points) {
        bad.report(e);
        break;
      }
    }
  });
  return bad.found() ? bad.position() : -1;
}

}  // namespace avatar
