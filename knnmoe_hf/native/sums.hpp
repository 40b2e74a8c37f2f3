// Decaying sums along sequences: see `knnmoe_hf.sequence.recurrence`.
#pragma once

#include <cstdint>

namespace knnmoe {

// sums[t] = gain[t] * sums[t-1] + values[t] in each of some rows (rows, length).
inline void running_sums(const float* values, const float* gain, int64_t rows, int64_t length, float* sums) {
  for (int64_t row = 0; row < rows; ++row, values += length, gain += length, sums += length) {
    double sum = 0;
    for (int64_t t = 0; t < length; ++t) sums[t] = float(sum = gain[t] * sum + values[t]);
  }
}

}  // namespace knnmoe
