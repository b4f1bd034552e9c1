// Drawing a token a row: temperature, top-k, top-p and min-p, and the inverse of the cumulative sum, without sorting a vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

using namespace dt;

namespace {

constexpr int kBlock = 64;  // scores whose largest stands for them
constexpr int kSteps = 8;   // bounds that are tried at a time when a nucleus is looked for
constexpr int kRounds = 3;  // of that; each leaves a ninth of what lies between the best token and the first bound
constexpr float kMostReach = 80.0f;  // e^-80 times any vocabulary is nothing beside the best token
constexpr float kLeastTemperature = 1e-30f;

struct Candidate {
  float score;  // distance from the best score over the temperature, at most 0; or the weight, which goes with it
  int token;
};

// More likely first; of equals the first token.
static bool before(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

static inline double weight(float score) { return std::exp(double(score)); }

// One row of scores, float32. All memory is kept for the next row.
class Row {
 public:
  int draw(const float* scores, int size, float temperature, int64_t top_k, float top_p, float min_p, double draw) {
    scores_ = scores;
    size_ = size;
    int best = most_likely();
    if (!(temperature > 0)) return best;
    best_score_ = scores[best];
    if (!std::isfinite(best_score_)) return best;
    factor_ = 1.0f / std::max(temperature, kLeastTemperature);
    if (top_k > 0 && top_k < size) {
      keep_top_k(int(top_k));
      if (top_p < 1) keep_top_p(top_p);
      return draw_of_candidates(min_p > 0 ? std::log(min_p) : -INFINITY, draw, best);
    }
    if (top_p < 1) return draw_of_nucleus(top_p, min_p, draw, best);
    return draw_of_all(min_p > 0 ? std::log(min_p) : -INFINITY, draw, best);
  }

 private:
  float scaled(float score) const { return (score - best_score_) * factor_; }

  // The first of the largest scores; fills the largest of each block.
  int most_likely() {
    int blocks = (size_ + kBlock - 1) / kBlock;
    peaks_.resize(blocks);
    int best_block = 0;
    for (int b = 0; b < blocks; b++) {
      int begin = b * kBlock, end = std::min(begin + kBlock, size_);
      vf top = splat(-INFINITY);
      int i = begin;
      for (; i + W <= end; i += W) top = vmax(load(scores_ + i), top);
      float peak = largest(top);
      for (; i < end; i++) peak = scores_[i] > peak ? scores_[i] : peak;
      peaks_[b] = peak;
      if (peak > peaks_[best_block]) best_block = b;
    }
    int begin = best_block * kBlock, end = std::min(begin + kBlock, size_);
    for (int i = begin; i < end; i++)
      if (scores_[i] == peaks_[best_block]) return i;
    return begin;  // nothing but NaN
  }

  // Every token whose score is at least `floor`, in the order of the vocabulary.
  void gather(float floor) {
    candidates_.clear();
    for (size_t b = 0; b < peaks_.size(); b++) {
      if (!(peaks_[b] >= floor)) continue;
      int end = std::min(int(b + 1) * kBlock, size_);
      for (int i = int(b) * kBlock; i < end; i++)
        if (scores_[i] >= floor) candidates_.push_back({scaled(scores_[i]), i});
    }
  }

  // The k most likely tokens, and those as likely as the last of them.
  void keep_top_k(int k) {
    float floor = -INFINITY;
    if (k <= int(peaks_.size())) {
      // At least k scores are as large as the k-th largest peak, so nothing below it is among the k best.
      order_ = peaks_;
      std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
      floor = order_[k - 1];
    }
    gather(floor);
    if (int(candidates_.size()) <= k) return;
    order_.resize(candidates_.size());
    for (size_t i = 0; i < candidates_.size(); i++) order_[i] = candidates_[i].score;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
    float last = order_[k - 1];
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), [&](const Candidate& c) { return c.score < last; }),
                      candidates_.end());
  }

  // The most likely candidates up to the one that brings their sum to p; the best stays whatever p is.
  void keep_top_p(float top_p) {
    std::sort(candidates_.begin(), candidates_.end(), before);
    double total = 0.0, sum = 0.0;
    for (const Candidate& c : candidates_) total += weight(c.score);
    size_t kept = 0;
    while (kept < candidates_.size() && (kept == 0 || sum < double(top_p) * total)) sum += weight(candidates_[kept++].score);
    candidates_.resize(kept);
    std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  }

  // A draw among the most likely tokens up to the one that brings their sum to p, without sorting those that are surely in it: of a
  // flat distribution they are thousands.
  int draw_of_nucleus(float top_p, float min_p, double draw, int best) {
    const double total = weigh_all(), wanted = double(top_p) * total;
    float least, most;  // of weights: tokens of at least `least` reach p, those of at least `most` don't
    bracket(wanted, total, top_p, least, most);
    candidates_.clear();
    double sum = 0.0;
    each_block(least, [&](int begin) {
      vf above = {};
      vi is_between = {};
      for (int i = begin; i < begin + kBlock; i += W) {
        const vf p = load(weights_.data() + i);
        const vi is_above = p >= splat(most);
        above += select(is_above, p, vf{});
        is_between |= ~is_above & (p >= splat(least));
      }
      sum += dt::sum(above);
      if (!any(is_between)) return;
      for (int i = begin; i < begin + kBlock; i++)
        if (weights_[i] >= least && weights_[i] < most) candidates_.push_back({weights_[i], i});
    });
    std::sort(candidates_.begin(), candidates_.end(), before);
    Candidate last = candidates_.empty() ? Candidate{most, size_} : candidates_.back();
    for (const Candidate& c : candidates_) {
      sum += c.score;
      if (sum < wanted) continue;
      last = c;
      break;
    }
    if (last.score < min_p) last = {min_p, size_};  // the best one weighs 1
    return draw_of_weights(last, draw, best);
  }

  // Weights of all tokens, the best one's 1, with zeros up to whole blocks. Returns their sum.
  double weigh_all() {
    const int blocks = int(peaks_.size());
    weights_.resize(size_t(blocks) * kBlock);
    double total = 0.0;
    for (int b = 0; b < blocks; b++) {
      const int begin = b * kBlock, end = begin + kBlock;
      if (end > size_) {
        for (int i = begin; i < end; i++) {
          const float score = i < size_ ? scaled(scores_[i]) : -INFINITY;
          weights_[i] = score <= 0 ? std::exp(score) : 0.0f;
          total += weights_[i];
        }
        break;
      }
      vf sum_W = {};
      for (int i = begin; i < end; i += W) {
        const vf score = (load(scores_ + i) - best_score_) * factor_;
        const vf p = select(score <= splat(0.0f), vexp_of_negative(score), vf{});  // NaN weighs nothing
        store(weights_.data() + i, p);
        sum_W += p;
      }
      total += dt::sum(sum_W);
    }
    return total;
  }

  // Between which weights the nucleus ends.
  void bracket(double wanted, double total, float top_p, float& least, float& most) const {
    // All tokens below the first bound together have less than what lies outside of the nucleus.
    const double outside = (1.0 - double(top_p)) * total / size_;
    float near = 0.0f, far = outside > 0 ? std::min(kMostReach, std::max(1.0f, float(-std::log(outside)))) : kMostReach;
    most = INFINITY;
    least = std::exp(-far);
    for (int round = 0; round < kRounds; round++) {
      float distances[kSteps], bounds[kSteps];
      vf sums[kSteps] = {};
      for (int s = 0; s < kSteps; s++) {
        distances[s] = near + (far - near) * float(s + 1) / float(kSteps + 1);
        bounds[s] = std::exp(-distances[s]);
      }
      each_block(bounds[kSteps - 1], [&](int begin) {
        for (int i = begin; i < begin + kBlock; i += W) {
          const vf p = load(weights_.data() + i);
          for (int s = 0; s < kSteps; s++) sums[s] += select(p >= splat(bounds[s]), p, vf{});
        }
      });
      for (int s = 0; s < kSteps; s++) {
        if (dt::sum(sums[s]) >= wanted) {
          far = distances[s];
          least = bounds[s];
          break;
        }
        near = distances[s];
        most = bounds[s];
      }
    }
  }

  // Blocks of which some token weighs at least so much.
  template <class F>
  void each_block(float least, F&& body) const {
    // A little less: a weight is rounded.
    const float nearest = least > 0 ? std::log(least) - 1e-3f : -INFINITY;
    for (size_t b = 0; b < peaks_.size(); b++)
      if (scaled(peaks_[b]) >= nearest) body(int(b) * kBlock);
  }

  // Among the tokens that weigh more than the last one, or as much and stand before it.
  int draw_of_weights(const Candidate& last, double draw, int best) {
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    sums_.assign(peaks_.size(), 0.0);
    double total = 0.0;
    each_block(last.score, [&](int begin) {
      vf sum_W = {};
      for (int i = begin; i < begin + kBlock; i += W) {
        const vf p = load(weights_.data() + i);
        const vi is_kept = (p > splat(last.score)) | ((p == splat(last.score)) & (lanes + i <= last.token));
        sum_W += select(is_kept, p, vf{});
      }
      total += sums_[begin / kBlock] = dt::sum(sum_W);
    });
    const double point = draw * total;
    double sum = 0.0;
    int b = 0, found = best;
    while (b < int(sums_.size()) - 1 && sum + sums_[b] <= point) sum += sums_[b++];
    for (int i = b * kBlock; i < (b + 1) * kBlock; i++) {
      if (!before({weights_[i], i}, {last.score, last.token + 1})) continue;
      sum += weights_[i];
      found = i;
      if (sum > point) break;
    }
    return found;
  }

  int draw_of_candidates(float floor, double draw, int best) const {
    double total = 0.0;
    for (const Candidate& c : candidates_)
      if (c.score >= floor) total += weight(c.score);
    double point = draw * total, sum = 0.0;
    int last = best;
    for (const Candidate& c : candidates_) {
      if (c.score < floor) continue;
      sum += weight(c.score);
      last = c.token;
      if (sum > point) return c.token;
    }
    return last;
  }

  // Block by block: the sum of each is kept, so that the second pass reads one block only.
  int draw_of_all(float floor, double draw, int best) {
    int blocks = int(peaks_.size());
    sums_.resize(blocks);
    double total = 0.0;
    for (int b = 0; b < blocks; b++) {
      int i = b * kBlock, end = std::min(i + kBlock, size_);
      vf sum_W = {};
      for (; i + W <= end; i += W) {
        vf score = (load(scores_ + i) - best_score_) * factor_;
        sum_W += select(score >= splat(floor), vexp_of_negative(score), vf{});
      }
      double sum = dt::sum(sum_W);
      for (; i < end; i++)
        if (scaled(scores_[i]) >= floor) sum += std::exp(scaled(scores_[i]));
      sums_[b] = sum;
      total += sum;
    }
    double point = draw * total, sum = 0.0;
    int b = 0;
    while (b < blocks - 1 && sum + sums_[b] <= point) sum += sums_[b++];
    int last = best, end = std::min((b + 1) * kBlock, size_);
    for (int i = b * kBlock; i < end; i++) {
      float score = scaled(scores_[i]);
      if (!(score >= floor)) continue;
      double p = weight(score);
      if (p <= 0) continue;
      sum += p;
      last = i;
      if (sum > point) return i;
    }
    return last;
  }

  const float* scores_ = nullptr;
  int size_ = 0;
  float best_score_ = 0, factor_ = 1;
  std::vector<float> peaks_, order_, weights_;
  std::vector<double> sums_;
  std::vector<Candidate> candidates_;
};

}  // namespace

// Scores [S, V] float32; settings are one a row. Tokens are int64 [S].
DT_API void dt_sample(const float* scores, int rows, int size, const float* temperature, const int64_t* top_k, const float* top_p,
                      const float* min_p, const double* draws, int64_t* tokens) {
  parallel(rows, [&](int row, int) {
    static thread_local Row work;
    tokens[row] = work.draw(scores + size_t(row) * size, size, temperature[row], top_k[row], top_p[row], min_p[row], draws[row]);
  });
}
