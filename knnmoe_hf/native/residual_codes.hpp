// Keys as 4-bit residuals from their list's centroid, stored in the order of the lists: the codes of a list are read
// sequentially to find which of its keys deserve a random read and an exact distance.
#pragma once

#include "integers.hpp"
#include "keys.hpp"

namespace knnmoe {

// Positions [first, last) in the order of the lists, all of one list.
struct ListPart {
  int64_t list, first, last;
};

// A key is about centroid + unit * (code - 8), with one unit for each list.
class ResidualCodes {
 public:
  static constexpr int64_t BLOCK = 16;  // keys side by side

  struct Scratch {
    std::vector<float> difference;   // query - centroid
    std::vector<int16_t> quantized;  // the same in integers
    std::vector<float> scores;       // of whole blocks; INF for positions outside the parts
    std::vector<int64_t> first;      // position of each block's first key
  };

  // codes (positions / BLOCK, dimensions / 2, BLOCK), even dimensions in the lower bits, and units (lists,); both null
  // where there are no residual codes.
  ResidualCodes(const uint8_t* codes, const float* units, int64_t width)
      : codes_(codes), units_(units), width_(width), pairs_((width + 1) / 2) {}

  explicit operator bool() const { return codes_; }

  // Prefetches the codes of a part and returns their bytes.
  int64_t prefetch_part(const ListPart& part) const {
    const int64_t first = part.first / BLOCK, blocks = (part.last - 1) / BLOCK - first + 1;
    prefetch(codes_ + first * pairs_ * BLOCK, blocks * pairs_ * BLOCK);
    return blocks * pairs_ * BLOCK;
  }

  // Calls `use` with the positions of at least `count` keys of these parts (or of all keys if there are fewer): those
  // with the least approximate distances to a query (width,), including all that are as near as the last of them.
  // Centroids are int8 in steps.
  template <class Use>
  void nearest(const float* query, const int8_t* centroids, const float* step, const std::vector<ListPart>& parts,
               int64_t count, Scratch& scratch, Use use) const {
    scratch.scores.clear(), scratch.first.clear();
    for (const ListPart& part : parts) score_part(query, centroids + part.list * width_, step, part, scratch);
    const float bound = bound_for(scratch.scores, count);
    for (size_t block = 0; block < scratch.first.size(); ++block)
      for (int64_t i = 0; i < BLOCK; i += LANES)
        for (unsigned near = bits(load(&scratch.scores[block * BLOCK + i]) <= bound); near; near &= near - 1)
          use(scratch.first[block] + i + __builtin_ctz(near));
  }

 private:
  static constexpr int64_t TOLERANCE = 8;  // one in so many more than `count` may be used, which saves bisections
  static constexpr int BISECTIONS = 24;    // enough to tell scores of one magnitude apart

  // By bisection, a bound that at least `count` scores keep (or all), and unless many are equal hardly more.
  static float bound_for(const std::vector<float>& scores, int64_t count) {
    Floats lowest = Floats{} + LARGEST, highest = -lowest;
    for (size_t i = 0; i < scores.size(); i += LANES) {
      const Floats some = load(&scores[i]);
      lowest = minimum(lowest, some);
      highest = some < LARGEST && highest < some ? some : highest;
    }
    float low = minimum(lowest), high = -minimum(-highest);
    if (count_at_most(high, scores.data(), scores.size()) < count) return LARGEST;
    for (int round = 0; round < BISECTIONS; ++round) {
      const float middle = low / 2 + high / 2;
      const int64_t found = count_at_most(middle, scores.data(), scores.size());
      (found < count ? low : high) = middle;
      if (found >= count && found <= count + count / TOLERANCE) break;
    }
    return high;
  }

  void score_part(const float* query, const int8_t* centroid, const float* step, const ListPart& part,
                  Scratch& scratch) const {
    std::vector<float>& difference = scratch.difference;
    difference.assign(padded(width_), 0), scratch.quantized.resize(padded(width_));
    for (int64_t i = 0; i < width_; ++i) difference[i] = query[i] - float(centroid[i]) * step[i];
    const float query_step =
        quantize(difference.data(), padded(width_), max_integer(8, width_), scratch.quantized.data());
    const float unit = units_[part.list], norm = squared_norm(difference.data(), padded(width_));
    const int64_t first = part.first / BLOCK * BLOCK;
    size_t position = scratch.scores.size();
    scratch.scores.resize(position + (part.last - first + BLOCK - 1) / BLOCK * BLOCK);
    for (int64_t block = first; block < part.last; block += BLOCK, position += BLOCK) {
      float* scores = &scratch.scores[position];
      score_block(block / BLOCK, scratch.quantized.data(), unit * unit, 2 * unit * query_step, norm, scores);
      std::fill(scores, scores + std::max<int64_t>(0, part.first - block), INF);
      std::fill(scores + std::min(BLOCK, part.last - block), scores + BLOCK, INF);
      scratch.first.push_back(block);
    }
  }

  // Added in the same order and with the same roundings in every build.
  static float squared_norm(const float* values, int64_t count) {
    float sums[PADDING] = {};
    for (int64_t i = 0; i < count; i += PADDING)
      for (int64_t lane = 0; lane < PADDING; lane += LANES) {
        const Floats some = load(values + i + lane);
        store(sums + lane, load(sums + lane) + some * some);
      }
    for (int64_t half = PADDING / 2; half; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
  }

  // |difference - unit * code|^2 = |difference|^2 - 2 unit difference . code + unit^2 |code|^2 for a block of keys.
  void score_block(int64_t block, const int16_t* quantized, float squared_unit, float doubled_unit, float norm,
                   float* into) const {
    constexpr int VECTORS = BLOCK / LANES;
    const uint8_t* codes = codes_ + block * pairs_ * BLOCK;
    Ints products[VECTORS] = {}, squares[VECTORS] = {};
    for (int64_t pair = 0; pair < pairs_; ++pair, codes += BLOCK) {
      int32_t query_pair;
      std::memcpy(&query_pair, quantized + 2 * pair, sizeof query_pair);
      unrolled<VECTORS>([&](auto vector) {
        const ShortPairs values = load_nibbles(codes + vector * LANES);
        products[vector] = dot_pairs(values, query_pair, products[vector]);
        squares[vector] = dot_pairs(values, values, squares[vector]);
      });
    }
    unrolled<VECTORS>([&](auto vector) {
      const Floats code_norm = squared_unit * __builtin_convertvector(squares[vector], Floats);
      const Floats score = norm + code_norm - doubled_unit * __builtin_convertvector(products[vector], Floats);
      store(into + vector * LANES, minimum(Floats{} + LARGEST, score));
    });
  }

  const uint8_t* codes_;
  const float* units_;
  int64_t width_, pairs_;
};

}  // namespace knnmoe
