// The values of a layer's rows, as they are stored, and their weighted sums.
#pragma once

#include <stdexcept>

#include "keys.hpp"

namespace knnmoe {

// See `knnmoe_hf.lookup.values.ValueTable`. A stored number q stands for q * step + offset if there is a step.
struct Values {
  const void* codes;  // (rows, stored)
  Kind kind;
  const void* experts;  // (rows, stored), which experts the codes are of; null if dense: stored is num_experts
  bool wide;            // experts are int16, else uint8
  const Half* default_value;  // (rows,), of all other experts; null if 0
  const float *step, *offset;  // (num_experts,) if dense, else (1,); null if codes are floats
  int64_t rows, stored, num_experts;

  void check_rows(const int64_t* which, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (which[i] < 0 || which[i] >= rows)
        throw std::out_of_range("row " + std::to_string(which[i]) + " is not one of the table's " +
                                std::to_string(rows) + ": pass rows from 0 to one less");
  }

  // into[expert] = sum_i weights[i] * value[which[i]][expert] over k rows; in dense tables with a step the weights must
  // sum to 1.
  void combine(const int64_t* which, const float* weights, int64_t k, float* into) const {
    std::fill(into, into + num_experts, 0.0f);
    with_type(codes, kind, [&](auto* table) {
      for (int64_t i = 0; i < k; ++i) prefetch_row(table, which[i]);
      for (int64_t i = 0; i < k; ++i) add_row(table, which[i], weights[i], into);
    });
    float others = 0;
    for (int64_t i = 0; default_value && i < k; ++i) others += weights[i] * to_float(default_value[which[i]]);
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      if (!experts && step) into[expert] = into[expert] * step[expert] + offset[expert];
      into[expert] += others;
    }
  }

 private:
  template <class T>
  void prefetch_row(const T* table, int64_t row) const {
    prefetch(table + row * stored, stored * sizeof(T));
    if (experts) prefetch((const uint8_t*)experts + (row * stored << wide), stored << wide);
    if (default_value) prefetch(default_value + row, sizeof *default_value);
  }

  template <class T>
  void add_row(const T* table, int64_t row, float weight, float* into) const {
    const T* numbers = table + row * stored;
    for (int64_t i = 0; i < stored; ++i) {
      if (!experts) {
        into[i] += weight * to_float(numbers[i]);
        continue;
      }
      const int64_t place = row * stored + i;
      const int64_t expert = wide ? ((const int16_t*)experts)[place] : ((const uint8_t*)experts)[place];
      if (uint64_t(expert) >= uint64_t(num_experts))
        throw std::out_of_range("row " + std::to_string(row) + " holds a value of expert " + std::to_string(expert) +
                                ", but there are only " + std::to_string(num_experts) + ": the table is damaged");
      into[expert] += weight * (step ? to_float(numbers[i]) * *step + *offset : to_float(numbers[i]));
    }
  }
};

}  // namespace knnmoe
