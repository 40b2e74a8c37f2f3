// An inverted file: a query is compared with keys of the lists whose centroids are nearest to it.
#pragma once

#include "centroids.hpp"
#include "residual_codes.hpp"

namespace knnmoe {

// Of the nearest lists the first `max_scan` keys are scanned. With residual codes, the `max_rerank` nearest by those
// get exact distances; without, all of them. For more than `tuned` neighbours both grow in proportion.
class Lists {
 public:
  static constexpr int BATCH = Centroids::BATCH;

  // What a search of up to BATCH queries works in.
  struct Scratch {
    QuantizedQueries quantized;
    Tournament tournaments[BATCH];
    std::vector<ListPart> parts[BATCH];
    ResidualCodes::Scratch residual_codes;
    std::vector<int32_t> rows;
  };

  int64_t max_scan = 1, max_rerank = 1, tuned = 1;

  // centroids (lists, width) int8 in steps (width,), starts (lists + 1,), rows in the order of the lists.
  Lists(const int8_t* centroids, const float* step, const int32_t* starts, const int32_t* rows, int64_t lists,
        int64_t width, ResidualCodes residual_codes)
      : centroid_codes_(centroids), step_(step), starts_(starts), rows_(rows), width_(width),
        residual_codes_(residual_codes), centroids_(centroids, step, lists, width) {}

  // Compares each of `count` queries with as many keys of its nearest lists as k neighbours need.
  void search(const float* queries, int count, const Keys& keys, int64_t k, Scratch& scratch,
              std::vector<TopK>& top) const {
    const auto needed = [&](int64_t effort) {
      return std::max(k <= tuned ? effort : (effort * k + tuned - 1) / tuned, SCANNED_PER_NEIGHBOR * k);
    };
    const int64_t scanned = std::min(needed(max_scan), keys.rows), reranked = needed(max_rerank);
    centroids_.rank(queries, count, scratch.quantized, scratch.tournaments);
    const bool by_codes = residual_codes_ && reranked < scanned;
    take_parts(scratch.tournaments[0], scanned, by_codes, scratch.parts[0]);
    for (int query = 0; query < count; ++query, queries += width_) {
      if (query + 1 < count)  // its keys are prefetched while this query is compared
        take_parts(scratch.tournaments[query + 1], scanned, by_codes, scratch.parts[query + 1]);
      scratch.rows.clear();
      if (by_codes)
        residual_codes_.nearest(queries, centroid_codes_, step_, scratch.parts[query], reranked,
                                scratch.residual_codes,
                                [&](int64_t position) { scratch.rows.push_back(rows_[position]); });
      else
        for (const ListPart& part : scratch.parts[query])
          scratch.rows.insert(scratch.rows.end(), rows_ + part.first, rows_ + part.last);
      keys.compare(queries, scratch.rows.data(), scratch.rows.size(), top[query]);
    }
  }

  int64_t bytes() const { return centroids_.bytes(); }

 private:
  static constexpr int64_t SCANNED_PER_NEIGHBOR = 4;  // keys to be compared for each neighbour, at least
  static constexpr int64_t PREFETCHED_BYTES = 1 << 15;  // of a query: more would evict those of the query before it

  // The first `scanned` keys of the nearest lists, with a prefetch of what is read of them first.
  void take_parts(Tournament& tournament, int64_t scanned, bool by_codes, std::vector<ListPart>& parts) const {
    int64_t fetched = 0;
    for (parts.clear(); scanned > 0;) {
      const int64_t list = tournament.next(), first = starts_[list];
      const int64_t count = std::min<int64_t>(starts_[list + 1] - first, scanned);
      parts.push_back({list, first, first + count});
      if (fetched < PREFETCHED_BYTES) {
        prefetch(rows_ + first, count * sizeof *rows_);
        fetched += count * sizeof *rows_ + (by_codes ? residual_codes_.prefetch_part(parts.back()) : 0);
      }
      scanned -= count;
    }
  }

  const int8_t* centroid_codes_;
  const float* step_;
  const int32_t *starts_, *rows_;
  int64_t width_;
  ResidualCodes residual_codes_;
  Centroids centroids_;
};

}  // namespace knnmoe
