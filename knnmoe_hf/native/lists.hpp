// A layer's keys and the lists that they are sorted into: the nearest keys of a query, by exact distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.hpp"

namespace knnmoe {

enum class Kind { FLOAT32, FLOAT16, BFLOAT16, INT8 };

struct Found {
  float distance;
  int64_t row;
  bool operator<(const Found& other) const {
    return distance < other.distance || (!(other.distance < distance) && row < other.row);
  }
};

// The `most` nearest of all that were offered; those that may be among them are sorted out when there is no more room.
class Nearest {
 public:
  explicit Nearest(size_t most) : most_(most) { found_.reserve(ROOM * most); }
  void offer(float distance, int64_t row) {
    if (distance != distance) distance = std::numeric_limits<float>::infinity();  // no order has room for it
    if (distance > worst_) return;
    found_.push_back({distance, row});
    if (found_.size() == ROOM * most_) sort_out();
  }
  // Nearest first.
  const std::vector<Found>& sorted() {
    if (found_.size() > most_) sort_out();
    std::sort(found_.begin(), found_.end());
    return found_;
  }

 private:
  static constexpr size_t ROOM = 4;

  void sort_out() {
    std::nth_element(found_.begin(), found_.begin() + (most_ - 1), found_.end());
    found_.resize(most_);
    worst_ = found_.back().distance;
  }

  size_t most_;
  float worst_ = std::numeric_limits<float>::infinity();
  std::vector<Found> found_;
};

// Squared distance from a query to a key; the sum's order depends on nothing but the width.
template <class T>
inline float squared_distance(const float* query, const T* key, const float* step, int width) {
  Floats sums = {};
  int i = 0;
  if (step) {
    for (; i + LANES <= width; i += LANES) {
      const Floats apart = load(key + i) * load(step + i) - load(query + i);
      sums += apart * apart;
    }
  } else {
    for (; i + LANES <= width; i += LANES) {
      const Floats apart = load(key + i) - load(query + i);
      sums += apart * apart;
    }
  }
  float sum = total(sums);
  for (; i < width; ++i) {
    const float apart = number(key[i]) * (step ? step[i] : 1.0f) - query[i];
    sum += apart * apart;
  }
  return sum;
}

// Keys (rows, width); a code of int8 counts steps (width,).
struct Keys {
  const void* codes;
  Kind kind;
  const float* step;
  int64_t rows;
  int width;

  // Offers some rows to `nearest`; `which` lists them, or is null for `count` rows from the first on.
  void offer(const float* query, const int32_t* which, int64_t count, Nearest& nearest) const {
    switch (kind) {
      case Kind::FLOAT32: return offer_of((const float*)codes, query, which, count, nearest);
      case Kind::FLOAT16: return offer_of((const Half*)codes, query, which, count, nearest);
      case Kind::BFLOAT16: return offer_of((const BFloat16*)codes, query, which, count, nearest);
      case Kind::INT8: return offer_of((const int8_t*)codes, query, which, count, nearest);
    }
  }

 private:
  template <class T>
  void offer_of(const T* all, const float* query, const int32_t* which, int64_t count, Nearest& nearest) const {
    const auto fetch = [&](int64_t i) {  // rows of a list lie anywhere
      const char* key = (const char*)(all + int64_t(which[i]) * width);
      for (size_t byte = 0; byte < width * sizeof(T); byte += LINE) __builtin_prefetch(key + byte);
      __builtin_prefetch(key + width * sizeof(T) - 1);
    };
    if (which)
      for (int64_t i = 0; i < std::min(AHEAD, count); ++i) fetch(i);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = which ? which[i] : i;
      if (which && i + AHEAD < count) fetch(i + AHEAD);
      nearest.offer(squared_distance(query, all + row * width, step, width), row);
    }
  }
  static constexpr int64_t AHEAD = 8, LINE = 64;
};

// Lists of near keys, each with a centroid; a query looks into the nearest until it has seen `budget` keys.
class Lists {
 public:
  // centroids (count, width) int8 in steps (width,), starts (count + 1,), rows: list after list.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, int64_t count,
        int width, int64_t budget)
      : step_(step), starts_(starts), rows_(rows), count_(count), width_(width), budget_(budget) {
    const int64_t groups = (count + GROUP - 1) / GROUP;
    table_.assign(groups * GROUP * width, 0);
    half_norms_.assign(groups * GROUP, FAR);
    for (int64_t list = 0; list < count; ++list) {
      double norm = 0;
      for (int i = 0; i < width; ++i) {
        const int8_t code = centroids[list * width + i];
        table_[(list / GROUP * width + i) * GROUP + list % GROUP] = code;
        norm += double(code * step[i]) * double(code * step[i]);
      }
      half_norms_[list] = float(norm / 2);
    }
  }

  // Offers each of `count` queries keys of its nearest lists, at least `least` of them if there are so many.
  void offer(const float* queries, int count, const Keys& keys, int64_t least, std::vector<Nearest>& nearest) const {
    std::vector<Order> orders(count);
    if (count == TOGETHER)
      score<TOGETHER>(queries, orders.data());
    else
      for (int query = 0; query < count; ++query) score<1>(queries + query * width_, &orders[query]);
    std::vector<int32_t> rows;
    for (int query = 0; query < count; ++query) {
      rows.clear();
      for (int64_t looked = 0; looked < count_ && int64_t(rows.size()) < std::max(budget_, least); ++looked) {
        const int64_t list = orders[query].next();
        rows.insert(rows.end(), rows_ + starts_[list], rows_ + starts_[list + 1]);
      }
      keys.offer(queries + query * width_, rows.data(), rows.size(), nearest[query]);
    }
  }

  // Queries for which a vector of centroids is read once.
  static constexpr int TOGETHER = LANES == 16 ? 4 : 2;

  int64_t bytes() const { return table_.size() + sizeof(float) * half_norms_.size(); }

 private:
  static constexpr int GROUP = 16;  // centroids side by side, so that a vector holds a number of each
  static constexpr int CHAINS = 4;  // sums at once, none of which waits for another
  static constexpr float FAR = std::numeric_limits<float>::infinity();

  // Lists from the nearest on, of which few are ever asked for.
  struct Order {
    std::vector<float> scores, minima;  // of each list, of each group

    int64_t next() {
      const int64_t group = place_of_least(minima.data(), minima.size());
      float* own = scores.data() + group * GROUP;
      const int64_t place = place_of_least(own, GROUP);
      own[place] = FAR;
      minima[group] = least_of(own, GROUP);
      return group * GROUP + place;
    }
  };

  static float least_of(const float* from, size_t count) {
    Floats found = load(from);
    for (size_t i = LANES; i < count; i += LANES) found = lesser(found, load(from + i));
    return least(found);
  }
  static int64_t place_of_least(const float* from, size_t count) {
    const float* found = std::find(from, from + count, least_of(from, count));
    return found - from;
  }

  // half |centroid|^2 - query . centroid orders lists as their distances do; a query's are summed up alike in any count
  template <int COUNT>
  void score(const float* queries, Order* orders) const {
    std::vector<float> scaled(COUNT * width_);
    const size_t groups = half_norms_.size() / GROUP;
    const Floats last = Floats{} + std::numeric_limits<float>::max();  // also of what is no number
    for (int query = 0; query < COUNT; ++query) {
      for (int i = 0; i < width_; ++i) scaled[query * width_ + i] = queries[query * width_ + i] * step_[i];
      orders[query].scores.resize(half_norms_.size());
      orders[query].minima.assign((groups + GROUP - 1) / GROUP * GROUP, FAR);
    }
    for (size_t group = 0; group < groups; ++group) {
      for (int part = 0; part < GROUP; part += LANES) {
        const int8_t* codes = table_.data() + group * GROUP * width_ + part;
        Floats sums[COUNT][CHAINS] = {};
        const auto add = [&](int i, int chain) {
          const Floats numbers = load(codes + i * GROUP);
          for (int query = 0; query < COUNT; ++query) sums[query][chain] += numbers * scaled[query * width_ + i];
        };
        int i = 0;
        for (; i + CHAINS <= width_; i += CHAINS)
          for (int chain = 0; chain < CHAINS; ++chain) add(i + chain, chain);
        for (; i < width_; ++i) add(i, 0);
        for (int query = 0; query < COUNT; ++query) {
          const Floats products = (sums[query][0] + sums[query][1]) + (sums[query][2] + sums[query][3]);
          store(orders[query].scores.data() + group * GROUP + part,
                lesser(last, load(half_norms_.data() + group * GROUP + part) - products));
        }
      }
      for (int query = 0; query < COUNT; ++query)
        orders[query].minima[group] = least_of(orders[query].scores.data() + group * GROUP, GROUP);
    }
  }

  const float* step_;
  const int32_t *starts_, *rows_;
  int64_t count_;
  int width_;
  int64_t budget_;
  std::vector<int8_t> table_;
  std::vector<float> half_norms_;
};

}  // namespace knnmoe
