// Which lists are the nearest to a query: all centroids are compared, as whole numbers.
#pragma once

#include "keys.hpp"
#include "whole.hpp"

namespace knnmoe {

// Gives lists from the nearest on. Few are asked for, so nothing is sorted: it is a knockout in three rounds, of which
// only the winner's games are played again.
class Order {
 public:
  static constexpr int64_t BLOCK = 16;  // lists that play for a place in the next round

  void resize(int64_t blocks) {
    rounds_[0].resize(blocks * BLOCK);
    for (int round = 1; round < ROUNDS; ++round) {
      blocks = (blocks + BLOCK - 1) / BLOCK;
      rounds_[round].assign(blocks * BLOCK, FAR);
    }
  }
  // The scores of a block are set from here on, and then `begin`.
  float* scores(int64_t block) { return rounds_[0].data() + block * BLOCK; }
  void begin() {
    for (int round = 1; round < ROUNDS; ++round)
      for (size_t block = 0; block < rounds_[round - 1].size() / BLOCK; ++block) play(round, block);
  }
  int64_t next() {
    const auto& final = rounds_[ROUNDS - 1];
    int64_t place = place_of_least(final.data(), final.size());
    for (int round = ROUNDS - 2; round >= 0; --round)
      place = place * BLOCK + place_of_least(rounds_[round].data() + place * BLOCK, BLOCK);
    rounds_[0][place] = FAR;
    for (int64_t round = 1, block = place / BLOCK; round < ROUNDS; ++round, block /= BLOCK) play(round, block);
    return place;
  }

 private:
  static constexpr int ROUNDS = 3;

  void play(int round, int64_t block) {
    rounds_[round][block] = least_of(rounds_[round - 1].data() + block * BLOCK, BLOCK);
  }
  static float least_of(const float* from, int64_t count) {
    Floats found = load(from);
    for (int64_t i = LANES; i < count; i += LANES) found = lesser(found, load(from + i));
    return least(found);
  }
  static int64_t place_of_least(const float* from, int64_t count) {
    return place_of(least_of(from, count), from, count);
  }

  std::vector<float> rounds_[ROUNDS];
};

// Lists' centroids side by side, so that a vector holds numbers of each, and a single query reads one after the other.
class Centroids {
 public:
  static constexpr int TOGETHER = LANES / 2;  // queries for which a vector of centroids is read once

  // codes (lists, width) int8 in steps (width,).
  Centroids(const int8_t* codes, const float* step, int64_t lists, int64_t width)
      : step_(step), width_(width), blocks_((lists + BLOCK * MOST - 1) / (BLOCK * MOST) * MOST), mean_(width) {
    std::vector<double> sums(width);
    for (int64_t list = 0; list < lists; ++list)
      for (int64_t i = 0; i < width; ++i) sums[i] += codes[list * width + i];
    for (int64_t i = 0; i < width; ++i) mean_[i] = float(sums[i] / lists * step[i]);
    table_.assign(blocks_ * BLOCK * pairs() * 2, 0);
    starts_.assign(blocks_ * BLOCK, FAR);
    for (int64_t list = 0; list < lists; ++list, codes += width) {
      double start = 0;
      for (int64_t i = 0; i < width; ++i) {
        table_[offset(list / BLOCK, i / 2) + list % BLOCK * 2 + i % 2] = codes[i];
        const double apart = double(codes[i]) * step[i] - mean_[i];
        start += apart * apart / 2;
      }
      starts_[list] = float(std::min(double(LAST), start));
    }
  }

  // Orders the lists for each of some queries. With m the centroids' mean, |centroid - query|^2 / 2 is, but for what is
  // the same in all lists, |centroid - m|^2 / 2 - (query - m) . centroid: what is far from zero in all of them takes no
  // digits from the rest.
  void order(const float* queries, int count, WholeQueries& whole, Order* orders) const {
    if (count == TOGETHER) return order_some<TOGETHER>(queries, whole, orders);
    for (int query = 0; query < count; ++query) order_some<1>(queries + query * width_, whole, orders + query);
  }

  int64_t bytes() const { return table_.size() + sizeof(float) * (starts_.size() + mean_.size()); }

 private:
  static constexpr int64_t BLOCK = Order::BLOCK;
  static constexpr int MOST = LANES / 2;  // blocks at once: with fewer, a single query would wait for each sum

  int64_t pairs() const { return (width_ + 1) / 2; }
  // Where in the table a block's numbers of two dimensions are.
  int64_t offset(int64_t block, int64_t pair) const {
    return ((block / MOST * pairs() + pair) * MOST + block % MOST) * BLOCK * 2;
  }

  template <int QUERIES>
  void order_some(const float* queries, WholeQueries& whole, Order* orders) const {
    constexpr int SOME = QUERIES == 1 ? MOST : LANES == 16 ? 2 : 1;  // whose sums there are registers for
    whole.set(queries, mean_.data(), step_, QUERIES, width_);
    for (int query = 0; query < QUERIES; ++query) orders[query].resize(blocks_);
    for (int64_t first = 0; first < blocks_; first += SOME) score<QUERIES, SOME>(whole, first, orders);
    for (int query = 0; query < QUERIES; ++query) orders[query].begin();
  }

  template <int QUERIES, int SOME>
  void score(const WholeQueries& whole, int64_t first, Order* orders) const {
    constexpr int PARTS = BLOCK / LANES;
    const int8_t* codes = table_.data() + offset(first, 0);
    Ints sums[SOME * PARTS][QUERIES] = {};
    for (int64_t pair = 0; pair < pairs(); ++pair, codes += MOST * BLOCK * 2)
      unrolled<SOME * PARTS>([&](auto vector) {
        const Pairs numbers = load_pairs(codes + vector * LANES * 2);
        unrolled<QUERIES>([&](auto query) {
          sums[vector][query] = dotted(numbers, whole.pairs[pair * QUERIES + query], sums[vector][query]);
        });
      });
    const Floats far = Floats{} + FAR, last = Floats{} + LAST;
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

}  // namespace knnmoe
