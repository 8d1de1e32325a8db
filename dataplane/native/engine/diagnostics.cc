#include "engine/diagnostics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "base/half.h"
#include "base/status.h"

namespace attnserve::engine {
namespace {

// Elements of a tensor that may be unaligned.
template <class T>
T element(const Tensor& tensor, std::size_t index) {
  T value;
  std::memcpy(&value, tensor.data + index * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void put(const Tensor& tensor, std::size_t first, const std::vector<T>& values) {
  std::memcpy(tensor.data + first * sizeof(T), values.data(), values.size() * sizeof(T));
}

// The elements from `first` on as floats, as many as `row` holds.
void load(const Tensor& tensor, std::size_t first, std::vector<float>& row) {
  if (tensor.dtype == DataType::kFp32) {
    std::memcpy(row.data(), tensor.data + first * sizeof(float), row.size() * sizeof(float));
    return;
  }
  const bool half = tensor.dtype == DataType::kFp16;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const auto bits = element<std::uint16_t>(tensor, first + i);
    row[i] = half ? float_of_half(bits) : float_of_bfloat16(bits);
  }
}

float entropy_of(const std::vector<float>& row) {
  double nats = 0;
  for (const float weight : row) {
    // A weight of 0 adds nothing; NaN stays NaN.
    nats -= static_cast<double>(weight) * (weight > 0 ? std::log(weight) : 0.0F);
  }
  return static_cast<float>(nats) + 0.0F;  // not -0
}

// Numbers of the heaviest keys of a row; its memory is used for row after row.
class Heaviest {
 public:
  Heaviest(std::size_t keys, std::size_t count) : order_(keys), indices(count), weights(count) {}

  void find(const std::vector<float>& row) {
    std::iota(order_.begin(), order_.end(), std::int64_t{0});
    const auto weight = [&](std::int64_t key) {
      const float given = row[static_cast<std::size_t>(key)];
      return std::isnan(given) ? -std::numeric_limits<float>::infinity() : given;  // NaN last
    };
    const auto heavier = [&](std::int64_t a, std::int64_t b) {
      const float of_a = weight(a), of_b = weight(b);
      return of_a != of_b ? of_a > of_b : a < b;
    };
    const auto end = order_.begin() + static_cast<std::ptrdiff_t>(indices.size());
    if (end != order_.end()) std::nth_element(order_.begin(), end, order_.end(), heavier);
    std::sort(order_.begin(), end, heavier);
    for (std::size_t i = 0; i < indices.size(); ++i) {
      indices[i] = order_[i];
      weights[i] = row[static_cast<std::size_t>(order_[i])];
    }
  }

 private:
  std::vector<std::int64_t> order_;

 public:
  std::vector<std::int64_t> indices;
  std::vector<float> weights;
};

std::vector<float> floats(const std::vector<double>& sums) {
  std::vector<float> rounded(sums.size());
  std::ranges::transform(sums, rounded.begin(), [](double sum) { return static_cast<float>(sum); });
  return rounded;
}

}  // namespace

void diagnose_weights(const Tensor& weights, const Wanted& wanted, const Tensor& key_lengths,
                      const std::vector<std::int64_t>& query_lengths, bool bottom_right,
                      const std::array<Tensor, kResults>& results, Stop* stop) {
  const auto result = [&](Result which) { return results[static_cast<std::size_t>(which)]; };
  const auto size = [&](std::size_t axis) { return static_cast<std::size_t>(weights.shape[axis]); };
  const std::size_t num_heads = size(1), query_len = size(2), key_len = size(3);
  const auto top_k = static_cast<std::size_t>(wanted.top_k);

  // Sums are over many rows, of weights some of which are tiny: in double.
  std::vector<float> row(key_len), entropies(wanted.entropy ? query_len : 0);
  std::vector<double> per_key(wanted.mass_per_key ? key_len : 0);
  std::vector<double> by_distance(static_cast<std::size_t>(wanted.mass_by_distance));
  Heaviest heaviest(top_k > 0 ? key_len : 0, top_k);

  for (std::size_t head = 0; head < size(0) * num_heads; ++head) {
    const std::int64_t offset = bottom_right
                                    ? element<std::int64_t>(key_lengths, head / num_heads) -
                                          static_cast<std::int64_t>(query_len)
                                    : 0;
    const std::size_t tokens = query_lengths.empty()
                                   ? query_len
                                   : static_cast<std::size_t>(query_lengths[head / num_heads]);
    std::ranges::fill(per_key, 0.0);
    std::ranges::fill(by_distance, 0.0);
    for (std::size_t query = 0; query < query_len; ++query) {
      if (stop != nullptr && stop->requested()) {
        throw RequestError(Code::kCancelled, "the computation was stopped");
      }
      const std::size_t at = head * query_len + query;
      if (query < tokens) {
        load(weights, at * key_len, row);
      } else {
        std::ranges::fill(row, 0.0F);
      }
      if (wanted.entropy) entropies[query] = entropy_of(row);
      if (top_k > 0) {
        heaviest.find(row);
        put(result(Result::kTopKIndices), at * top_k, heaviest.indices);
        put(result(Result::kTopKWeights), at * top_k, heaviest.weights);
      }
      for (std::size_t key = 0; key < per_key.size(); ++key) per_key[key] += row[key];
      if (!by_distance.empty()) {
        const std::int64_t position = static_cast<std::int64_t>(query) + offset;
        for (std::size_t key = 0; key < key_len; ++key) {
          const auto apart =
              static_cast<std::size_t>(std::abs(position - static_cast<std::int64_t>(key)));
          by_distance[std::min(apart, by_distance.size() - 1)] += row[key];
        }
      }
    }
    if (wanted.entropy) put(result(Result::kEntropy), head * query_len, entropies);
    if (wanted.mass_per_key) put(result(Result::kMassPerKey), head * key_len, floats(per_key));
    if (!by_distance.empty()) {
      put(result(Result::kMassByDistance), head * by_distance.size(), floats(by_distance));
    }
  }
}

}  // namespace attnserve::engine
