// Keys in four bits a number, list after list: enough to tell which of some lists' keys are worth reading.
#pragma once

#include "keys.hpp"
#include "whole.hpp"

namespace knnmoe {

// Some places of a list, in the order of its rows.
struct Part {
  int64_t list, first, last;
};

// What a code stands for, less 8 and times its list's unit, is how far a key is from the list's centroid.
class Sketch {
 public:
  static constexpr int64_t BLOCK = 16;  // keys side by side

  // What it takes to compare a query with some parts.
  struct Room {
    std::vector<float> apart;    // from a centroid
    std::vector<int16_t> whole;  // the same
    std::vector<float> scores;   // of blocks' places, FAR where they are of no part
    std::vector<int64_t> first;  // place of each block
  };

  // codes (places / BLOCK, dimensions / 2, BLOCK), the even dimension in the lower bits, units (lists,), or null.
  Sketch(const uint8_t* codes, const float* units, int64_t width)
      : codes_(codes), units_(units), width_(width), pairs_((width + 1) / 2) {}

  explicit operator bool() const { return codes_; }

  // Asks for a part's codes, and gives their bytes.
  int64_t fetch(const Part& part) const {
    const int64_t first = part.first / BLOCK, blocks = (part.last - 1) / BLOCK - first + 1;
    knnmoe::fetch(codes_ + first * pairs_ * BLOCK, blocks * pairs_ * BLOCK);
    return blocks * pairs_ * BLOCK;
  }

  // Calls `use` with the places of at least `wanted` keys of these parts (or of all): those that are about the nearest
  // to a query (c,), and those that are as near. Lists' centroids are int8 in steps.
  template <class Use>
  void choose(const float* query, const int8_t* centroids, const float* step, const std::vector<Part>& parts,
              int64_t wanted, Room& room, Use use) const {
    room.scores.clear(), room.first.clear();
    for (const Part& part : parts) score_part(query, centroids + part.list * width_, step, part, room);
    const float bound = bound_of(room.scores, wanted);
    for (size_t block = 0; block < room.first.size(); ++block)
      for (int64_t i = 0; i < BLOCK; i += LANES)
        for (unsigned near = bits(load(&room.scores[block * BLOCK + i]) <= bound); near; near &= near - 1)
          use(room.first[block] + i + __builtin_ctz(near));
  }

 private:
  static constexpr int64_t EXTRA = 8;  // one in so many more than wanted may be chosen, which saves halving on
  static constexpr int STEPS = 24;     // after which scores of one size are told apart

  // A bound that at least `wanted` scores keep (or all of a key), and where none are equal hardly more.
  static float bound_of(const std::vector<float>& scores, int64_t wanted) {
    Floats lowest = Floats{} + LAST, highest = -lowest;
    for (size_t i = 0; i < scores.size(); i += LANES) {
      const Floats some = load(&scores[i]);
      lowest = lesser(lowest, some);
      highest = some < LAST && highest < some ? some : highest;
    }
    float low = least(lowest), high = -least(-highest);
    if (count_of_at_most(high, scores.data(), scores.size()) < wanted) return LAST;
    for (int step = 0; step < STEPS; ++step) {
      const float middle = low / 2 + high / 2;
      const int64_t found = count_of_at_most(middle, scores.data(), scores.size());
      (found < wanted ? low : high) = middle;
      if (found >= wanted && found <= wanted + wanted / EXTRA) break;
    }
    return high;
  }

  void score_part(const float* query, const int8_t* centroid, const float* step, const Part& part, Room& room) const {
    room.apart.assign(padded(width_), 0), room.whole.resize(padded(width_));
    for (int64_t i = 0; i < width_; ++i) room.apart[i] = query[i] - float(centroid[i]) * step[i];
    const float query_unit = to_whole(room.apart.data(), padded(width_), most_whole(8, width_), room.whole.data());
    const float unit = units_[part.list], start = square(room.apart.data(), padded(width_));
    const int64_t first = part.first / BLOCK * BLOCK;
    size_t place = room.scores.size();
    room.scores.resize(place + (part.last - first + BLOCK - 1) / BLOCK * BLOCK);
    for (int64_t block = first; block < part.last; block += BLOCK, place += BLOCK) {
      float* scores = &room.scores[place];
      score(block / BLOCK, room.whole.data(), unit * unit, 2 * unit * query_unit, start, scores);
      std::fill(scores, scores + std::max<int64_t>(0, part.first - block), FAR);
      std::fill(scores + std::min(BLOCK, part.last - block), scores + BLOCK, FAR);
      room.first.push_back(block);
    }
  }

  // |numbers|^2, added up in the same order, and rounded alike, in every build.
  static float square(const float* numbers, int64_t count) {
    float sums[PADDED] = {};
    for (int64_t i = 0; i < count; i += PADDED)
      for (int64_t lane = 0; lane < PADDED; lane += LANES) {
        const Floats some = load(numbers + i + lane);
        store(sums + lane, load(sums + lane) + some * some);
      }
    for (int64_t half = PADDED / 2; half; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
  }

  // |apart - unit * code|^2 = |apart|^2 - 2 unit apart . code + unit^2 |code|^2 of a block's keys.
  void score(int64_t block, const int16_t* whole, float squared, float doubled, float start, float* into) const {
    constexpr int PARTS = BLOCK / LANES;
    const uint8_t* codes = codes_ + block * pairs_ * BLOCK;
    Ints products[PARTS] = {}, squares[PARTS] = {};
    for (int64_t pair = 0; pair < pairs_; ++pair, codes += BLOCK) {
      int32_t both;
      std::memcpy(&both, whole + 2 * pair, sizeof both);
      unrolled<PARTS>([&](auto part) {
        const Pairs numbers = load_nibbles(codes + part * LANES);
        products[part] = dotted(numbers, both, products[part]);
        squares[part] = dotted(numbers, numbers, squares[part]);
      });
    }
    unrolled<PARTS>([&](auto part) {
      const Floats own = squared * __builtin_convertvector(squares[part], Floats);
      const Floats score = start + own - doubled * __builtin_convertvector(products[part], Floats);
      store(into + part * LANES, lesser(Floats{} + LAST, score));
    });
  }

  const uint8_t* codes_;
  const float* units_;
  int64_t width_, pairs_;
};

}  // namespace knnmoe
