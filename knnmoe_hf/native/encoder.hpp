// From gate inputs to queries.
#pragma once

#include "keys.hpp"

namespace knnmoe {

// W x + b, W (width, hidden) being float32 or bfloat16; x + b where W is null.
class Encoder {
 public:
  static constexpr int BATCH = LANES / 4;  // tokens for which a row of W is read once

  Encoder(const void* weight, Kind kind, const float* bias, int64_t width, int64_t hidden)
      : weight_(weight), kind_(kind), bias_(bias), width_(width), hidden_(hidden) {}

  // Queries (count, width) of x (count, hidden); `floats` is scratch. Each row is the same in a batch of any size.
  template <class T>
  void encode(const T* x, int64_t count, std::vector<float>& floats, float* queries) const {
    floats.resize(BATCH * hidden_);
    while (count > 0) {
      const int tokens = count >= BATCH ? BATCH : 1;
      for (int64_t i = 0; i < tokens * hidden_; ++i) floats[i] = to_float(x[i]);
      if (!weight_)
        std::copy_n(floats.data(), tokens * width_, queries);
      else if (tokens == 1)
        multiply<1, LANES / 2>(floats.data(), queries);
      else
        multiply<BATCH, 4>(floats.data(), queries);
      for (int64_t i = 0; bias_ && i < tokens * width_; ++i) queries[i] += bias_[i % width_];
      count -= tokens, x += tokens * hidden_, queries += tokens * width_;
    }
  }

 private:
  template <int TOKENS, int ROWS>
  void multiply(const float* x, float* queries) const {
    const auto all_rows = [&](auto* weight) {
      int64_t row = 0;
      for (; row + ROWS <= width_; row += ROWS) dot<TOKENS, ROWS>(weight, x, row, queries);
      for (; row < width_; ++row) dot<TOKENS, 1>(weight, x, row, queries);
    };
    kind_ == Kind::BFLOAT16 ? all_rows((const BFloat16*)weight_) : all_rows((const float*)weight_);
  }

  template <int TOKENS, int ROWS, class T>
  void dot(const T* weight, const float* x, int64_t first, float* queries) const {
    const T* rows = weight + first * hidden_;
    Floats sums[ROWS][TOKENS] = {};
    int64_t i = 0;
    for (; i + LANES <= hidden_; i += LANES)
      unrolled<ROWS>([&](auto row) {  // several rows at once: memory is read in several streams
        const Floats values = load(rows + row * hidden_ + i);
        unrolled<TOKENS>([&](auto token) {
          sums[row][token] = multiply_add(values, load(x + token * hidden_ + i), sums[row][token]);
        });
      });
    unrolled<ROWS>([&](auto row) {
      unrolled<TOKENS>([&](auto token) {
        float total = sum(sums[row][token]);
        for (int64_t rest = i; rest < hidden_; ++rest)
          total += to_float(rows[row * hidden_ + rest]) * x[token * hidden_ + rest];
        queries[token * width_ + first + row] = total;
      });
    });
  }

  const void* weight_;
  Kind kind_;
  const float* bias_;
  int64_t width_, hidden_;
};

}  // namespace knnmoe
