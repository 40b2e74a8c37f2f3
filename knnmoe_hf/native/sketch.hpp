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
    std::vector<float> scores;   // of blocks' places, infinite where they are of no part
    std::vector<int64_t> first;  // place of each block
  };

  Sketch() = default;
  // codes (places / BLOCK, dimensions / 2, BLOCK), the even dimension in the lower bits; units (lists,).
  Sketch(const uint8_t* codes, const float* units, int64_t width)
      : codes_(codes), units_(units), width_(width), pairs_((width + 1) / 2) {}

  explicit operator bool() const { return codes_; }

  void fetch(const Part& part) const {
    const int64_t first = part.first / BLOCK, blocks = (part.last - 1) / BLOCK - first + 1;
    knnmoe::fetch(codes_ + first * pairs_ * BLOCK, blocks * pairs_ * BLOCK);
  }

  // Calls `use` with the places of at least `least` keys of these parts (or of all): those that are about the nearest
  // to a query (c,), and those that are as near. Lists' centroids are int8 in steps.
  template <class Use>
  void choose(const float* query, const int8_t* centroids, const float* step, const std::vector<Part>& parts,
              int64_t least, Room& room, Use use) const {
    room.scores.clear(), room.first.clear();
    for (const Part& part : parts) score_part(query, centroids + part.list * width_, step, part, room);
    const float last = last_of(room.scores, least);
    for (size_t block = 0; block < room.first.size(); ++block)
      for (int64_t i = 0; i < BLOCK; i += LANES)
        for (unsigned near = bits(load(&room.scores[block * BLOCK + i]) <= last); near; near &= near - 1)
          use(room.first[block] + i + __builtin_ctz(near));
  }

 private:
  static constexpr float FAR = std::numeric_limits<float>::infinity(), LAST = std::numeric_limits<float>::max();

  // A number that at least so many scores, or all that are of a key, are not above, and not many more.
  static float last_of(const std::vector<float>& scores, int64_t least) {
    constexpr int STEPS = 24;  // as many as halve a float's digits
    Floats lowest = Floats{} + LAST, highest = -lowest;
    for (size_t i = 0; i < scores.size(); i += LANES) {
      const Floats some = load(&scores[i]);
      lowest = lesser(lowest, some);
      highest = some < FAR && highest < some ? some : highest;
    }
    float low = knnmoe::least(lowest), high = -knnmoe::least(-highest);
    const auto count = [&](float most) { return count_of_at_most(most, scores.data(), scores.size()); };
    for (int step = 0; step < STEPS; ++step) {
      const float middle = low / 2 + high / 2;
      const int64_t found = count(middle);
      (found < least ? low : high) = middle;
      if (found >= least && found <= least + least / WIDER) break;
    }
    return high;
  }

  void score_part(const float* query, const int8_t* centroid, const float* step, const Part& part, Room& room) const {
    room.apart.assign(padded(width_), 0), room.whole.resize(padded(width_) + 1);
    for (int64_t i = 0; i < width_; ++i) room.apart[i] = query[i] - float(centroid[i]) * step[i];
    const float whole = to_whole(room.apart.data(), padded(width_), most_whole(8, width_), room.whole.data());
    const float unit = units_[part.list], start = square(room.apart);
    for (int64_t place = part.first / BLOCK * BLOCK; place < part.last; place += BLOCK) {
      room.first.push_back(place);
      room.scores.resize(room.scores.size() + BLOCK);
      float* scores = &room.scores[room.scores.size() - BLOCK];
      score(place / BLOCK, room.whole.data(), unit * unit, 2 * unit * whole, start, scores);
      std::fill(scores, scores + std::max<int64_t>(0, part.first - place), FAR);
      std::fill(scores + std::min(BLOCK, part.last - place), scores + BLOCK, FAR);
    }
  }

  static float square(const std::vector<float>& numbers) {
    Floats sums = {};
    for (size_t i = 0; i < numbers.size(); i += LANES) {
      const Floats some = load(numbers.data() + i);
      sums = fused(some, some, sums);
    }
    return total(sums);
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

  static constexpr int64_t WIDER = 4;  // a part of those wanted, that many more may be chosen

  const uint8_t* codes_ = nullptr;
  const float* units_ = nullptr;
  int64_t width_ = 0, pairs_ = 0;
};

}  // namespace knnmoe
