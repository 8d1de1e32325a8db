// Attention in float64, and tensors to give to it: what tests of the engine compare with.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/tensor.h"

namespace attnserve {

struct Scheme {
  bool causal = false;
  bool bottom_right = false;
};

struct Sizes {
  std::int64_t batch = 1, num_heads = 1, num_kv_heads = 1, query_len = 1, key_len = 1;
  std::int64_t head_dim = 8, value_head_dim = 8;
};

inline std::vector<float> normal(std::mt19937& random, std::int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> made(static_cast<std::size_t>(count));
  for (float& each : made) each = draw(random);
  return made;
}

// Weights [B, H, Sq, Sk] of query and key; rows that see no key are 0.
inline std::vector<double> reference_weights(const std::vector<float>& query,
                                             const std::vector<float>& key,
                                             const std::vector<std::int64_t>& key_lengths,
                                             const Sizes& s, double scale, Scheme mask) {
  std::vector<double> weights(s.batch * s.num_heads * s.query_len * s.key_len);
  const std::int64_t sharing = s.num_heads / s.num_kv_heads;
  for (std::int64_t row = 0; row < s.batch * s.num_heads * s.query_len; ++row) {
    const std::int64_t i = row % s.query_len, h = row / s.query_len % s.num_heads;
    const std::int64_t b = row / s.query_len / s.num_heads;
    const std::int64_t kv = b * s.num_kv_heads + h / sharing;
    const std::int64_t position = i + (mask.bottom_right ? key_lengths[b] - s.query_len : 0);
    const std::int64_t seen = mask.causal ? std::min(key_lengths[b], position + 1) : key_lengths[b];
    std::vector<double> scores;
    for (std::int64_t j = 0; j < seen; ++j) {
      double sum = 0;
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        sum += double{query[row * s.head_dim + d]} * key[(kv * s.key_len + j) * s.head_dim + d];
      }
      scores.push_back(sum * scale);
    }
    double highest = -INFINITY, total = 0;
    for (const double score : scores) highest = std::max(highest, score);
    for (double& score : scores) total += score = std::exp(score - highest);
    for (std::size_t j = 0; j < scores.size(); ++j) {
      weights[row * s.key_len + j] = scores[j] / total;
    }
  }
  return weights;
}

// Output [B, H, Sq, Dv] of weights and value.
inline std::vector<double> reference_output(const std::vector<double>& weights,
                                            const std::vector<float>& value, const Sizes& s) {
  std::vector<double> output(s.batch * s.num_heads * s.query_len * s.value_head_dim);
  for (std::int64_t row = 0; row < s.batch * s.num_heads * s.query_len; ++row) {
    const std::int64_t h = row / s.query_len % s.num_heads;
    const std::int64_t b = row / s.query_len / s.num_heads;
    const std::int64_t kv = b * s.num_kv_heads + h / (s.num_heads / s.num_kv_heads);
    for (std::int64_t j = 0; j < s.key_len; ++j) {
      for (std::int64_t d = 0; d < s.value_head_dim; ++d) {
        output[row * s.value_head_dim + d] +=
            weights[row * s.key_len + j] * value[(kv * s.key_len + j) * s.value_head_dim + d];
      }
    }
  }
  return output;
}

template <class Given>
double largest_error(const std::vector<Given>& given, const std::vector<double>& exact) {
  double largest = given.size() == exact.size() ? 0.0 : INFINITY;
  for (std::size_t i = 0; i < given.size() && i < exact.size(); ++i) {
    const double apart = std::abs(static_cast<double>(given[i]) - exact[i]);
    largest = apart <= largest ? largest : apart;  // NaN too
  }
  return largest;
}

template <class T>
Tensor tensor_over(DataType dtype, Shape shape, std::vector<T>& elements) {
  return {dtype, shape, reinterpret_cast<std::byte*>(elements.data())};
}

}  // namespace attnserve
