// Lists of near keys: those that a query is to be compared with are in the lists whose centroids are nearest to it.
#pragma once

#include "keys.hpp"

namespace knnmoe {

// Places from the least score on, of which few are ever asked for: a column of sixteen blocks plays for each place in
// the final, as the least of columns are found a vector at a time.
class Order {
 public:
  static constexpr int64_t BLOCK = 16;  // scores that are set at once
  static constexpr float FAR = std::numeric_limits<float>::infinity();

  void resize(int64_t blocks) {
    const int64_t heats = (blocks + HEAT - 1) / HEAT;
    scores_.resize(heats * HEAT * BLOCK);
    std::fill(scores_.begin() + blocks * BLOCK, scores_.end(), FAR);
    final_.resize(heats * BLOCK);
  }
  // The scores of a block are set from here on, and then `begin`.
  float* scores(int64_t block) { return scores_.data() + block * BLOCK; }
  void begin() {
    for (size_t place = 0; place < final_.size(); place += LANES) {
      const float* column = first_of(place);
      Floats found = load(column);
      for (int64_t block = 1; block < HEAT; ++block) found = lesser(found, load(column + block * BLOCK));
      store(final_.data() + place, found);
    }
  }
  int64_t next() {
    Floats found = load(final_.data());
    for (size_t i = LANES; i < final_.size(); i += LANES) found = lesser(found, load(final_.data() + i));
    const float score = least(found);
    const int64_t place = place_of(score, final_.data(), final_.size());
    float* column = first_of(place);
    float* winner = column;
    while (*winner != score) winner += BLOCK;
    *winner = FAR;
    final_[place] = column[0];
    for (int64_t block = 1; block < HEAT; ++block) final_[place] = std::min(final_[place], column[block * BLOCK]);
    return winner - scores_.data();
  }

 private:
  static constexpr int64_t HEAT = 16;  // blocks

  float* first_of(int64_t place) { return scores_.data() + place / BLOCK * HEAT * BLOCK + place % BLOCK; }

  std::vector<float> scores_, final_;
};

// Queries' numbers as whole numbers of 16 bits, two dimensions side by side: sums of their products with codes are the
// same in any order and in every build, and take half the instructions of floats, or a quarter.
struct WholeQueries {
  std::vector<int32_t> pairs;  // (dimensions / 2, queries)
  std::vector<float> units;    // what 1 stands for; 0 where a query has no number, or none but 0

  // Of queries (count, width) from a mean (width,), times a step (width,).
  void set(const float* queries, const float* mean, const float* step, int count, int64_t width) {
    const int64_t both = (width + 1) / 2;
    const float most = float(std::min(32767.0, 2147483647.0 / (256.0 * both)));  // so that no sum is too large
    pairs.resize(both * count), units.resize(count), scaled_.assign(2 * both, 0);
    for (int query = 0; query < count; ++query, queries += width) {
      float largest = 0;
      for (int64_t i = 0; i < width; ++i) {
        scaled_[i] = (queries[i] - mean[i]) * step[i];
        largest = std::abs(scaled_[i]) <= largest ? largest : std::abs(scaled_[i]);  // also what is no number
      }
      const float unit = largest / most;
      units[query] = std::isnormal(unit) ? unit : 0;
      for (int64_t pair = 0; pair < both; ++pair)
        pairs[pair * count + query] = whole(2 * pair, units[query]) | whole(2 * pair + 1, units[query]) << 16;
    }
  }

 private:
  uint32_t whole(int64_t place, float unit) const {
    return unit > 0 ? uint16_t(int16_t(std::lrint(scaled_[place] / unit))) : 0;
  }

  std::vector<float> scaled_;
};

// Lists' centroids side by side, so that a vector holds numbers of each, and a single query reads one after the other.
class Centroids {
 public:
  static constexpr int TOGETHER = LANES / 2;  // queries for which a vector of centroids is read once

  // codes (lists, width) int8 in steps (width,).
  Centroids(const int8_t* codes, const float* step, int64_t lists, int64_t width)
      : step_(step), width_(width), blocks_((lists + BLOCK * MOST - 1) / (BLOCK * MOST) * MOST), mean_(width) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (int64_t list = 0; list < lists; ++list) sum += codes[list * width + i];
      mean_[i] = float(sum / lists * step[i]);
    }
    table_.assign(blocks_ * BLOCK * pairs() * 2, 0);
    starts_.assign(blocks_ * BLOCK, Order::FAR);
    for (int64_t list = 0; list < lists; ++list, codes += width) {
      double start = 0;
      for (int64_t i = 0; i < width; ++i) {
        table_[place(list / BLOCK, i / 2) + list % BLOCK * 2 + i % 2] = codes[i];
        const double number = double(codes[i]) * step[i];
        start += number * (number / 2 - mean_[i]);
      }
      starts_[list] = float(std::clamp(start, -double(LAST), double(LAST)));
    }
  }

  // Orders the lists for each of some queries. |centroid|^2 / 2 - query . centroid orders them as distances do; with
  // query - mean and a start of |centroid|^2 / 2 - mean . centroid it is the same, and what is far from zero in all of
  // them takes no digits from the rest.
  void compare(const float* queries, int count, WholeQueries& whole, Order* orders) const {
    if (count == TOGETHER) return compare<TOGETHER>(queries, whole, orders);
    for (int query = 0; query < count; ++query) compare<1>(queries + query * width_, whole, orders + query);
  }

  int64_t bytes() const { return table_.size() + sizeof(float) * (starts_.size() + mean_.size()); }

 private:
  static constexpr int64_t BLOCK = Order::BLOCK;
  static constexpr int MOST = LANES / 2;  // blocks at once, which a single query needs not to wait for sums
  static constexpr float LAST = std::numeric_limits<float>::max();  // of a list: places of no list come after it

  int64_t pairs() const { return (width_ + 1) / 2; }
  // Where in the table a block's numbers of two dimensions are.
  int64_t place(int64_t block, int64_t pair) const {
    return ((block / MOST * pairs() + pair) * MOST + block % MOST) * BLOCK * 2;
  }

  template <int QUERIES>
  void compare(const float* queries, WholeQueries& whole, Order* orders) const {
    constexpr int SOME = QUERIES == 1 ? MOST : LANES == 16 ? 2 : 1;  // whose sums there are registers for
    whole.set(queries, mean_.data(), step_, QUERIES, width_);
    for (int query = 0; query < QUERIES; ++query) orders[query].resize(blocks_);
    for (int64_t first = 0; first < blocks_; first += SOME) compare<QUERIES, SOME>(whole, first, orders);
    for (int query = 0; query < QUERIES; ++query) orders[query].begin();
  }

  template <int QUERIES, int SOME>
  void compare(const WholeQueries& whole, int64_t first, Order* orders) const {
    constexpr int PARTS = BLOCK / LANES;
    const int8_t* codes = table_.data() + place(first, 0);
    Ints sums[SOME * PARTS][QUERIES] = {};
    for (int64_t pair = 0; pair < pairs(); ++pair, codes += MOST * BLOCK * 2)
      unrolled<SOME * PARTS>([&](auto vector) {
        const Pairs numbers = load_pairs(codes + vector * LANES * 2);
        unrolled<QUERIES>([&](auto query) {
          sums[vector][query] = dotted(numbers, whole.pairs[pair * QUERIES + query], sums[vector][query]);
        });
      });
    const Floats far = Floats{} + Order::FAR, last = Floats{} + LAST;
    unrolled<SOME * PARTS>([&](auto vector) {
      const int64_t block = first + vector / PARTS, part = vector % PARTS * LANES;
      const Floats start = load(starts_.data() + block * BLOCK + part);
      unrolled<QUERIES>([&](auto query) {
        const Floats score = start - whole.units[query] * __builtin_convertvector(sums[vector][query], Floats);
        store(orders[query].scores(block) + part, start < far ? lesser(last, score) : far);
      });
    });
  }

  const float* step_;
  int64_t width_, blocks_;
  std::vector<int8_t> table_;  // (blocks / MOST, dimensions / 2, MOST, BLOCK, 2)
  std::vector<float> starts_, mean_;
};

// A query looks into the nearest lists until it has seen `budget` keys.
class Lists {
 public:
  static constexpr int TOGETHER = Centroids::TOGETHER;

  // What it takes to look for the neighbours of so many queries at once.
  struct Room {
    explicit Room(int queries) : orders(queries) {}
    WholeQueries whole;
    std::vector<Order> orders;
    std::vector<int32_t> rows;
  };

  int64_t budget = 1;

  // centroids (count, width) int8 in steps (width,), starts (count + 1,), rows: list after list.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, int64_t count,
        int64_t width)
      : starts_(starts), rows_(rows), width_(width), centroids_(centroids, step, count, width) {}

  // Offers each of `count` queries keys of its nearest lists, at least `least` of them if there are so many.
  void offer(const float* queries, int count, const Keys& keys, int64_t least, Room& room,
             std::vector<Nearest>& nearest) const {
    const int64_t wanted = std::min(std::max(budget, least), keys.rows);
    centroids_.compare(queries, count, room.whole, room.orders.data());
    for (int query = 0; query < count; ++query) {
      for (room.rows.clear(); int64_t(room.rows.size()) < wanted;) {
        const int64_t list = room.orders[query].next();
        const int64_t some = std::min<int64_t>(starts_[list + 1] - starts_[list], wanted - room.rows.size());
        room.rows.insert(room.rows.end(), rows_ + starts_[list], rows_ + starts_[list] + some);
      }
      keys.offer(queries + query * width_, room.rows.data(), room.rows.size(), nearest[query]);
    }
  }

  int64_t bytes() const { return centroids_.bytes(); }

 private:
  const int32_t *starts_, *rows_;
  int64_t width_;
  Centroids centroids_;
};

}  // namespace knnmoe
