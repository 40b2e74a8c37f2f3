// Lists of near keys: those that a query is to be compared with are in the lists whose centroids are nearest to it.
#pragma once

#include "keys.hpp"

namespace knnmoe {

// Lists from the nearest on, of which few are ever asked for: a knockout in three rounds.
class Order {
 public:
  static constexpr int64_t BLOCK = 16;  // that play for a place in the next round
  static constexpr float FAR = std::numeric_limits<float>::infinity();

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

// Lists' centroids side by side, so that a vector holds a number of each; a group of them begins a block of its own.
class Centroids {
 public:
  static constexpr int64_t BLOCK = Order::BLOCK;
  static constexpr int MOST = LANES / 2;  // blocks at once, which a single query needs not to wait for sums

  Centroids() = default;
  // codes (lists, width) int8 in steps (width,); groups (n + 1,): where each group of lists starts.
  Centroids(const int8_t* codes, const float* step, int64_t width, const std::vector<int32_t>& groups)
      : width_(width), blocks_{0} {
    for (size_t group = 0; group + 1 < groups.size(); ++group) {
      for (int32_t list = groups[group]; list < groups[group + 1]; list += BLOCK) lists_.push_back(list);
      blocks_.push_back(int32_t(lists_.size()));
    }
    const int64_t room = int64_t(lists_.size()) + 1;  // the last block is of no list, as several are compared at once
    table_.assign(room * BLOCK * width, 0);
    half_norms_.assign(room * BLOCK, Order::FAR);
    for (size_t group = 0; group + 1 < groups.size(); ++group)
      for (int32_t list = groups[group]; list < groups[group + 1]; ++list)
        put(codes + list * width, step, blocks_[group] * BLOCK + list - groups[group]);
  }

  // Adds a group's blocks to some, and then the one of no list until so many can be compared at once.
  void add(int64_t group, std::vector<int32_t>& blocks) const {
    for (int32_t block = blocks_[group]; block < blocks_[group + 1]; ++block) blocks.push_back(block);
  }
  void fill_up(std::vector<int32_t>& blocks) const {
    while (blocks.size() % MOST) blocks.push_back(int32_t(lists_.size()));
  }
  int64_t list_of(int64_t block, int64_t place) const { return lists_[block] + place; }

  // Orders the lists of some blocks for each of some queries, whose numbers, times the steps, are side by side. half
  // |centroid|^2 - query . centroid orders them as their distances do; each sum is in the order of dimensions.
  template <int QUERIES>
  void compare(const float* scaled, const std::vector<int32_t>& blocks, Order* orders) const {
    constexpr int SOME = QUERIES == 1 ? MOST : LANES == 16 ? 2 : 1;  // whose sums there are registers for
    for (int query = 0; query < QUERIES; ++query) orders[query].resize(blocks.size());
    for (size_t first = 0; first < blocks.size(); first += SOME) compare<QUERIES, SOME>(scaled, blocks, first, orders);
    for (int query = 0; query < QUERIES; ++query) orders[query].begin();
  }

  int64_t bytes() const {
    return table_.size() + sizeof(float) * half_norms_.size() + sizeof(int32_t) * (lists_.size() + blocks_.size());
  }

 private:
  static constexpr float LAST = std::numeric_limits<float>::max();  // of a list: places of no list come after it

  void put(const int8_t* codes, const float* step, int64_t place) {
    double norm = 0;
    for (int64_t i = 0; i < width_; ++i) {
      table_[(place / BLOCK * width_ + i) * BLOCK + place % BLOCK] = codes[i];
      norm += double(codes[i] * step[i]) * double(codes[i] * step[i]);
    }
    half_norms_[place] = std::min(LAST, float(norm / 2));
  }

  template <int QUERIES, int SOME>
  void compare(const float* scaled, const std::vector<int32_t>& blocks, size_t first, Order* orders) const {
    constexpr int PARTS = BLOCK / LANES;
    const int8_t* codes[SOME];
    for (int block = 0; block < SOME; ++block) codes[block] = table_.data() + blocks[first + block] * BLOCK * width_;
    Floats sums[SOME * PARTS][QUERIES] = {};
    for (int64_t i = 0; i < width_; ++i, scaled += QUERIES)
      unrolled<SOME * PARTS>([&](auto vector) {
        const Floats numbers = load(codes[vector / PARTS] + i * BLOCK + vector % PARTS * LANES);
        unrolled<QUERIES>([&](auto query) {
          sums[vector][query] = fused(numbers, Floats{} + scaled[query], sums[vector][query]);
        });
      });
    const Floats far = Floats{} + Order::FAR, last = Floats{} + LAST;
    unrolled<SOME * PARTS>([&](auto vector) {
      const int64_t block = first + vector / PARTS, part = vector % PARTS * LANES;
      const Floats half = load(half_norms_.data() + blocks[block] * BLOCK + part);
      unrolled<QUERIES>([&](auto query) {
        const Floats score = lesser(last, half - sums[vector][query]);  // also of what is no number
        store(orders[query].scores(block) + part, half < far ? score : far);
      });
    });
  }

  int64_t width_ = 0;
  std::vector<int32_t> blocks_, lists_;  // where each group's blocks start, and each block's lists
  std::vector<int8_t> table_;
  std::vector<float> half_norms_;
};

// A query looks into the nearest lists until it has seen `budget` keys; where lists are in several groups, it is
// compared with those of the nearest groups alone.
class Lists {
 public:
  static constexpr int TOGETHER = LANES / 2;  // queries for which a vector of centroids is read once

  // What it takes to look for the neighbours of so many queries at once.
  struct Room {
    explicit Room(int queries) : orders(queries) {}
    std::vector<float> scaled;
    std::vector<Order> orders;
    Order among;
    std::vector<int32_t> blocks, rows;
  };

  int64_t budget = 1;

  // centroids (count, width) int8 in steps (width,), starts (count + 1,), rows: list after list, groups (n + 1,) of
  // lists: where each starts.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, const int32_t* groups,
        int64_t n, int64_t width)
      : step_(step), starts_(starts), rows_(rows), groups_(groups, groups + n + 1), width_(width),
        centroids_(centroids, step, width, groups_) {
    if (grouped()) means_ = Centroids(means(centroids).data(), step, width, {0, int32_t(groups_.size()) - 1});
    const Centroids& first = grouped() ? means_ : centroids_;
    first.add(0, all_);
    first.fill_up(all_);
  }

  // Offers each of `count` queries keys of its nearest lists, at least `least` of them if there are so many.
  void offer(const float* queries, int count, const Keys& keys, int64_t least, Room& room,
             std::vector<Nearest>& nearest) const {
    const int64_t wanted = std::min(std::max(budget, least), keys.rows);
    const Centroids& first = grouped() ? means_ : centroids_;
    if (count == TOGETHER)
      first.compare<TOGETHER>(scaled<TOGETHER>(queries, room), all_, room.orders.data());
    else
      for (int query = 0; query < count; ++query)
        first.compare<1>(scaled<1>(queries + query * width_, room), all_, room.orders.data() + query);
    for (int query = 0; query < count; ++query) {
      const float* own = queries + query * width_;
      Order& order = grouped() ? among_nearest_groups(own, wanted, room.orders[query], room) : room.orders[query];
      const std::vector<int32_t>& blocks = grouped() ? room.blocks : all_;
      for (room.rows.clear(); int64_t(room.rows.size()) < wanted;) {
        const int64_t place = order.next(), list = centroids_.list_of(blocks[place / BLOCK], place % BLOCK);
        const int64_t some = std::min<int64_t>(starts_[list + 1] - starts_[list], wanted - room.rows.size());
        room.rows.insert(room.rows.end(), rows_ + starts_[list], rows_ + starts_[list] + some);
      }
      keys.offer(own, room.rows.data(), room.rows.size(), nearest[query]);
    }
  }

  int64_t bytes() const { return centroids_.bytes() + means_.bytes(); }

 private:
  static constexpr int64_t BLOCK = Centroids::BLOCK;
  static constexpr int64_t WIDE = 4;  // times as many lists are compared with a query as there are groups

  // The nearest lists of the nearest groups, which hold as many keys as are wanted.
  Order& among_nearest_groups(const float* query, int64_t wanted, Order& groups, Room& room) const {
    room.blocks.clear();
    const int64_t enough = std::min<int64_t>(WIDE * int64_t(groups_.size() - 1), groups_.back());
    for (int64_t lists = 0, keys = 0; lists < enough || keys < wanted;) {
      const int64_t group = groups.next(), from = groups_[group], to = groups_[group + 1];
      centroids_.add(group, room.blocks);
      lists += to - from, keys += starts_[to] - starts_[from];
    }
    centroids_.fill_up(room.blocks);
    centroids_.compare<1>(scaled<1>(query, room), room.blocks, &room.among);
    return room.among;
  }

  bool grouped() const { return groups_.size() > 2; }

  // Codes (groups, width) of the groups' means.
  std::vector<int8_t> means(const int8_t* centroids) const {
    std::vector<int8_t> codes;
    for (size_t group = 0; group + 1 < groups_.size(); ++group)
      for (int64_t i = 0; i < width_; ++i) {
        double sum = 0;
        for (int32_t list = groups_[group]; list < groups_[group + 1]; ++list) sum += centroids[list * width_ + i];
        codes.push_back(int8_t(std::lround(sum / (groups_[group + 1] - groups_[group]))));
      }
    return codes;
  }

  // The numbers of some queries, times the steps, side by side.
  template <int QUERIES>
  const float* scaled(const float* queries, Room& room) const {
    room.scaled.resize(QUERIES * width_);
    for (int query = 0; query < QUERIES; ++query)
      for (int64_t i = 0; i < width_; ++i) room.scaled[i * QUERIES + query] = queries[query * width_ + i] * step_[i];
    return room.scaled.data();
  }

  const float* step_;
  const int32_t *starts_, *rows_;
  std::vector<int32_t> groups_, all_;
  int64_t width_;
  Centroids centroids_, means_;
};

}  // namespace knnmoe
