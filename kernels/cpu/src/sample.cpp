// Drawing a token a row: temperature, top-k, top-p and min-p, and the inverse of the cumulative sum, without sorting a vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

using namespace dt;

namespace {

constexpr int kBlock = 64;        // scores whose largest stands for them
constexpr int kBuckets = 4096;    // of distances from the best score, when a nucleus is looked for
constexpr float kLeastTemperature = 1e-30f;

struct Candidate {
  float score;  // distance from the best score over the temperature, at most 0
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
    bool is_cut = false;
    if (top_k > 0 && top_k < size) {
      keep_top_k(int(top_k));
      is_cut = true;
    }
    if (top_p < 1) {
      if (!is_cut) gather_nucleus(top_p);
      keep_top_p(top_p);
      is_cut = true;
    }
    float floor = min_p > 0 ? std::log(min_p) : -INFINITY;
    return is_cut ? draw_of_candidates(floor, draw, best) : draw_of_all(floor, draw, best);
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

  // Tokens among which the nucleus lies: all whose score is above the bucket in which the sum of probabilities reaches p.
  void gather_nucleus(float top_p) {
    constexpr float kReach = 64.0f;  // e^-64 times any vocabulary is nothing beside the best token
    buckets_.assign(kBuckets, 0.0);
    double total = 0.0;
    for (int i = 0; i < size_; i++) {
      float score = scaled(scores_[i]);
      if (!(score > -kReach)) continue;
      double p = std::exp(score);
      total += p;
      buckets_[std::min(kBuckets - 1, int(-score * (kBuckets / kReach)))] += p;
    }
    total_ = total;
    double sum = 0.0, wanted = double(top_p) * total;
    int bucket = 0;
    while (bucket < kBuckets - 1 && sum + buckets_[bucket] < wanted) sum += buckets_[bucket++];
    // One bucket more, for what rounding has put on the other side.
    float edge = -(float(bucket) + 2.0f) * (kReach / kBuckets);
    candidates_.clear();
    for (int i = 0; i < size_; i++) {
      float score = scaled(scores_[i]);
      if (score >= edge) candidates_.push_back({score, i});
    }
    has_total_ = true;
  }

  // The most likely candidates up to the one that brings their sum to p; the best stays whatever p is.
  void keep_top_p(float top_p) {
    std::sort(candidates_.begin(), candidates_.end(), before);
    double total = 0.0;
    if (has_total_)
      total = total_;
    else
      for (const Candidate& c : candidates_) total += weight(c.score);
    has_total_ = false;
    double sum = 0.0;
    size_t kept = 0;
    while (kept < candidates_.size() && (kept == 0 || sum < double(top_p) * total)) sum += weight(candidates_[kept++].score);
    candidates_.resize(kept);
    std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
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
        sum_W += select(score >= splat(floor), vexp(score), vf{});
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
  double total_ = 0;
  bool has_total_ = false;
  std::vector<float> peaks_, order_;
  std::vector<double> buckets_, sums_;
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
