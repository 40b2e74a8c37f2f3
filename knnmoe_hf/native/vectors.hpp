// Numbers as memories store them, read as vectors of floats: as wide as the processor that this is compiled for has.
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

inline float number(float value) { return value; }
inline float number(int8_t value) { return value; }
inline float number(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float read;
  std::memcpy(&read, &bits, sizeof read);
  return read;
}
inline float number(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, digits = value.bits & 0x3ff;
  uint32_t exponent = (value.bits >> 10) & 0x1f, bits;
  if (exponent == 0) {  // next to zero there is no leading digit
    const float small = digits * 0x1p-24f;
    return sign ? -small : small;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | digits << 13;
  float read;
  std::memcpy(&read, &bits, sizeof read);
  return read;
}

// Rounds to the nearest, to even where two are as near.
inline void round_to(float value, float& into) { into = value; }
inline void round_to(float value, BFloat16& into) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  into.bits = value == value ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
inline void round_to(float value, Half& into) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) {
    into.bits = 0x7e00;
  } else if (size >= 0x477ff000) {  // beyond the largest
    into.bits = uint16_t(sign | 0x7c00);
  } else if (size < 0x38800000) {  // next to zero: the sum leaves as many digits as there are
    float read, shift = 0.5f;
    std::memcpy(&read, &size, sizeof read);
    read += shift;
    uint32_t sum;
    std::memcpy(&sum, &read, sizeof sum);
    into.bits = uint16_t(sign | (sum - 0x3f000000));
  } else {
    into.bits = uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
  }
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));

template <class T>
inline Floats load(const T* from) {
  Floats read;
  for (int lane = 0; lane < LANES; ++lane) read[lane] = number(from[lane]);
  return read;
}
template <>
inline Floats load(const float* from) {
  Floats read;
  std::memcpy(&read, from, sizeof read);
  return read;
}

// Compilers take the general form apart number by number, which costs eight times as much.
#if defined(__AVX512F__)
template <>
inline Floats load(const int8_t* from) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
template <>
inline Floats load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
template <>
inline Floats load(const Half* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
#elif defined(__AVX2__)
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

// a * b + c, rounded once where there is an instruction for it. A compiler that may choose chooses by what stands
// around it, and a query would not get the same alone and among others (-ffp-contract=off in setup.py).
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Whole numbers, one in each lane, shorter ones, and pairs of these.
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int16_t Pairs __attribute__((vector_size(4 * LANES)));

inline Pairs load_pairs(const int8_t* from) {
#if defined(__AVX512BW__)
  return (Pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  Pairs read;
  for (int i = 0; i < 2 * LANES; ++i) read[i] = from[i];
  return read;
#endif
}

// Pairs of the lower and the higher four bits of each byte, less 8.
inline Pairs load_nibbles(const uint8_t* from) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  const __m512i apart = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
  return (Pairs)_mm512_sub_epi16(_mm512_and_si512(apart, _mm512_set1_epi16(15)), _mm512_set1_epi16(8));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  const __m256i apart = _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12));
  return (Pairs)_mm256_sub_epi16(_mm256_and_si256(apart, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
#else
  Pairs read;
  for (int lane = 0; lane < LANES; ++lane)
    read[2 * lane] = (from[lane] & 15) - 8, read[2 * lane + 1] = (from[lane] >> 4) - 8;
  return read;
#endif
}

// sums, and in each lane the products of the numbers of two pairs.
inline Ints dotted(Pairs numbers, Pairs others, Ints sums) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)numbers, (__m512i)others);
#elif defined(__AVX512BW__)
  return sums + (Ints)_mm512_madd_epi16((__m512i)numbers, (__m512i)others);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)numbers, (__m256i)others);
#else
  for (int lane = 0; lane < LANES; ++lane)
    sums[lane] += numbers[2 * lane] * others[2 * lane] + numbers[2 * lane + 1] * others[2 * lane + 1];
  return sums;
#endif
}
// The same, with the same pair in each lane.
inline Ints dotted(Pairs numbers, int32_t pair, Ints sums) { return dotted(numbers, (Pairs)(Ints{} + pair), sums); }

// Calls `use` with the constants 0 to N - 1. A compiler keeps sums in registers whose places it knows from the start;
// what a loop counts it knows too late.
template <class Use, int... I>
[[gnu::always_inline]] inline void unrolled(Use use, std::integer_sequence<int, I...>) {
  (use(std::integral_constant<int, I>()), ...);
}
template <int N, class Use>
[[gnu::always_inline]] inline void unrolled(Use use) {
  unrolled(use, std::make_integer_sequence<int, N>());
}

// The sum of a vector's numbers, and the least of them.
#if defined(__AVX512F__)
inline float total(Floats values) { return _mm512_reduce_add_ps((__m512)values); }
inline float least(Floats values) { return _mm512_reduce_min_ps((__m512)values); }
#else
template <class Merge>
inline float folded(Floats values, Merge merge) {
  float lanes[LANES];
  store(lanes, values);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + half]);
  return lanes[0];
}
inline float total(Floats values) {
  return folded(values, [](float one, float other) { return one + other; });
}
inline float least(Floats values) {
  return folded(values, [](float one, float other) { return other < one ? other : one; });
}
#endif
// `one` also where `other` is no number.
inline Floats lesser(Floats one, Floats other) { return other < one ? other : one; }

// Bit by bit, in which lanes a comparison holds.
inline unsigned bits(Ints holds) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps((__m256)holds));
#else
  unsigned found = 0;
  for (int lane = 0; lane < LANES; ++lane) found |= unsigned(holds[lane] & 1) << lane;
  return found;
#endif
}

// The first place of a number that is one of `count`, a multiple of LANES.
inline int64_t place_of(float number, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES)
    if (const unsigned equal = bits(load(from + i) == number)) return i + __builtin_ctz(equal);
  return 0;
}

// How many of `count` numbers, a multiple of LANES, are at most this one.
inline int64_t count_of_at_most(float most, const float* from, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += LANES) found += __builtin_popcount(bits(load(from + i) <= most));
  return found;
}

}  // namespace knnmoe
