// Building of kd-trees for a few dimensions. Nodes are in preorder; one over leaves [a, b) has its points
// halved at leaf a + (b - a + 1) / 2 by their (coordinate, row) in the dimension where they spread the most.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "knn/knn_index.h"

namespace avatar {

// Where the tree of one cloud is written, see KnnIndex.
template <typename T>
struct TreeTarget {
  T* coordinates;
  int32_t* order;
  T* boxes;
  int32_t* lowest;
};

// That of a cloud whose first leaf is `leaf`.
template <typename T>
TreeTarget<T> tree_of(const KnnIndex& index, int64_t dims, int64_t leaf) {
  return {mutable_data<T>(index.coordinates) + leaf * dims * kLeaf,
          mutable_data<int32_t>(index.order) + leaf * kLeaf, mutable_data<T>(index.bounds) + leaf * 4 * dims,
          mutable_data<int32_t>(index.extra) + leaf * 2};
}

struct TreeNode {
  int64_t id, begin, end;  // leaves

  int64_t leaves() const { return end - begin; }
  int64_t middle() const { return begin + (leaves() + 1) / 2; }
  TreeNode left() const { return {id + 1, begin, middle()}; }
  TreeNode right() const { return {id + 2 * (middle() - begin), middle(), end}; }
};

// Builds the tree of one cloud; nodes of disjoint leaves may be built at the same time. Points travel between
// two buffers of records: their coordinates, then their row. kDims = 0 stands for any number.
template <typename T, int kDims>
class TreeBuilder {
 public:
  using Row = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  // Points of a task where several threads split one node.
  static constexpr int64_t kBlock = 1 << 14;

  TreeBuilder(const T* points, int64_t dims, const TreeTarget<T>& target)
      : points_(points), dims_(dims), target_(target) {}

  int64_t record_size() const { return dims() + 1; }
  int64_t leaves() const { return (count_ + kLeaf - 1) / kLeaf; }

  // Room for as many records each as the cloud has points, and for a byte each.
  void use_buffers(T* records, T* other, uint8_t* numbers) {
    buffers_[0] = records, buffers_[1] = other;
    numbers_ = numbers;
  }

  // Finite points of rows [begin, end).
  int64_t count_finite(int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t row = begin; row < end; ++row) count += finite(row);
    return count;
  }
  // Makes records of them from the place `to` on; returns the place after the last.
  int64_t read(int64_t begin, int64_t end, int64_t to) {
    for (int64_t row = begin; row < end; ++row) {
      if (!finite(row)) continue;
      T* record = buffers_[0] + to++ * record_size();
      for (int d = 0; d < dims(); ++d) record[d] = points_[row * dims() + d];
      set_row(record, row);
    }
    return to;
  }
  void set_count(int64_t count) { count_ = count; }

  // Writes the node and all below it; its records are in buffer `from`.
  void build(const TreeNode& node, int from) {
    if (node.leaves() == 1) return pack(node, from);
    split(node, from);
    build(node.left(), 1 - from);
    build(node.right(), 1 - from);
    join(node);
  }

  // Halves a node's records into the other buffer.
  void split(const TreeNode& node, int from) {
    const Part part = part_of(node, from);
    const Bins bins = bins_of(box_of(part.source, part.count), part.count);
    if (bins.useless()) return select_all(part, bins);
    Histogram histogram;
    fill(histogram, bins, part, 0, part.count);
    const Middle middle = middle_of(bins, part.half, [&](int bin) { return histogram[bin]; });
    distribute(part, 0, part.count, middle.bin, {0, middle.below, middle.below + middle.inside});
    select(part.target + middle.below * record_size(), middle.inside, part.half - middle.below,
           bins.dimension);
  }

  // The same, by parallel(tasks, body).
  template <typename Parallel>
  void split(const TreeNode& node, int from, const Parallel& parallel) {
    const Part part = part_of(node, from);
    const int64_t blocks = (part.count + kBlock - 1) / kBlock;
    const auto each_block = [&](const auto& body) {
      parallel(blocks, [&](int64_t block) {
        body(block, block * kBlock, std::min(part.count, (block + 1) * kBlock));
      });
    };
    std::vector<Box> boxes(blocks);
    each_block([&](int64_t block, int64_t begin, int64_t end) {
      boxes[block] = box_of(part.source + begin * record_size(), end - begin);
    });
    for (int64_t block = 1; block < blocks; ++block) boxes[0].join(boxes[block], dims());
    const Bins bins = bins_of(boxes[0], part.count);
    if (bins.useless()) return select_all(part, bins);
    std::vector<Histogram> histograms(blocks);
    each_block(
        [&](int64_t block, int64_t begin, int64_t end) { fill(histograms[block], bins, part, begin, end); });
    const Middle middle = middle_of(bins, part.half, [&](int bin) {
      int64_t inside = 0;
      for (const Histogram& histogram : histograms) inside += histogram[bin];
      return inside;
    });
    std::vector<Places> places(blocks);
    Places next{0, middle.below, middle.below + middle.inside};
    for (int64_t block = 0; block < blocks; ++block) {
      places[block] = next;
      for (int bin = 0; bin < bins.count; ++bin) {
        (bin < middle.bin    ? next.lower
         : bin == middle.bin ? next.inside
                             : next.higher) += histograms[block][bin];
      }
    }
    each_block([&](int64_t block, int64_t begin, int64_t end) {
      distribute(part, begin, end, middle.bin, places[block]);
    });
    select(part.target + middle.below * record_size(), middle.inside, part.half - middle.below,
           bins.dimension);
  }

  void join(const TreeNode& node) const {
    const int64_t left = node.left().id, right = node.right().id, size = dims();
    T* box = target_.boxes + node.id * 2 * size;
    const T* left_box = target_.boxes + left * 2 * size;
    const T* right_box = target_.boxes + right * 2 * size;
    for (int d = 0; d < size; ++d) {
      box[d] = std::min(left_box[d], right_box[d]);
      box[size + d] = std::max(left_box[size + d], right_box[size + d]);
    }
    target_.lowest[node.id] = std::min(target_.lowest[left], target_.lowest[right]);
  }

 private:
  static constexpr int kMaxDims = kDims ? kDims : kTreeDims;
  static constexpr int kMostBins = 256;
  using Histogram = std::array<int32_t, kMostBins>;

  struct Box {
    T low[kMaxDims], high[kMaxDims];
    void join(const Box& other, int64_t dims) {
      for (int d = 0; d < dims; ++d) {
        low[d] = std::min(low[d], other.low[d]);
        high[d] = std::max(high[d], other.high[d]);
      }
    }
  };

  // Intervals of the widest dimension.
  struct Bins {
    int dimension, count;
    T low, scale;
    // Where there is no telling points apart.
    bool useless() const { return !(scale > 0 && scale < std::numeric_limits<T>::infinity()); }
    int number_of(T value) const { return std::min(static_cast<int>((value - low) * scale), count - 1); }
  };

  // The records of a node, the bins they are in, and how many make the left half.
  struct Part {
    const T* source;
    T* target;
    uint8_t* numbers;
    int64_t count, half;
  };

  // The bin of the first record of the right half, the records in it and in lower ones.
  struct Middle {
    int bin;
    int64_t below, inside;
  };

  // Where records of lower bins, of the middle one and of higher ones go.
  struct Places {
    int64_t lower, inside, higher;
  };

  int64_t dims() const { return kDims ? kDims : dims_; }

  bool finite(int64_t row) const {
    bool all = true;
    for (int d = 0; d < dims(); ++d) {
      const T value = points_[row * dims() + d];
      all &= value - value == 0;
    }
    return all;
  }

  void set_row(T* record, int64_t row) const {
    const Row bits = static_cast<Row>(row);
    std::memcpy(record + dims(), &bits, sizeof bits);
  }
  Row row_of(const T* record) const {
    Row row;
    std::memcpy(&row, record + dims(), sizeof row);
    return row;
  }
  void copy(const T* from, T* to) const { std::memcpy(to, from, record_size() * sizeof(T)); }

  Box box_of(const T* records, int64_t count) const {
    Box box;
#if defined(__SSE2__)
    if constexpr (std::is_same_v<T, float> && kDims == 3) {
      __m128 low = _mm_loadu_ps(records), high = low, other_low = low, other_high = low;
      for (int64_t i = count & 1; i < count; i += 2) {
        const __m128 record = _mm_loadu_ps(records + i * 4), other = _mm_loadu_ps(records + i * 4 + 4);
        low = _mm_min_ps(low, record), high = _mm_max_ps(high, record);
        other_low = _mm_min_ps(other_low, other), other_high = _mm_max_ps(other_high, other);
      }
      float values[2][4];
      _mm_storeu_ps(values[0], _mm_min_ps(low, other_low));
      _mm_storeu_ps(values[1], _mm_max_ps(high, other_high));
      std::copy_n(values[0], 3, box.low);
      std::copy_n(values[1], 3, box.high);
      return box;
    }
#endif
    for (int d = 0; d < dims(); ++d) box.low[d] = box.high[d] = records[d];
    for (int64_t i = 1; i < count; ++i) {
      for (int d = 0; d < dims(); ++d) {
        const T value = records[i * record_size() + d];
        box.low[d] = std::min(box.low[d], value);
        box.high[d] = std::max(box.high[d], value);
      }
    }
    return box;
  }

  Part part_of(const TreeNode& node, int from) const {
    const int64_t first = node.begin * kLeaf;
    return {buffers_[from] + first * record_size(), buffers_[1 - from] + first * record_size(),
            numbers_ + first, std::min(node.end * kLeaf, count_) - first,
            (node.middle() - node.begin) * kLeaf};
  }

  Bins bins_of(const Box& box, int64_t count) const {
    Bins bins{0, count > 1024 ? kMostBins : 64, 0, 0};
    for (int d = 1; d < dims(); ++d) {
      if (box.high[d] - box.low[d] > box.high[bins.dimension] - box.low[bins.dimension]) bins.dimension = d;
    }
    bins.low = box.low[bins.dimension];
    bins.scale = bins.count / (box.high[bins.dimension] - bins.low);
    return bins;
  }

  void fill(Histogram& histogram, const Bins& bins, const Part& part, int64_t begin, int64_t end) const {
    std::fill_n(histogram.begin(), bins.count, 0);
    const T* values = part.source + bins.dimension;
    for (int64_t i = begin; i < end; ++i) {
      const int number = bins.number_of(values[i * record_size()]);
      part.numbers[i] = static_cast<uint8_t>(number);
      ++histogram[number];
    }
  }

  template <typename InBin>
  Middle middle_of(const Bins& bins, int64_t half, const InBin& in_bin) const {
    Middle middle{0, 0, in_bin(0)};
    while (middle.below + middle.inside <= half && middle.bin + 1 < bins.count) {
      middle.below += middle.inside;
      middle.inside = in_bin(++middle.bin);
    }
    return middle;
  }

  void distribute(const Part& part, int64_t begin, int64_t end, int middle, Places places) const {
    for (int64_t i = begin; i < end; ++i) {
      const T* record = part.source + i * record_size();
      const int number = part.numbers[i];
      if (__builtin_expect(number == middle, 0)) {
        copy(record, part.target + places.inside++ * record_size());
        continue;
      }
      const bool is_lower = number < middle;
      copy(record, part.target + (is_lower ? places.lower : places.higher) * record_size());
      places.lower += is_lower;
      places.higher += !is_lower;
    }
  }

  void select_all(const Part& part, const Bins& bins) const {
    std::copy_n(part.source, part.count * record_size(), part.target);
    select(part.target, part.count, part.half, bins.dimension);
  }

  // The first `half` records by (coordinate, row) come first.
  void select(T* records, int64_t count, int64_t half, int dimension) const {
    if (half == 0 || half == count) return;
    if constexpr (kDims == 0) {
      select_any(records, count, half, dimension);
    } else {
      struct Record {
        T values[kDims + 1];
      };
      Record* begin = reinterpret_cast<Record*>(records);
      std::nth_element(begin, begin + half, begin + count, [&](const Record& a, const Record& b) {
        const T x = a.values[dimension], y = b.values[dimension];
        return x < y || (x == y && row_of(a.values) < row_of(b.values));
      });
    }
  }

  void select_any(T* records, int64_t count, int64_t half, int dimension) const {
    const int64_t size = record_size();
    std::vector<T> moved(records, records + count * size);
    std::vector<int64_t> places(count);
    for (int64_t i = 0; i < count; ++i) places[i] = i;
    std::nth_element(places.begin(), places.begin() + half, places.end(), [&](int64_t a, int64_t b) {
      const T x = moved[a * size + dimension], y = moved[b * size + dimension];
      return x < y || (x == y && row_of(&moved[a * size]) < row_of(&moved[b * size]));
    });
    for (int64_t i = 0; i < count; ++i) copy(&moved[places[i] * size], records + i * size);
  }

  void pack(const TreeNode& node, int from) const {
    const int64_t first = node.begin * kLeaf, filled = std::min<int64_t>(kLeaf, count_ - first);
    const T* records = buffers_[from] + first * record_size();
    T* coordinates = target_.coordinates + first * dims();
    int32_t* order = target_.order + first;
    T* box = target_.boxes + node.id * 2 * dims();
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int64_t i = 0; i < filled; ++i) {
      const T* record = records + i * record_size();
      for (int d = 0; d < dims(); ++d) coordinates[d * kLeaf + i] = record[d];
      order[i] = static_cast<int32_t>(row_of(record));
      lowest = std::min(lowest, order[i]);
    }
    for (int64_t i = filled; i < kLeaf; ++i) {
      for (int d = 0; d < dims(); ++d) coordinates[d * kLeaf + i] = std::numeric_limits<T>::infinity();
      order[i] = -1;
    }
    const Box all = box_of(records, filled);
    std::copy_n(all.low, dims(), box);
    std::copy_n(all.high, dims(), box + dims());
    target_.lowest[node.id] = lowest;
  }

  const T* points_;
  const int64_t dims_;
  const TreeTarget<T> target_;
  int64_t count_ = 0;
  T* buffers_[2] = {};
  uint8_t* numbers_ = nullptr;
};

}  // namespace avatar
