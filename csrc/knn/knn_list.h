// The nearest neighbours found so far: keys of (distance, row), ordered by both, in three kinds of lists.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "knn/knn_simd.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
struct Key;

// Distances are never negative, so their bits order as they do, and one comparison orders (distance, row).
template <>
struct Key<float> {
  int64_t bits;

  static Key make(float distance, int32_t row) {
    uint32_t high;
    std::memcpy(&high, &distance, sizeof(high));
    return {static_cast<int64_t>(uint64_t{high} << 32 | static_cast<uint32_t>(row))};
  }
  static Key missing() { return make(std::numeric_limits<float>::infinity(), -1); }
  float distance() const {
    const uint32_t high = static_cast<uint32_t>(bits >> 32);
    float distance;
    std::memcpy(&distance, &high, sizeof(distance));
    return distance;
  }
  int32_t row() const { return static_cast<int32_t>(bits); }
  bool operator<(const Key& other) const { return bits < other.bits; }
};

template <>
struct Key<double> {
  double value;
  uint32_t unsigned_row;

  static Key make(double distance, int32_t row) { return {distance, static_cast<uint32_t>(row)}; }
  static Key missing() { return make(std::numeric_limits<double>::infinity(), -1); }
  double distance() const { return value; }
  int32_t row() const { return static_cast<int32_t>(unsigned_row); }
  bool operator<(const Key& other) const {
    return value < other.value || (value == other.value && unsigned_row < other.unsigned_row);
  }
};

// Up to kCapacity float keys, sorted, in registers. What is not asked for is filled from the front with
// keys below every other, so that the worst key is always the last lane.
template <int kCapacity>
class RegisterList {
 public:
  using K = Key<float>;
  static constexpr int kKeys = kVectorBytes / 8;
  static constexpr int kVectors = kCapacity / kKeys;
  struct State {
    alignas(kVectorBytes) int64_t bits[kCapacity];
  };

  static void reset(State& state, const KeySlots& slots) {
    const int64_t unused = kCapacity - slots.count;
    std::fill_n(state.bits, unused, std::numeric_limits<int64_t>::min());
    std::fill_n(state.bits + unused, slots.count, K::missing().bits);
  }

  explicit RegisterList(const State& state) {
    for (int i = 0; i < kVectors; ++i) vectors_[i] = reinterpret_cast<const LongVector*>(state.bits)[i];
    worst_ = {state.bits[kCapacity - 1]};
  }
  void save(State& state) const {
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<LongVector*>(state.bits)[i] = vectors_[i];
  }
  static K worst(const State& state) { return {state.bits[kCapacity - 1]}; }

  K worst() const { return worst_; }
  void insert(K key) {
    const LongVector added = key.bits - LongVector{};
    LongVector below = std::numeric_limits<int64_t>::min() - LongVector{};
    for (int i = 0; i < kVectors; ++i) {
      const LongVector current = vectors_[i];
      const LongVector moved = larger(shift_up(below, current), added);
      vectors_[i] = current < moved ? current : moved;
      below = current;
    }
    worst_ = {vectors_[kVectors - 1][kKeys - 1]};
  }

  static void finish(State& state, const KeySlots& slots, float* distances, int64_t* rows) {
    for (int64_t slot = 0; slot < slots.count; ++slot) {
      const K key{state.bits[kCapacity - slots.count + slot]};
      distances[slot] = key.distance();
      rows[slot] = key.row();
    }
  }

 private:
  LongVector vectors_[kVectors];
  K worst_;
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
  void save(State&) const {}
  static K worst(const State& state) { return state.keys[state.count - 1]; }

  K worst() const { return worst(state_); }
  void insert(K key) {
    int64_t slot = state_.count - 1;
    for (; slot > 0 && key < state_.keys[slot - 1]; --slot) state_.keys[slot] = state_.keys[slot - 1];
    state_.keys[slot] = key;
  }

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
  void save(State&) const {}
  static K worst(const State& state) { return state.worst; }

  K worst() const { return state_.worst; }
  void insert(K key) {
    state_.keys[state_.count++] = key;
    if (state_.count == state_.capacity) cut(state_);
  }

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

// Writes one query's neighbours, and "missing" into the slots of the row beyond them.
template <typename List, typename T>
void write_row(typename List::State& state, const KeySlots& slots, int64_t k, T* distances, int64_t* rows) {
  List::finish(state, slots, distances, rows);
  std::fill_n(distances + slots.count, k - slots.count, std::numeric_limits<T>::infinity());
  std::fill_n(rows + slots.count, k - slots.count, int64_t{-1});
}

// Calls body(list type tag) for the list that suits the number of slots.
template <typename List>
struct ListTag {
  using type = List;
};

template <typename Body>
void with_list(float, const KeySlots& slots, const Body& body) {
  if (slots.count <= 8) return body(ListTag<RegisterList<8>>{});
  if (slots.count <= 16) return body(ListTag<RegisterList<16>>{});
  if (slots.count <= 24) return body(ListTag<RegisterList<24>>{});
  if (slots.count <= 32) return body(ListTag<RegisterList<32>>{});
  if (slots.count <= kSortedSlots) return body(ListTag<RegisterList<kSortedSlots>>{});
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
