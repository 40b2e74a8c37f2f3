// Queries quantised to int16. Integer dot products give the same sum in any order and in every build, and take half the
// instructions of float ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.hpp"

namespace knnmoe {

// Vectors are padded with zeros to a multiple of this, which is whole SIMD vectors in every build.
constexpr int64_t PADDING = 16;
inline int64_t padded(int64_t width) { return (width + PADDING - 1) / PADDING * PADDING; }

// The largest quantised value for which a dot product with codes of at most `max_code` cannot overflow an int32.
inline float max_integer(int64_t max_code, int64_t width) {
  return float(std::min<int64_t>(INT16_MAX, INT32_MAX / (2 * max_code * ((width + 1) / 2))));
}

// Quantises floats to integers of at most `largest` in size and returns the step, the float that the integer 1 stands
// for. Where a value is NaN or infinite, or all are next to zero, all integers and the step are 0.
inline float quantize(const float* values, int64_t padded_width, float largest, int16_t* into) {
  constexpr float ROUND = 0x1.8p23f;  // adding and subtracting it rounds a float to an integer
  Floats most = {}, not_finite = {};
  for (int64_t i = 0; i < padded_width; i += LANES) {
    const Floats value = load(values + i), size = value < 0 ? -value : value;
    most = most < size ? size : most;
    not_finite += value * 0;  // NaN if any value is NaN or infinite
  }
  const float step = -minimum(-most) / largest;
  if (!(sum(not_finite) == 0 && std::isnormal(step))) {
    std::fill(into, into + padded_width, int16_t(0));
    return 0;
  }
  for (int64_t i = 0; i < padded_width; i += LANES) {
    const Ints rounded = __builtin_convertvector(load(values + i) / step + ROUND - ROUND, Ints);
    const Shorts narrow = __builtin_convertvector(rounded, Shorts);
    std::memcpy(into + i, &narrow, sizeof narrow);
  }
  return step;
}

// Several quantised queries, interleaved by pairs of dimensions.
struct QuantizedQueries {
  std::vector<int32_t> pairs;  // (dimensions / 2, queries), two int16 each
  std::vector<float> steps;    // (queries,), see `quantize`

  // Takes (query - mean) * scale of queries (count, width).
  void set(const float* queries, const float* mean, const float* scale, int count, int64_t width) {
    const int64_t num_pairs = (width + 1) / 2;
    pairs.resize(num_pairs * count), steps.resize(count);
    scaled_.assign(padded(width), 0), integers_.resize(padded(width));
    for (int query = 0; query < count; ++query, queries += width) {
      for (int64_t i = 0; i < width; ++i) scaled_[i] = (queries[i] - mean[i]) * scale[i];
      steps[query] = quantize(scaled_.data(), padded(width), max_integer(128, width), integers_.data());
      for (int64_t pair = 0; pair < num_pairs; ++pair)
        std::memcpy(&pairs[pair * count + query], &integers_[2 * pair], sizeof(int32_t));
    }
  }

 private:
  std::vector<float> scaled_;
  std::vector<int16_t> integers_;
};

}  // namespace knnmoe
