// The nearest neighbours found so far: keys of (distance, row), ordered by both, in three kinds of lists.
#pragma once

#include <algorithm>
#include <limits>

#include "knn/knn_key.h"
#include "knn/knn_simd.h"
#include "knn/knn_sort.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Up to kCapacity float keys, sorted. New ones gather, distances and rows apart, and are sorted in by
// batches; what is not asked for is filled from the front with keys below every other, so that the worst key
// is always the last. Keys beyond the worst as of the last batch need not be added.
template <int kCapacity>
class BatchList {
 public:
  using K = Key<float>;
  static constexpr int kBatch = 16;
  static constexpr int kVectors = kCapacity / kKeyLanes;
  struct State {
    alignas(kVectorBytes) int64_t bits[kCapacity];
    // Room for a batch less one, a leaf, and what a vector writes beyond its last lane.
    alignas(kVectorBytes) float distances[kBatch + kLeaf + Lanes<float>::kCount];
    alignas(kVectorBytes) int32_t rows[kBatch + kLeaf + Lanes<float>::kCount];
    int64_t pending;
  };

  static void reset(State& state, const KeySlots& slots) {
    const int64_t unused = kCapacity - slots.count;
    for (int64_t i = 0; i < kCapacity; ++i) state.bits[i] = i < unused ? 0 : K::missing().bits;
    state.pending = 0;
  }

  explicit BatchList(State& state) : state_(state) {}
  static K worst(const State& state) { return {state.bits[kCapacity - 1]}; }

  K worst() const { return worst(state_); }
  void insert(K key) {
    state_.distances[state_.pending] = key.distance();
    state_.rows[state_.pending] = key.row();
    if (++state_.pending == kBatch) sort_in();
  }
  // Adds the lanes that are set in `hits`, up to kLeaf keys in all.
  class Adder {
   public:
    explicit Adder(BatchList& list) : list_(list), pending_(list.state_.pending) {}
    ~Adder() {
      list_.state_.pending = pending_;
      while (list_.state_.pending >= kBatch) list_.sort_in();
    }
    void add(FloatVector distances, const int32_t* rows, uint32_t hits) {
      State& state = list_.state_;
      store_lanes(state.distances + pending_, distances, state.rows + pending_, rows, hits);
      pending_ += __builtin_popcount(hits);
    }

   private:
    BatchList& list_;
    int64_t pending_;
  };

  static void finish(State& state, const KeySlots& slots, float* distances, int64_t* rows) {
    if (state.pending) {
      for (int64_t i = 0; i < kBatch; ++i) {
        state.distances[i] = i < state.pending ? state.distances[i] : K::missing().distance();
        state.rows[i] = i < state.pending ? state.rows[i] : K::missing().row();
      }
      state.pending = kBatch;
      BatchList(state).sort_in();
    }
    write_keys(state.bits + kCapacity - slots.count, slots.count, distances, rows);
  }

 private:
  // The last kBatch keys.
  void sort_in() {
    constexpr int kAdded = kBatch / kKeyLanes;
    state_.pending -= kBatch;
    alignas(kVectorBytes) int64_t bits[kBatch];
    for (int i = 0; i < kBatch; ++i) {
      bits[i] = K::make(state_.distances[state_.pending + i], state_.rows[state_.pending + i]).bits;
    }
    DoubleVector added[kAdded], list[kVectors];
    for (int i = 0; i < kAdded; ++i) added[i] = load_keys(bits + i * kKeyLanes);
    for (int i = 0; i < kVectors; ++i) list[i] = load_keys(state_.bits + i * kKeyLanes);
    sort_vectors<kAdded>(added);
    merge_smallest<kVectors, kAdded>(list, added);
    for (int i = 0; i < kVectors; ++i) store_keys(state_.bits + i * kKeyLanes, list[i]);
  }

  State& state_;
};

// Adds lanes one by one.
template <typename List, typename T>
class LaneAdder {
 public:
  explicit LaneAdder(List& list) : list_(list) {}
  void add(Vector<T> distances, const int32_t* rows, uint32_t hits) {
    if (!hits) return;
    alignas(kVectorBytes) T lanes[Lanes<T>::kCount];
    store(lanes, distances);
    for (; hits; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      const Key<T> key = Key<T>::make(lanes[lane], rows[lane]);
      if (key < list_.worst()) list_.insert(key);
    }
  }

 private:
  List& list_;
};

// Up to kSortedSlots keys, sorted, in memory.
template <typename T>
class SortedList {
 public:
  using K = Key<T>;
  struct State {
    K keys[kSortedSlots];
    int64_t count;
  };

  static void reset(State& state, const KeySlots& slots) {
    state.count = slots.count;
    std::fill_n(state.keys, slots.count, K::missing());
  }

  explicit SortedList(State& state) : state_(state) {}
  static K worst(const State& state) { return state.keys[state.count - 1]; }

  K worst() const { return worst(state_); }
  void insert(K key) {
    int64_t slot = state_.count - 1;
    for (; slot > 0 && key < state_.keys[slot - 1]; --slot) state_.keys[slot] = state_.keys[slot - 1];
    state_.keys[slot] = key;
  }
  using Adder = LaneAdder<SortedList<T>, T>;

  static void finish(State& state, const KeySlots& slots, T* distances, int64_t* rows) {
    for (int64_t slot = 0; slot < slots.count; ++slot) {
      distances[slot] = state.keys[slot].distance();
      rows[slot] = state.keys[slot].row();
    }
  }

 private:
  State& state_;
};

// Any number of keys: they gather in a buffer about twice as large, which is cut back when it is full.
template <typename T>
class BufferList {
 public:
  using K = Key<T>;
  struct State {
    K* keys = nullptr;
    int64_t count = 0, slots = 0, capacity = 0;
    K worst = K::missing();
  };

  static void reset(State& state, const KeySlots& slots) {
    state = {static_cast<K*>(slots.buffer), 0, slots.count, slots.capacity, K::missing()};
  }

  explicit BufferList(State& state) : state_(state) {}
  static K worst(const State& state) { return state.worst; }

  K worst() const { return state_.worst; }
  void insert(K key) {
    state_.keys[state_.count++] = key;
    if (state_.count == state_.capacity) cut(state_);
  }
  using Adder = LaneAdder<BufferList<T>, T>;

  static void finish(State& state, const KeySlots& slots, T* distances, int64_t* rows) {
    if (state.count > slots.count) cut(state);
    std::sort(state.keys, state.keys + state.count);
    for (int64_t slot = 0; slot < slots.count; ++slot) {
      const K key = slot < state.count ? state.keys[slot] : K::missing();
      distances[slot] = key.distance();
      rows[slot] = key.row();
    }
  }

 private:
  static void cut(State& state) {
    std::nth_element(state.keys, state.keys + state.slots - 1, state.keys + state.count);
    state.count = state.slots;
    state.worst = state.keys[state.slots - 1];
  }

  State& state_;
};

template <typename T>
void write_missing(T* distances, int64_t* rows, int64_t count) {
  if (!count) return;
  std::fill_n(distances, count, std::numeric_limits<T>::infinity());
  std::fill_n(rows, count, int64_t{-1});
}

// Writes one query's neighbours, and "missing" into the slots of the row beyond them.
template <typename List, typename T>
void write_row(typename List::State& state, const KeySlots& slots, int64_t k, T* distances, int64_t* rows) {
  List::finish(state, slots, distances, rows);
  write_missing(distances + slots.count, rows + slots.count, k - slots.count);
}

// Calls body(list type tag) for the list that suits the number of slots.
template <typename List>
struct ListTag {
  using type = List;
};

template <typename Body>
void with_list(float, const KeySlots& slots, const Body& body) {
  if (slots.count <= 8) return body(ListTag<BatchList<8>>{});
  if (slots.count <= 16) return body(ListTag<BatchList<16>>{});
  if (slots.count <= 32) return body(ListTag<BatchList<32>>{});
  if (slots.count <= kSortedSlots) return body(ListTag<BatchList<kSortedSlots>>{});
  body(ListTag<BufferList<float>>{});
}

template <typename Body>
void with_list(double, const KeySlots& slots, const Body& body) {
  if (slots.count <= kSortedSlots) return body(ListTag<SortedList<double>>{});
  body(ListTag<BufferList<double>>{});
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
