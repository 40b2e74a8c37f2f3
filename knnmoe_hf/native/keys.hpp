// A layer's keys and exact distances to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.hpp"

namespace knnmoe {

enum class Kind { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// Calls `use` with the pointer cast to the type that `kind` names.
template <class Use>
inline void with_type(const void* numbers, Kind kind, Use use) {
  switch (kind) {
    case Kind::FLOAT32: return use((const float*)numbers);
    case Kind::FLOAT16: return use((const Half*)numbers);
    case Kind::BFLOAT16: return use((const BFloat16*)numbers);
    case Kind::INT8: return use((const int8_t*)numbers);
  }
}

// As above, for the dtypes in which models compute.
template <class Use>
inline void with_output(void* numbers, Kind kind, Use use) {
  switch (kind) {
    case Kind::FLOAT32: return use((float*)numbers);
    case Kind::FLOAT16: return use((Half*)numbers);
    case Kind::BFLOAT16: return use((BFloat16*)numbers);
    case Kind::INT8: return;
  }
}

constexpr int64_t CACHE_LINE = 64;
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += CACHE_LINE) __builtin_prefetch((const char*)from + byte);
  __builtin_prefetch((const char*)from + bytes - 1);
}

// The largest score of a key that takes part, and the score of one that does not.
constexpr float LARGEST = std::numeric_limits<float>::max(), INF = std::numeric_limits<float>::infinity();

struct Neighbor {
  float distance;
  int64_t row;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (!(other.distance < distance) && row < other.row);
  }
};

// Keeps the k nearest of all candidates, ties by row. Candidates are collected unsorted and cut to k when the buffer is
// full, which is cheaper than a heap.
class TopK {
 public:
  void reset(size_t k) {
    k_ = k;
    candidates_.clear();
    candidates_.reserve(BUFFER * k);
    bound_ = INF;
  }
  void add(float distance, int64_t row) {
    if (distance != distance) distance = INF;  // NaN cannot be ordered
    if (distance > bound_) return;
    candidates_.push_back({distance, row});
    if (candidates_.size() == BUFFER * k_) cut();
  }
  // Nearest first; fewer than k where fewer were added.
  const std::vector<Neighbor>& sorted() {
    if (candidates_.size() > k_) cut();
    std::sort(candidates_.begin(), candidates_.end());
    return candidates_;
  }

 private:
  static constexpr size_t BUFFER = 8;  // times k: candidates re-ranked after 4-bit scoring are usually cut only once

  void cut() {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end());
    candidates_.resize(k_);
    bound_ = candidates_.back().distance;
  }

  size_t k_ = 0;
  float bound_ = INF;
  std::vector<Neighbor> candidates_;
};

// Squared L2 distance of a query to a key; the order of the sum depends on the width only.
template <class T>
inline float squared_distance(const float* query, const T* key, const float* step, int64_t width) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const Floats difference = (step ? load(key + i) * load(step + i) : load(key + i)) - load(query + i);
    sums = multiply_add(difference, difference, sums);
  }
  float total = sum(sums);
  for (; i < width; ++i) {
    const float difference = (step ? to_float(key[i]) * step[i] : to_float(key[i])) - query[i];
    total += difference * difference;
  }
  return total;
}

// Keys (rows, width); int8 codes count steps (width,), else `step` is null.
struct Keys {
  const void* codes;
  Kind kind;
  const float* step;
  int64_t rows, width;

  // Compares a query with `count` of the rows.
  template <class Row>
  void compare(const float* query, const Row* which, int64_t count, TopK& top) const {
    with_type(codes, kind, [&](auto* keys) {
      const int64_t bytes = width * sizeof *keys;
      const int64_t ahead = std::clamp<int64_t>(PREFETCHED_BYTES / bytes, 1, PREFETCHED_KEYS);
      for (int64_t i = 0; i < std::min(ahead, count); ++i) prefetch(keys + which[i] * width, bytes);
      for (int64_t i = 0; i < count; ++i) {
        if (i + ahead < count) prefetch(keys + which[i + ahead] * width, bytes);
        top.add(squared_distance(query, keys + which[i] * width, step, width), which[i]);
      }
    });
  }

  // Compares several queries with all rows; each key is read and decoded once, into `key` (width,).
  void compare_all(const float* queries, int count, std::vector<float>& key, std::vector<TopK>& top) const {
    key.resize(width);
    with_type(codes, kind, [&](auto* codes) {
      for (int64_t row = 0; row < rows; ++row, codes += width) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
          store(key.data() + i, step ? load(codes + i) * load(step + i) : load(codes + i));
        for (; i < width; ++i) key[i] = step ? to_float(codes[i]) * step[i] : to_float(codes[i]);
        for (int query = 0; query < count; ++query)
          top[query].add(squared_distance(queries + query * width, key.data(), nullptr, width), row);
      }
    });
  }

 private:
  // The rows of a list are scattered over memory: each costs a cache miss and often a TLB miss, so that many are
  // prefetched at once.
  static constexpr int64_t PREFETCHED_KEYS = 32, PREFETCHED_BYTES = 1 << 14;
};

}  // namespace knnmoe
