// What every CPU op needs around its loops: dtype dispatch, compute copies, data checks, parallel loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/pixel_type.h"

namespace avatar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype that an op of inputs `type` computes in: half and bfloat16 accumulate in float32.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? ScalarType::Float : type;
}

inline PixelType pixel_type(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::BFloat16:
      return PixelType::bfloat16;
    case ScalarType::Half:
      return PixelType::float16;
    default:
      return PixelType::compute;
  }
}

inline Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// torch::stable::contiguous, which looks its operator up by name, only where there is something to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Contiguous and in the compute dtype; shares the input's memory where it already is.
inline Tensor to_compute(const Tensor& tensor) {
  return as_contiguous(to_type(tensor, compute_type(tensor.scalar_type())));
}

// Calls body(float{}) or body(double{}) for a compute dtype.
template <typename Body>
void dispatch_compute(ScalarType type, const char* op, const Body& body) {
  if (type == ScalarType::Float) {
    body(float{});
  } else if (type == ScalarType::Double) {
    body(double{});
  } else {
    throw std::invalid_argument(std::string(op) + ": no kernel for dtype " +
                                torch::headeronly::toString(type));
  }
}

// new_empty on the CPU, in memory that earlier results or work had where it is large.
inline Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type,
                         size_t element_size) {
  constexpr size_t kLarge = size_t{1} << 20;
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) strides[d] = count;
  const size_t bytes = static_cast<size_t>(count) * element_size;
  if (bytes < kLarge) return torch::stable::new_empty(like, sizes, type);
  Buffer<char> memory = buffer<char>(static_cast<int64_t>(bytes));
  const Tensor result = torch::stable::from_blob(memory.get(), sizes, strides, like.device(), type,
                                                 [bytes](void* taken) { give_memory(taken, bytes); });
  memory.release();
  return result;
}
// In the dtype of `like`.
inline Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return new_result(like, sizes, like.scalar_type(), like.element_size());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

// parallel_for whose tasks are handed out one by one, for work that is unevenly spread.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// body(begin, end) for parts of [0, count) of at least `grain` and a multiple of `unit`, handed out one by
// one and smaller towards the end: where others use the processor too, threads are seldom equally fast.
template <typename Body>
void parallel_parts(int64_t count, int64_t grain, int64_t unit, const Body& body) {
  constexpr int64_t kMostPerThread = 32;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least = std::max({grain, count / (kMostPerThread * threads), int64_t{1}});
  std::vector<int64_t> ends{0};
  while (ends.back() < count) {
    const int64_t rest = count - ends.back();
    const int64_t part = threads > 1 ? std::max(least, rest / (2 * threads)) : rest;
    ends.push_back(std::min(ends.back() + (part + unit - 1) / unit * unit, count));
  }
  parallel_tasks(static_cast<int64_t>(ends.size()) - 1, [&](int64_t p) { body(ends[p], ends[p + 1]); });
}

// Collects the smallest bad position found by parallel loops; raise() is called after them, since an
// exception thrown inside a parallel loop loses its type.
class FirstBad {
 public:
  // Positions are flat; a negative one means "none found".
  void report(int64_t position) {
    if (position < 0) return;
    int64_t seen = position_.load(std::memory_order_relaxed);
    while (position < seen && !position_.compare_exchange_weak(seen, position)) {
    }
  }
  bool found() const { return position_.load() != kNone; }
  int64_t position() const { return position_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> position_{kNone};
};

// The place of the first of `count` numbers outside [0, end), or -1.
inline int64_t first_outside(const int64_t* numbers, int64_t count, int64_t end) {
  constexpr int64_t kBlock = 1024;
  const auto is_outside = [=](int64_t number) {
    return static_cast<uint64_t>(number) >= static_cast<uint64_t>(end);
  };
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    uint64_t any = 0;
    for (int64_t i = first; i < last; ++i) any |= is_outside(numbers[i]);
    if (any) return std::find_if(numbers + first, numbers + last, is_outside) - numbers;
  }
  return -1;
}

// IndexError unless `count` numbers, those of an argument, are all in [0, end); names the first that is not.
inline void check_inside(const char* op, const char* argument, const int64_t* numbers, int64_t count,
                         int64_t end) {
  const int64_t place = first_outside(numbers, count, end);
  if (place < 0) return;
  throw std::out_of_range(std::string(op) + ": " + argument + "[" + std::to_string(place) +
                          "] = " + std::to_string(numbers[place]) + "; expected an index in [0, " +
                          std::to_string(end) + ")");
}

// IndexError for neighbours (B, M, K) outside [-1, num_points), naming the first bad one.
inline void raise_bad_neighbor(const FirstBad& bad, const char* op, const Tensor& neighbors,
                               int64_t num_points) {
  if (!bad.found()) return;
  const int64_t rows = neighbors.size(1), k = neighbors.size(2), position = bad.position();
  throw std::out_of_range(std::string(op) + ": neighbors[" + std::to_string(position / (rows * k)) + ", " +
                          std::to_string(position / k % rows) + ", " + std::to_string(position % k) +
                          "] = " + std::to_string(const_data<int64_t>(neighbors)[position]) +
                          "; expected -1 (none) or an index in [0, " + std::to_string(num_points) + ")");
}

}  // namespace avatar
