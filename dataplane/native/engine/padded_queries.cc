#include "engine/padded_queries.h"

#include <algorithm>
#include <cstring>

namespace attnserve::engine {

std::vector<std::int64_t> query_lengths(const AttendWork& work) {
  const ModelFacts& facts = work.model->facts;
  const Tensor& given = work.feeds[static_cast<std::size_t>(Feed::kKeyLengths)];
  if (facts.kind != Kind::kLayer || facts.context_dim || work.dims.packed > 0 || !given.data) {
    return {};
  }
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(work.dims.batch));
  std::memcpy(lengths.data(), given.data, lengths.size() * sizeof(std::int64_t));
  const bool padded = std::ranges::any_of(
      lengths, [&](std::int64_t length) { return length < work.dims.query_len; });
  return padded ? lengths : std::vector<std::int64_t>{};
}

Shape shape_without_padding(const Shape& mask, const Dims& dims) {
  return {dims.batch, mask[1], dims.query_len, mask[3]};
}

void hide_padding(const Tensor& mask, const std::vector<std::int64_t>& lengths,
                  const Tensor& into) {
  const auto row = static_cast<std::size_t>(into.shape[3]);
  std::byte* to = into.data;
  for (std::int64_t sequence = 0; sequence < into.shape[0]; ++sequence) {
    for (std::int64_t head = 0; head < into.shape[1]; ++head) {
      for (std::int64_t query = 0; query < into.shape[2]; ++query, to += row) {
        const std::int64_t from =
            (std::min(sequence, mask.shape[0] - 1) * mask.shape[1] + head) * mask.shape[2] +
            std::min(query, mask.shape[2] - 1);
        if (query < lengths[static_cast<std::size_t>(sequence)]) {
          std::memcpy(to, mask.data + static_cast<std::size_t>(from) * row, row);
        } else {
          std::memset(to, 0, row);
        }
      }
    }
  }
}

}  // namespace attnserve::engine
