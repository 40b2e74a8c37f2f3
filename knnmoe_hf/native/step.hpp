// What one token recalls: from a gate's input to the similarity of its neighbours and their mixed values.
#pragma once

#include <stdexcept>

#include "lists.hpp"

namespace knnmoe {

// (c,) of W x + b, or of x where there is no W: see `KeyEncoder`. W is of float32 or bfloat16.
struct Encoder {
  const void* weight;
  Kind kind;
  const float* bias;
  int width, hidden;

  template <class T>
  void query(const T* x, float* into) const {
    std::vector<float> source(hidden);
    for (int i = 0; i < hidden; ++i) source[i] = number(x[i]);
    if (!weight) std::copy(source.begin(), source.end(), into);
    for (int row = 0; weight && row < width; row += ROWS) {
      if (kind == Kind::BFLOAT16)
        dots((const BFloat16*)weight, source.data(), row, std::min(ROWS, width - row), into);
      else
        dots((const float*)weight, source.data(), row, std::min(ROWS, width - row), into);
    }
    for (int row = 0; bias && row < width; ++row) into[row] += bias[row];
  }

 private:
  static constexpr int ROWS = 8;  // at once: a processor fetches several streams in the time of one

  template <class T>
  void dots(const T* all, const float* source, int first, int rows, float* into) const {
    const T* from = all + int64_t(first) * hidden;
    Floats sums[ROWS] = {};
    int i = 0;
    if (rows == ROWS)
      for (; i + LANES <= hidden; i += LANES)
        for (int row = 0; row < ROWS; ++row) sums[row] += load(from + int64_t(row) * hidden + i) * load(source + i);
    for (int row = 0; row < rows; ++row) {
      float sum = total(sums[row]);
      for (int rest = i; rest < hidden; ++rest) sum += number(from[int64_t(row) * hidden + rest]) * source[rest];
      into[first + row] = sum;
    }
  }
};

// Values as they are stored: see `ValueTable`. Experts are null where each row has a number of every expert.
struct Values {
  const void* codes;
  Kind kind;
  const void* experts;
  bool wide;  // experts of two bytes
  const Half* rest;
  const float *step, *offset;
  int stored, num_experts;

  // (E,) sum of w_i v_i over the neighbours, whose weights sum to 1.
  void recall(const std::vector<Found>& found, const float* weights, float* into) const {
    std::fill(into, into + num_experts, 0.0f);
    float others = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      switch (kind) {
        case Kind::FLOAT32: add((const float*)codes, found[i].row, weights[i], into); break;
        case Kind::FLOAT16: add((const Half*)codes, found[i].row, weights[i], into); break;
        case Kind::BFLOAT16: add((const BFloat16*)codes, found[i].row, weights[i], into); break;
        case Kind::INT8: add((const int8_t*)codes, found[i].row, weights[i], into); break;
      }
      if (rest) others += weights[i] * number(rest[found[i].row]);
    }
    for (int expert = 0; expert < num_experts; ++expert) {
      if (!experts && step) into[expert] = into[expert] * step[expert] + offset[expert];
      into[expert] += others;
    }
  }

 private:
  template <class T>
  void add(const T* all, int64_t row, float weight, float* into) const {
    const T* numbers = all + row * stored;
    for (int i = 0; i < stored; ++i) {
      if (!experts) {
        into[i] += weight * number(numbers[i]);
        continue;
      }
      const int64_t place = row * stored + i;
      const int expert = wide ? ((const int16_t*)experts)[place] : ((const uint8_t*)experts)[place];
      if (unsigned(expert) >= unsigned(num_experts)) throw std::out_of_range("there is no such expert");
      into[expert] += weight * (step ? number(numbers[i]) * *step + *offset : number(numbers[i]));
    }
  }
};

// Softmax of -distance / unit, nearest first.
inline std::vector<float> neighbor_weights(const std::vector<Found>& found, double unit) {
  std::vector<float> weights(found.size());
  double sum = 0;
  for (size_t i = 0; i < found.size(); ++i)
    sum += weights[i] = float(std::exp((double(found[0].distance) - found[i].distance) / unit));
  for (float& weight : weights) weight = float(weight / sum);
  return weights;
}

// Mean of exp(-falloff * distance).
inline double similarity(const std::vector<Found>& found, double falloff) {
  double sum = 0;
  for (const Found& one : found) sum += std::exp(-falloff * one.distance);
  return sum / found.size();
}

// (1 - lambda) z + lambda m, or z + lambda m: see `mixing.mix_logits` and `mixing.mix_delta`.
template <class T>
inline void mix(const T* logits, const float* recalled, float lambda, bool delta, int num_experts, T* into) {
  for (int expert = 0; expert < num_experts; ++expert) {
    const float own = number(logits[expert]);
    round_to(own + lambda * (delta ? recalled[expert] : recalled[expert] - own), into[expert]);
  }
}

}  // namespace knnmoe
