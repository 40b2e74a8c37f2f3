// Numbers of queries as whole numbers of 16 bits: sums of their products with codes are the same in any order and in
// every build, and take half the instructions of floats, or a quarter.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.hpp"

namespace knnmoe {

// So many numbers, and zeros after them up to whole vectors of every build.
constexpr int64_t PADDED = 16;
inline int64_t padded(int64_t width) { return (width + PADDED - 1) / PADDED * PADDED; }

// The largest whole number whose products with codes of at most `code`, in so many dimensions, have room in a sum.
inline float most_whole(int64_t code, int64_t width) {
  return float(std::min<int64_t>(INT16_MAX, INT32_MAX / (2 * code * ((width + 1) / 2))));
}

// Fills numbers (padded,) of at most `most` from as many floats, and returns what 1 stands for: 0 where one of them is
// no number, or all are next to 0.
inline float to_whole(const float* numbers, int64_t padded, float most, int16_t* into) {
  constexpr float ROUNDS = 0x1.8p23f;  // a float beside it has no digits after the point
  Floats largest = {}, none = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    const Floats some = load(numbers + i), size = some < 0 ? -some : some;
    largest = largest < size ? size : largest;
    none += some * 0;  // or no number
  }
  const float unit = -least(-largest) / most;
  if (!(total(none) == 0 && std::isnormal(unit))) {
    std::fill(into, into + padded, int16_t(0));
    return 0;
  }
  for (int64_t i = 0; i < padded; i += LANES) {
    const Ints whole = __builtin_convertvector(load(numbers + i) / unit + ROUNDS - ROUNDS, Ints);
    const Shorts shorter = __builtin_convertvector(whole, Shorts);
    std::memcpy(into + i, &shorter, sizeof shorter);
  }
  return unit;
}

// Several queries, two dimensions side by side.
struct WholeQueries {
  std::vector<int32_t> pairs;  // (dimensions / 2, queries)
  std::vector<float> units;    // of the queries, see `to_whole`

  // Takes queries (count, width), less the mean and times the step of each dimension.
  void set(const float* queries, const float* mean, const float* step, int count, int64_t width) {
    const int64_t both = (width + 1) / 2;
    pairs.resize(both * count), units.resize(count);
    scaled_.assign(padded(width), 0), whole_.resize(padded(width));
    for (int query = 0; query < count; ++query, queries += width) {
      for (int64_t i = 0; i < width; ++i) scaled_[i] = (queries[i] - mean[i]) * step[i];
      units[query] = to_whole(scaled_.data(), padded(width), most_whole(128, width), whole_.data());
      for (int64_t pair = 0; pair < both; ++pair)
        std::memcpy(&pairs[pair * count + query], &whole_[2 * pair], sizeof(int32_t));
    }
  }

 private:
  std::vector<float> scaled_;
  std::vector<int16_t> whole_;
};

}  // namespace knnmoe
