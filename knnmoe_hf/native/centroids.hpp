// Ranks lists by the distance of their centroids to a query. All centroids are compared, in integers.
#pragma once

#include "integers.hpp"
#include "keys.hpp"

namespace knnmoe {

// Gives lists in ascending order of their scores. Only few of them are asked for, so that the scores are not sorted:
// this is a tournament tree of three rounds with 16 players a game, of which one path is replayed for each list taken.
class Tournament {
 public:
  static constexpr int64_t BLOCK = 16;

  void resize(int64_t blocks) {
    rounds_[0].resize(blocks * BLOCK);
    for (int round = 1; round < ROUNDS; ++round) {
      blocks = (blocks + BLOCK - 1) / BLOCK;
      rounds_[round].assign(blocks * BLOCK, INF);
    }
  }
  // Where the scores of a block of lists are written, before `begin`.
  float* scores(int64_t block) { return rounds_[0].data() + block * BLOCK; }
  void begin() {
    for (int round = 1; round < ROUNDS; ++round)
      for (size_t block = 0; block < rounds_[round - 1].size() / BLOCK; ++block) play(round, block);
  }
  int64_t next() {
    const auto& final = rounds_[ROUNDS - 1];
    int64_t position = position_of_minimum(final.data(), final.size());
    for (int round = ROUNDS - 2; round >= 0; --round)
      position = position * BLOCK + position_of_minimum(rounds_[round].data() + position * BLOCK, BLOCK);
    rounds_[0][position] = INF;
    for (int64_t round = 1, block = position / BLOCK; round < ROUNDS; ++round, block /= BLOCK) play(round, block);
    return position;
  }

 private:
  static constexpr int ROUNDS = 3;

  void play(int round, int64_t block) {
    rounds_[round][block] = minimum_of(rounds_[round - 1].data() + block * BLOCK, BLOCK);
  }
  static float minimum_of(const float* from, int64_t count) {
    Floats found = load(from);
    for (int64_t i = LANES; i < count; i += LANES) found = minimum(found, load(from + i));
    return minimum(found);
  }
  static int64_t position_of_minimum(const float* from, int64_t count) {
    return position_of(minimum_of(from, count), from, count);
  }

  std::vector<float> rounds_[ROUNDS];
};

// Centroids interleaved by blocks of 16 lists, so that a vector holds one pair of dimensions of several lists.
class Centroids {
 public:
  static constexpr int BATCH = LANES / 2;  // queries that are compared with a centroid each time it is read

  // codes (lists, width) int8 in steps (width,).
  Centroids(const int8_t* codes, const float* step, int64_t lists, int64_t width)
      : step_(step), width_(width), blocks_((lists + BLOCK * GROUP - 1) / (BLOCK * GROUP) * GROUP), mean_(width) {
    std::vector<double> sums(width);
    for (int64_t list = 0; list < lists; ++list)
      for (int64_t i = 0; i < width; ++i) sums[i] += codes[list * width + i];
    for (int64_t i = 0; i < width; ++i) mean_[i] = float(sums[i] / lists * step[i]);
    table_.assign(blocks_ * BLOCK * pairs() * 2, 0);
    half_norms_.assign(blocks_ * BLOCK, INF);
    for (int64_t list = 0; list < lists; ++list, codes += width) {
      double half_norm = 0;
      for (int64_t i = 0; i < width; ++i) {
        table_[offset(list / BLOCK, i / 2) + list % BLOCK * 2 + i % 2] = codes[i];
        const double centred = double(codes[i]) * step[i] - mean_[i];
        half_norm += centred * centred / 2;
      }
      half_norms_[list] = float(std::min(double(LARGEST), half_norm));
    }
  }

  // Ranks the lists for each query, `tournaments` being one for each. With m the centroids' mean, |centroid - query|^2
  // / 2 is, up to a term that all lists share, |centroid - m|^2 / 2 - (query - m) . centroid. Without m, a common offset
  // of all keys would take digits from the differences between them.
  void rank(const float* queries, int count, QuantizedQueries& quantized, Tournament* tournaments) const {
    if (count == BATCH) return rank_batch<BATCH>(queries, quantized, tournaments);
    for (int query = 0; query < count; ++query)
      rank_batch<1>(queries + query * width_, quantized, tournaments + query);
  }

  int64_t bytes() const { return table_.size() + sizeof(float) * (half_norms_.size() + mean_.size()); }

 private:
  static constexpr int64_t BLOCK = Tournament::BLOCK;
  static constexpr int GROUP = LANES / 2;  // blocks at once for one query: with fewer it would wait for each sum

  int64_t pairs() const { return (width_ + 1) / 2; }
  // Where a block's pair of dimensions begins in the table.
  int64_t offset(int64_t block, int64_t pair) const {
    return ((block / GROUP * pairs() + pair) * GROUP + block % GROUP) * BLOCK * 2;
  }

  template <int QUERIES>
  void rank_batch(const float* queries, QuantizedQueries& quantized, Tournament* tournaments) const {
    constexpr int BLOCKS = QUERIES == 1 ? GROUP : 1;  // as many sums as there are registers
    quantized.set(queries, mean_.data(), step_, QUERIES, width_);
    for (int query = 0; query < QUERIES; ++query) tournaments[query].resize(blocks_);
    for (int64_t first = 0; first < blocks_; first += BLOCKS) score<QUERIES, BLOCKS>(quantized, first, tournaments);
    for (int query = 0; query < QUERIES; ++query) tournaments[query].begin();
  }

  template <int QUERIES, int BLOCKS>
  void score(const QuantizedQueries& quantized, int64_t first, Tournament* tournaments) const {
    constexpr int VECTORS = BLOCK / LANES;  // of a block
    const int8_t* codes = table_.data() + offset(first, 0);
    Ints sums[BLOCKS * VECTORS][QUERIES] = {};
    for (int64_t pair = 0; pair < pairs(); ++pair, codes += GROUP * BLOCK * 2)
      unrolled<BLOCKS * VECTORS>([&](auto vector) {
        const ShortPairs values = load_pairs(codes + vector * LANES * 2);
        unrolled<QUERIES>([&](auto query) {
          sums[vector][query] = dot_pairs(values, quantized.pairs[pair * QUERIES + query], sums[vector][query]);
        });
      });
    const Floats no_list = Floats{} + INF, largest = Floats{} + LARGEST;
    unrolled<BLOCKS * VECTORS>([&](auto vector) {
      const int64_t block = first + vector / VECTORS, part = vector % VECTORS * LANES;
      const Floats half_norm = load(half_norms_.data() + block * BLOCK + part);
      unrolled<QUERIES>([&](auto query) {
        const Floats score = half_norm - quantized.steps[query] * __builtin_convertvector(sums[vector][query], Floats);
        store(tournaments[query].scores(block) + part, half_norm < no_list ? minimum(largest, score) : no_list);
      });
    });
  }

  const float* step_;
  int64_t width_, blocks_;
  std::vector<int8_t> table_;  // (blocks / GROUP, dimensions / 2, GROUP, BLOCK, 2)
  std::vector<float> half_norms_, mean_;
};

}  // namespace knnmoe
