// The tokens that followed a token's neighbours, mixed into the logits of the next token: the formulas are those of
// `knnmoe_hf.lookup.next_tokens` and `knnmoe_hf.lookup.logits`.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "logits.hpp"

namespace knnmoe {

// See `knnmoe_hf.lookup.next_tokens.Voting`.
struct Voting {
  const int32_t* next_tokens;  // (rows,)
  int64_t rows, voters;
  float unit, scale;  // of distances, for votes and for trust
  float weight;
  bool fitted;

  // Trust in [0, 1]: 1 for neighbours that agree, the nearest of which is the query itself.
  float trust(float entropy, float nearest) const {
    return std::min(std::exp((entropy + nearest / scale) * -0.5f), 1.0f);  // in this order, NaN stays NaN
  }

  float mixing_weight(float confidence, float trust) const {
    constexpr float BELOW_ONE = 1 - 0x1p-24f;
    if (!fitted) return weight * confidence;
    const float trusted = confidence * trust, recalled = weight * trusted, own = (1 - weight) * (1 - trusted);
    return std::min(recalled / std::max(recalled + own, std::numeric_limits<float>::min()), BELOW_ONE);
  }
};

// The distribution of the next token that the neighbours of one token give.
class RecalledTokens {
 public:
  // Mixes what followed the neighbours of one token into its outputs, of which the first `width` are those of the logits.
  template <class T>
  void mix(const Voting& voting, float confidence, const float* distances, const int64_t* rows, T* outputs,
           int64_t columns, int64_t width, LogitsTransform transform) {
    if (!(confidence > 0)) return;
    count(voting, distances, rows);
    const float trust = voting.fitted ? voting.trust(entropy(), distances[0]) : 1;
    const float weight = voting.mixing_weight(confidence, trust);
    if (weight > 0) mix(outputs, columns, width, transform, weight);
  }

 private:
  // Neighbours that stand for the same token count together, in the order in which they come.
  void count(const Voting& voting, const float* distances, const int64_t* rows) {
    tokens_.clear(), probabilities_.clear();
    votes_.resize(voting.voters);
    float total = 0;
    for (int64_t i = 0; i < voting.voters; ++i)
      total += votes_[i] = std::exp((distances[0] - distances[i]) / voting.unit);
    for (int64_t i = 0; i < voting.voters; ++i) {
      if (rows[i] < 0 || rows[i] >= voting.rows)
        throw std::out_of_range("row " + std::to_string(rows[i]) + " is not one of the memory's " +
                                std::to_string(voting.rows) + ": pass rows from 0 to one less");
      add(voting.next_tokens[rows[i]], votes_[i] / total);
    }
  }

  float entropy() const {
    float found = 0;
    for (const float p : probabilities_) found -= p > 0 ? p * std::log(p) : 0;
    return found;
  }

  // With a weight above 0.
  template <class T>
  void mix(T* outputs, int64_t columns, int64_t width, LogitsTransform transform, float weight) const {
    const float log_odds = std::log(weight) - std::log1p(-weight);
    const float total = log_odds + log_total(outputs, width, transform);
    for (size_t i = 0; i < tokens_.size(); ++i) {
      if (tokens_[i] < 0 || tokens_[i] >= columns)
        throw std::out_of_range("token " + std::to_string(tokens_[i]) + " is not one of the vocabulary's " +
                                std::to_string(columns) + ": the memory is of another tokenizer");
      if (!(probabilities_[i] > 0)) continue;
      T& output = outputs[tokens_[i]];
      const float recalled = total + std::log(probabilities_[i]);
      output = to<T>(transform.inverse(log_of_sum(transform(to_float(output)), recalled)));
    }
  }

  void add(int32_t token, float probability) {
    size_t place = 0;
    while (place < tokens_.size() && tokens_[place] != token) ++place;
    if (place == tokens_.size()) tokens_.push_back(token), probabilities_.push_back(0);
    probabilities_[place] += probability;
  }

  // log(exp(a) + exp(b)); NaN if one of them is.
  static float log_of_sum(float a, float b) {
    if (a != a || b != b) return a + b;
    const float larger = std::max(a, b), smaller = std::min(a, b);
    if (std::isinf(larger)) return larger;
    return larger + std::log1p(std::exp(smaller - larger));
  }

  std::vector<int32_t> tokens_;
  std::vector<float> probabilities_, votes_;
};

}  // namespace knnmoe
