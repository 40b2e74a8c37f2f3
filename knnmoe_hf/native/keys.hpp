// A layer's keys, and the nearest of those that a query is compared with, by exact distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "vectors.hpp"

namespace knnmoe {

enum class Kind { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// Calls `use` with the address of the first number, typed.
template <class Use>
inline void typed(const void* numbers, Kind kind, Use use) {
  switch (kind) {
    case Kind::FLOAT32: return use((const float*)numbers);
    case Kind::FLOAT16: return use((const Half*)numbers);
    case Kind::BFLOAT16: return use((const BFloat16*)numbers);
    case Kind::INT8: return use((const int8_t*)numbers);
  }
}

// What lies anywhere is asked for before it is read.
constexpr int64_t LINE = 64;
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch((const char*)from + byte);
  __builtin_prefetch((const char*)from + bytes - 1);
}

// The last of all distances and scores that are numbers, and what comes after it.
constexpr float LAST = std::numeric_limits<float>::max(), FAR = std::numeric_limits<float>::infinity();

struct Found {
  float distance;
  int64_t row;
  bool operator<(const Found& other) const {
    return distance < other.distance || (!(other.distance < distance) && row < other.row);
  }
};

// The `most` nearest of all that were offered; those that may be among them are sorted out when there is no more room.
class Nearest {
 public:
  // Forgets what was offered before.
  void begin(size_t most) {
    most_ = most;
    found_.clear();
    found_.reserve(ROOM * most);
    worst_ = FAR;
  }
  void offer(float distance, int64_t row) {
    if (distance != distance) distance = FAR;  // no order has room for it
    if (distance > worst_) return;
    found_.push_back({distance, row});
    if (found_.size() == ROOM * most_) sort_out();
  }
  // Nearest first.
  const std::vector<Found>& sorted() {
    if (found_.size() > most_) sort_out();
    std::sort(found_.begin(), found_.end());
    return found_;
  }

 private:
  static constexpr size_t ROOM = 8;  // times those wanted: what a sketch leaves is sorted out once

  void sort_out() {
    std::nth_element(found_.begin(), found_.begin() + (most_ - 1), found_.end());
    found_.resize(most_);
    worst_ = found_.back().distance;
  }

  size_t most_ = 0;
  float worst_ = FAR;
  std::vector<Found> found_;
};

// Squared distance from a query to a key; the sum's order depends on nothing but the width.
template <class T>
inline float squared_distance(const float* query, const T* key, const float* step, int64_t width) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const Floats apart = (step ? load(key + i) * load(step + i) : load(key + i)) - load(query + i);
    sums = fused(apart, apart, sums);
  }
  float sum = total(sums);
  for (; i < width; ++i) {
    const float apart = (step ? number(key[i]) * step[i] : number(key[i])) - query[i];
    sum += apart * apart;
  }
  return sum;
}

// Keys (rows, width); a code of int8 counts steps (width,).
struct Keys {
  const void* codes;
  Kind kind;
  const float* step;
  int64_t rows, width;

  // Offers some rows (count,) to the nearest of a query.
  template <class Row>
  void offer(const float* query, const Row* which, int64_t count, Nearest& nearest) const {
    typed(codes, kind, [&](auto* all) {
      const int64_t bytes = width * sizeof *all, ahead = std::clamp<int64_t>(FETCHED / bytes, 1, AHEAD);
      for (int64_t i = 0; i < std::min(ahead, count); ++i) fetch(all + which[i] * width, bytes);
      for (int64_t i = 0; i < count; ++i) {
        if (i + ahead < count) fetch(all + which[i + ahead] * width, bytes);
        nearest.offer(squared_distance(query, all + which[i] * width, step, width), which[i]);
      }
    });
  }

  // Offers all rows to the nearest of each of some queries, for which a key is read, and made a number of, once.
  void offer_all(const float* queries, int count, std::vector<Nearest>& nearest) const {
    std::vector<float> key(width);
    typed(codes, kind, [&](auto* all) {
      for (int64_t row = 0; row < rows; ++row, all += width) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
          store(key.data() + i, step ? load(all + i) * load(step + i) : load(all + i));
        for (; i < width; ++i) key[i] = step ? number(all[i]) * step[i] : number(all[i]);
        for (int query = 0; query < count; ++query)
          nearest[query].offer(squared_distance(queries + query * width, key.data(), nullptr, width), row);
      }
    });
  }

 private:
  // A list's rows lie anywhere, so that each waits for memory and often for its page's address: so many are asked for
  // ahead, of so many bytes.
  static constexpr int64_t AHEAD = 32, FETCHED = 1 << 14;
};

}  // namespace knnmoe
