// The normaliser of a distribution over the vocabulary.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.hpp"

namespace knnmoe {

// exp(x), relative error below 3e-7; exp(+-87) beyond these bounds; NaN for NaN.
inline Floats exponential(Floats x) {
  constexpr float BOUND = 87, ROUND = 0x1.8p23f;  // adding ROUND leaves the nearest integer in the lowest bits
  x = x < -BOUND ? Floats{} - BOUND : x;
  x = x > BOUND ? Floats{} + BOUND : x;
  const Floats shifted = multiply_add(x, Floats{} + 0x1.715476p+0f, Floats{} + ROUND);
  const Floats whole = shifted - ROUND;
  // x = whole ln 2 + rest, |rest| <= ln 2 / 2; ln 2 in two parts, of which whole times the first is exact
  const Floats rest = multiply_add(whole, Floats{} + 0x1.05c610p-29f, multiply_add(whole, Floats{} - 0x1.62e430p-1f, x));
  Floats power = Floats{} + 0x1p0f / 720;  // Taylor's series
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    power = multiply_add(power, rest, Floats{} + factor);
  return power * (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

// From outputs to logits: see `knnmoe_hf.lookup.logits.LogitsTransform`; no cap is 0.
struct LogitsTransform {
  float factor, cap;

  Floats operator()(Floats x) const {
    x = x * factor;
    if (cap == 0) return x;
    return cap - 2 * cap / (exponential(x * (2 / cap)) + 1);  // cap * tanh(x / cap)
  }
  float operator()(float x) const { return cap == 0 ? x * factor : cap * std::tanh(x * factor / cap); }

  float inverse(float logit) const {
    constexpr float BELOW_ONE = 1 - 0x1p-24f;
    if (cap == 0) return logit / factor;
    return cap * std::atanh(std::min(std::max(logit / cap, -BELOW_ONE), BELOW_ONE)) / factor;  // NaN stays NaN
  }
};

// log sum exp of `width` outputs as logits, in an order that depends on the width alone; NaN if one of them is.
template <class T>
float log_total(const T* outputs, int64_t width, LogitsTransform transform) {
  constexpr int AT_ONCE = 4;  // sums that do not wait for each other
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  const int64_t whole = width - width % (AT_ONCE * LANES);
  T last[AT_ONCE * LANES];  // the rest of the outputs, and the first of them again: these are left out of the sum
  for (int64_t i = 0; i < AT_ONCE * LANES; ++i) last[i] = outputs[whole + i < width ? whole + i : 0];

  Floats most[AT_ONCE];
  unrolled<AT_ONCE>([&](auto part) { most[part] = Floats{} + NONE; });
  const auto compare = [&](const T* from) {
    unrolled<AT_ONCE>([&](auto part) {
      const Floats values = load(from + part * LANES);
      most[part] = values > most[part] ? values : most[part];
    });
  };
  for (int64_t i = 0; i < whole; i += AT_ONCE * LANES) compare(outputs + i);
  compare(last);
  unrolled<AT_ONCE>([&](auto part) { most[0] = most[part] > most[0] ? most[part] : most[0]; });
  const float largest = -minimum(-most[0]);
  const Floats nearest = transform(Floats{} + largest);
  if (std::isinf(nearest[0])) {
    const T* nan = std::find_if(outputs, outputs + width, [](T x) { return std::isnan(to_float(x)); });
    return nan == outputs + width ? nearest[0] : to_float(*nan);
  }

  Floats sums[AT_ONCE] = {};
  for (int64_t i = 0; i < whole; i += AT_ONCE * LANES)
    unrolled<AT_ONCE>([&](auto part) { sums[part] += exponential(transform(load(outputs + i + part * LANES)) - nearest); });
  float total = 0;
  unrolled<AT_ONCE>([&](auto part) { total += sum(sums[part]); });
  for (int64_t i = 0; whole + i < width; i += LANES) {
    const Floats rest = exponential(transform(load(last + i)) - nearest);
    for (int64_t lane = 0; lane < LANES && whole + i + lane < width; ++lane) total += rest[lane];
  }
  return nearest[0] + std::log(total);
}

}  // namespace knnmoe
