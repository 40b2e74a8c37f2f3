// What tokens recall: from a gate's inputs to queries, and from neighbours to how similar they are and their values.
#pragma once

#include "lists.hpp"

namespace knnmoe {

// (c,) of W x + b, or of x where there is no W: see `KeyEncoder`. W is of float32 or bfloat16.
class Encoder {
 public:
  static constexpr int TOGETHER = LANES / 4;  // tokens for which a row of W is read once

  Encoder() = default;
  Encoder(const void* weight, Kind kind, const float* bias, int64_t width, int64_t hidden)
      : weight_(weight), kind_(kind), bias_(bias), width_(width), hidden_(hidden) {}

  // Queries (count, c) of x (count, d), `source` being room for it as floats; each the same in any count.
  template <class T>
  void queries(const T* x, int64_t count, std::vector<float>& source, float* into) const {
    source.resize(TOGETHER * hidden_);
    while (count > 0) {
      const int some = count >= TOGETHER ? TOGETHER : 1;
      for (int64_t i = 0; i < some * hidden_; ++i) source[i] = number(x[i]);
      if (!weight_)
        std::copy_n(source.data(), some * width_, into);
      else if (some == 1)
        products<1, LANES / 2>(source.data(), into);
      else
        products<TOGETHER, 4>(source.data(), into);
      for (int64_t i = 0; bias_ && i < some * width_; ++i) into[i] += bias_[i % width_];
      count -= some, x += some * hidden_, into += some * width_;
    }
  }

 private:
  template <int TOKENS, int ROWS>
  void products(const float* source, float* into) const {
    const auto all = [&](auto* weight) {
      int64_t row = 0;
      for (; row + ROWS <= width_; row += ROWS) dots<TOKENS, ROWS>(weight, source, row, into);
      for (; row < width_; ++row) dots<TOKENS, 1>(weight, source, row, into);
    };
    kind_ == Kind::BFLOAT16 ? all((const BFloat16*)weight_) : all((const float*)weight_);
  }

  template <int TOKENS, int ROWS, class T>
  void dots(const T* weight, const float* source, int64_t first, float* into) const {
    const T* from = weight + first * hidden_;
    Floats sums[ROWS][TOKENS] = {};
    int64_t i = 0;
    for (; i + LANES <= hidden_; i += LANES)
      unrolled<ROWS>([&](auto row) {  // a processor fetches several streams in the time of one
        const Floats numbers = load(from + row * hidden_ + i);
        unrolled<TOKENS>([&](auto token) {
          sums[row][token] = fused(numbers, load(source + token * hidden_ + i), sums[row][token]);
        });
      });
    unrolled<ROWS>([&](auto row) {
      unrolled<TOKENS>([&](auto token) {
        float sum = total(sums[row][token]);
        for (int64_t rest = i; rest < hidden_; ++rest)
          sum += number(from[row * hidden_ + rest]) * source[token * hidden_ + rest];
        into[token * width_ + first + row] = sum;
      });
    });
  }

  const void* weight_ = nullptr;
  Kind kind_ = Kind::FLOAT32;
  const float* bias_ = nullptr;
  int64_t width_ = 0, hidden_ = 0;
};

// Values as they are stored: see `ValueTable`. Experts are null where each row has a number of every expert.
struct Values {
  const void* codes;
  Kind kind;
  const void* experts;
  bool wide;  // experts of two bytes
  const Half* rest;
  const float *step, *offset;
  int64_t stored, num_experts;

  // (E,) sum of w_i v_i over `count` neighbours, whose weights sum to 1.
  void recall(const int64_t* rows, const float* weights, int64_t count, float* into) const {
    std::fill(into, into + num_experts, 0.0f);
    typed(codes, kind, [&](auto* all) {
      for (int64_t i = 0; i < count; ++i) fetch_row(all, rows[i]);
      for (int64_t i = 0; i < count; ++i) add(all, rows[i], weights[i], into);
    });
    float others = 0;
    for (int64_t i = 0; rest && i < count; ++i) others += weights[i] * number(rest[rows[i]]);
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      if (!experts && step) into[expert] = into[expert] * step[expert] + offset[expert];
      into[expert] += others;
    }
  }

 private:
  template <class T>
  void fetch_row(const T* all, int64_t row) const {
    fetch(all + row * stored, stored * sizeof(T));
    if (experts) fetch((const uint8_t*)experts + (row * stored << wide), stored << wide);
    if (rest) fetch(rest + row, sizeof *rest);
  }

  template <class T>
  void add(const T* all, int64_t row, float weight, float* into) const {
    const T* numbers = all + row * stored;
    for (int64_t i = 0; i < stored; ++i) {
      if (!experts) {
        into[i] += weight * number(numbers[i]);
        continue;
      }
      const int64_t place = row * stored + i;
      const int64_t expert = wide ? ((const int16_t*)experts)[place] : ((const uint8_t*)experts)[place];
      if (uint64_t(expert) >= uint64_t(num_experts)) throw std::out_of_range("there is no such expert");
      into[expert] += weight * (step ? number(numbers[i]) * *step + *offset : number(numbers[i]));
    }
  }
};

// Softmax of -distance / unit, nearest first.
inline void neighbor_weights(const float* distances, int64_t count, double unit, float* into) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += into[i] = float(std::exp((double(distances[0]) - distances[i]) / unit));
  for (int64_t i = 0; i < count; ++i) into[i] = float(into[i] / sum);
}

// Mean of exp(-falloff * distance).
inline double similarity(const float* distances, int64_t count, double falloff) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(-falloff * distances[i]);
  return sum / count;
}

// (1 - lambda) z + lambda m, or z + lambda m: see `mixing.mix_logits` and `mixing.mix_delta`.
template <class T>
inline void mix(const T* logits, const float* recalled, float lambda, bool delta, int64_t num_experts, T* into) {
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const float own = number(logits[expert]);
    round_to(own + lambda * (delta ? recalled[expert] : recalled[expert] - own), into[expert]);
  }
}

}  // namespace knnmoe
