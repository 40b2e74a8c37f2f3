// Numbers in the dtypes that memories store, read as SIMD vectors of floats. LANES is set by the target of the build.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace knnmoe {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, mantissa = value.bits & 0x3ff;
  const uint32_t exponent = (value.bits >> 10) & 0x1f;
  if (exponent == 0) {  // zero or subnormal
    const float subnormal = mantissa * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// A float in another dtype, rounded to the nearest, ties to even.
template <class T>
inline T to(float value);
template <>
inline float to(float value) { return value; }
template <>
inline BFloat16 to(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half to(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (value != value) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more
  if (bits < 0x38800000) {  // subnormal: the sum with 0.5 has the same unit in its last place
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13))};
}

#if defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));

template <class T>
inline Floats load(const T* from) {
  Floats values;
  for (int lane = 0; lane < LANES; ++lane) values[lane] = to_float(from[lane]);
  return values;
}
template <>
inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// Compilers turn the general form above into one conversion per number, which takes eight times as long.
#if defined(__AVX2__)
template <>
inline Floats load(const int8_t* from) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
template <>
inline Floats load(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return (Floats)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
template <>
inline Floats load(const Half* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
#endif

inline void store(float* into, Floats values) { std::memcpy(into, &values, sizeof values); }

// a * b + c, in one rounding where the target has FMA. The compiler must not choose by itself (-ffp-contract=off in
// setup.py): it would choose differently in different loops, and a query alone would differ from the same query in a
// batch.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// int32 per lane, int16 per lane, and two int16 per lane.
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int16_t ShortPairs __attribute__((vector_size(4 * LANES)));

inline ShortPairs load_pairs(const int8_t* from) {
#if defined(__AVX2__)
  return (ShortPairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  ShortPairs values;
  for (int i = 0; i < 2 * LANES; ++i) values[i] = from[i];
  return values;
#endif
}

// In each lane the lower and the higher four bits of a byte, each minus 8.
inline ShortPairs load_nibbles(const uint8_t* from) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  const __m256i both = _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12));
  return (ShortPairs)_mm256_sub_epi16(_mm256_and_si256(both, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
#else
  ShortPairs values;
  for (int lane = 0; lane < LANES; ++lane)
    values[2 * lane] = (from[lane] & 15) - 8, values[2 * lane + 1] = (from[lane] >> 4) - 8;
  return values;
#endif
}

// sums + a.x * b.x + a.y * b.y in each lane.
inline Ints dot_pairs(ShortPairs a, ShortPairs b, Ints sums) {
#if defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  for (int lane = 0; lane < LANES; ++lane)
    sums[lane] += a[2 * lane] * b[2 * lane] + a[2 * lane + 1] * b[2 * lane + 1];
  return sums;
#endif
}
// The same, with one pair of int16 (as the bits of an int32) for all lanes.
inline Ints dot_pairs(ShortPairs a, int32_t pair, Ints sums) { return dot_pairs(a, (ShortPairs)(Ints{} + pair), sums); }

// Calls `use` with the compile-time constants 0 to N - 1: sums in an array stay in registers only if their indices are
// known to the compiler.
template <class Use, int... I>
[[gnu::always_inline]] inline void unrolled(Use use, std::integer_sequence<int, I...>) {
  (use(std::integral_constant<int, I>()), ...);
}
template <int N, class Use>
[[gnu::always_inline]] inline void unrolled(Use use) {
  unrolled(use, std::make_integer_sequence<int, N>());
}

// Combines the lanes by halves, so that the order of operations is fixed.
template <class Merge>
inline float reduce(Floats values, Merge merge) {
  float lanes[LANES];
  store(lanes, values);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + half]);
  return lanes[0];
}
inline float sum(Floats values) {
  return reduce(values, [](float a, float b) { return a + b; });
}
inline float minimum(Floats values) {
  return reduce(values, [](float a, float b) { return b < a ? b : a; });
}
// Lane by lane; `a` where `b` is NaN.
inline Floats minimum(Floats a, Floats b) { return b < a ? b : a; }

// The lanes in which a comparison holds, as bits.
inline unsigned bits(Ints holds) {
#if defined(__AVX2__)
  return unsigned(_mm256_movemask_ps((__m256)holds));
#else
  unsigned mask = 0;
  for (int lane = 0; lane < LANES; ++lane) mask |= unsigned(holds[lane] & 1) << lane;
  return mask;
#endif
}

// The first position of a value among `count` numbers, a multiple of LANES; 0 if it is not there.
inline int64_t position_of(float value, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES)
    if (const unsigned equal = bits(load(from + i) == value)) return i + __builtin_ctz(equal);
  return 0;
}

// How many of `count` numbers, a multiple of LANES, are at most `bound`.
inline int64_t count_at_most(float bound, const float* from, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += LANES) found += __builtin_popcount(bits(load(from + i) <= bound));
  return found;
}

}  // namespace knnmoe
