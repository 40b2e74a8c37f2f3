// Lists of near keys: those that a query is to be compared with are in the lists whose centroids are nearest to it.
#pragma once

#include "centroids.hpp"
#include "sketch.hpp"

namespace knnmoe {

// A query looks into the nearest lists until it has seen `budget` keys, of which, with a sketch, it reads the `chosen`
// nearest by that.
class Lists {
 public:
  static constexpr int TOGETHER = Centroids::TOGETHER;

  // What it takes to look for the neighbours of so many queries at once.
  struct Room {
    explicit Room(int queries) : orders(queries), parts(queries) {}
    WholeQueries whole;
    std::vector<Order> orders;
    std::vector<std::vector<Part>> parts;
    Sketch::Room sketch;
    std::vector<int32_t> rows;
  };

  int64_t budget = 1, chosen = 1;

  // centroids (count, width) int8 in steps (width,), starts (count + 1,), rows: list after list.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, int64_t count,
        int64_t width, Sketch sketch)
      : centroid_codes_(centroids), step_(step), starts_(starts), rows_(rows), width_(width), sketch_(sketch),
        centroids_(centroids, step, count, width) {}

  // Offers each of `count` queries keys of its nearest lists, at least `least` of them if there are so many.
  void offer(const float* queries, int count, const Keys& keys, int64_t least, Room& room,
             std::vector<Nearest>& nearest) const {
    const int64_t wanted = std::min(std::max(budget, least), keys.rows), read = std::max(chosen, least);
    centroids_.order(queries, count, room.whole, room.orders.data());
    const bool sketched = sketch_ && read < wanted;
    list_parts(room.orders[0], wanted, sketched, room.parts[0]);
    for (int query = 0; query < count; ++query, queries += width_) {
      if (query + 1 < count) list_parts(room.orders[query + 1], wanted, sketched, room.parts[query + 1]);
      room.rows.clear();
      if (sketched)
        sketch_.choose(queries, centroid_codes_, step_, room.parts[query], read, room.sketch,
                       [&](int64_t place) { room.rows.push_back(rows_[place]); });
      else
        for (const Part& part : room.parts[query])
          room.rows.insert(room.rows.end(), rows_ + part.first, rows_ + part.last);
      keys.offer(queries, room.rows.data(), room.rows.size(), nearest[query]);
    }
  }

  int64_t bytes() const { return centroids_.bytes(); }

 private:
  static constexpr int64_t FETCHED = 1 << 15;  // bytes asked for a query ahead: more would drive out the one before

  // The nearest lists' first keys, which are asked for before they are compared.
  void list_parts(Order& order, int64_t wanted, bool sketched, std::vector<Part>& parts) const {
    int64_t asked = 0;
    for (parts.clear(); wanted > 0;) {
      const int64_t list = order.next(), first = starts_[list];
      const int64_t some = std::min<int64_t>(starts_[list + 1] - first, wanted);
      parts.push_back({list, first, first + some});
      if (asked < FETCHED) {
        fetch(rows_ + first, some * sizeof *rows_);
        asked += some * sizeof *rows_ + (sketched ? sketch_.fetch(parts.back()) : 0);
      }
      wanted -= some;
    }
  }

  const int8_t* centroid_codes_;
  const float* step_;
  const int32_t *starts_, *rows_;
  int64_t width_;
  Sketch sketch_;
  Centroids centroids_;
};

}  // namespace knnmoe
