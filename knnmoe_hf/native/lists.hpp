// Lists of near keys: those that a query is to be compared with are in the lists whose centroids are nearest to it.
#pragma once

#include "keys.hpp"

namespace knnmoe {

// Lists from the nearest on, of which few are ever asked for: a knockout in three rounds.
class Order {
 public:
  static constexpr int64_t GROUP = 16;  // that play for a place in the next round
  static constexpr float FAR = std::numeric_limits<float>::infinity();

  void resize(int64_t groups) {
    for (auto& round : rounds_) {
      round.resize(groups * GROUP, FAR);
      groups = (groups + GROUP - 1) / GROUP;
    }
  }
  // The scores of a group are set from here on, and then `begin`.
  float* scores(int64_t group) { return rounds_[0].data() + group * GROUP; }
  void begin() {
    for (int round = 1; round < ROUNDS; ++round)
      for (size_t group = 0; group < rounds_[round - 1].size() / GROUP; ++group) play(round, group);
  }
  int64_t next() {
    const auto& final = rounds_[ROUNDS - 1];
    int64_t place = place_of_least(final.data(), final.size());
    for (int round = ROUNDS - 2; round >= 0; --round)
      place = place * GROUP + place_of_least(rounds_[round].data() + place * GROUP, GROUP);
    rounds_[0][place] = FAR;
    for (int64_t round = 1, group = place / GROUP; round < ROUNDS; ++round, group /= GROUP) play(round, group);
    return place;
  }

 private:
  static constexpr int ROUNDS = 3;

  void play(int round, int64_t group) {
    rounds_[round][group] = least_of(rounds_[round - 1].data() + group * GROUP, GROUP);
  }
  static float least_of(const float* from, int64_t count) {
    Floats found = load(from);
    for (int64_t i = LANES; i < count; i += LANES) found = lesser(found, load(from + i));
    return least(found);
  }
  static int64_t place_of_least(const float* from, int64_t count) {
    return std::find(from, from + count, least_of(from, count)) - from;
  }

  std::vector<float> rounds_[ROUNDS];
};

// A query looks into the nearest lists until it has seen `budget` keys.
class Lists {
 public:
  static constexpr int TOGETHER = LANES / 2;  // queries for which a vector of centroids is read once

  // What it takes to look for the neighbours of so many queries at once.
  struct Room {
    explicit Room(int queries) : orders(queries) {}
    std::vector<float> scaled;
    std::vector<Order> orders;
    std::vector<int32_t> rows;
  };

  int64_t budget = 1;

  // centroids (count, width) int8 in steps (width,), starts (count + 1,), rows: list after list.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, int64_t count,
        int64_t width)
      : step_(step), starts_(starts), rows_(rows), count_(count), width_(width) {
    groups_ = (count + GROUP * MOST - 1) / (GROUP * MOST) * MOST;
    table_.assign(groups_ * GROUP * width, 0);
    half_norms_.assign(groups_ * GROUP, Order::FAR);
    for (int64_t list = 0; list < count; ++list) {
      double norm = 0;
      for (int64_t i = 0; i < width; ++i) {
        const int8_t code = centroids[list * width + i];
        table_[(list / GROUP * width + i) * GROUP + list % GROUP] = code;
        norm += double(code * step[i]) * double(code * step[i]);
      }
      half_norms_[list] = float(norm / 2);
    }
  }

  // Offers each of `count` queries keys of its nearest lists, at least `least` of them if there are so many.
  void offer(const float* queries, int count, const Keys& keys, int64_t least, Room& room,
             std::vector<Nearest>& nearest) const {
    if (count == TOGETHER)
      score<TOGETHER, LANES == 16 ? 2 : 1>(queries, room.scaled, room.orders.data());
    else
      for (int query = 0; query < count; ++query)
        score<1, MOST>(queries + query * width_, room.scaled, room.orders.data() + query);
    for (int query = 0; query < count; ++query) {
      room.rows.clear();
      for (int64_t looked = 0; looked < count_ && int64_t(room.rows.size()) < std::max(budget, least); ++looked) {
        const int64_t list = room.orders[query].next();
        room.rows.insert(room.rows.end(), rows_ + starts_[list], rows_ + starts_[list + 1]);
      }
      keys.offer(queries + query * width_, room.rows.data(), room.rows.size(), nearest[query]);
    }
  }

  int64_t bytes() const { return table_.size() + sizeof(float) * half_norms_.size(); }

 private:
  static constexpr int64_t GROUP = Order::GROUP;  // centroids side by side, so that a vector holds a number of each
  static constexpr int MOST = LANES / 2;          // groups at once, which a single query needs not to wait for sums

  // half |centroid|^2 - query . centroid orders lists as their distances do; each sum is in the order of dimensions
  template <int QUERIES, int GROUPS>
  void score(const float* queries, std::vector<float>& scaled, Order* orders) const {
    scaled.resize(QUERIES * width_);
    for (int query = 0; query < QUERIES; ++query) {
      for (int64_t i = 0; i < width_; ++i) scaled[i * QUERIES + query] = queries[query * width_ + i] * step_[i];
      orders[query].resize(groups_);
    }
    for (int64_t group = 0; group < groups_; group += GROUPS) score_groups<QUERIES, GROUPS>(scaled.data(), group, orders);
    for (int query = 0; query < QUERIES; ++query) orders[query].begin();
  }

  template <int QUERIES, int GROUPS>
  void score_groups(const float* scaled, int64_t first, Order* orders) const {
    constexpr int PARTS = GROUP / LANES;
    const int64_t apart = GROUP * width_;
    const int8_t* codes = table_.data() + first * apart;
    Floats sums[GROUPS * PARTS][QUERIES] = {};
    for (int64_t i = 0; i < width_; ++i, codes += GROUP, scaled += QUERIES)
      unrolled<GROUPS * PARTS>([&](auto vector) {
        const Floats numbers = load(codes + vector / PARTS * apart + vector % PARTS * LANES);
        unrolled<QUERIES>([&](auto query) { sums[vector][query] = fused(numbers, Floats{} + scaled[query], sums[vector][query]); });
      });
    // Of what is no number, and of the places beyond the lists, which come after all lists of the same score: none of
    // them is asked for, as there are only so many lists to ask for.
    const Floats last = Floats{} + std::numeric_limits<float>::max();
    unrolled<GROUPS * PARTS>([&](auto vector) {
      const int64_t group = first + vector / PARTS, part = vector % PARTS * LANES;
      const Floats half = load(half_norms_.data() + group * GROUP + part);
      unrolled<QUERIES>([&](auto query) {
        store(orders[query].scores(group) + part, lesser(last, half - sums[vector][query]));
      });
    });
  }

  const float* step_;
  const int32_t *starts_, *rows_;
  int64_t count_, width_, groups_;
  std::vector<int8_t> table_;
  std::vector<float> half_norms_;
};

}  // namespace knnmoe
