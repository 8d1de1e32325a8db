#include "engine/tokens.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>
#include <string_view>

namespace attnserve::engine {
namespace {

// Sequences of all works side by side, padded to the longest.
class PaddedTokens {
 public:
  PaddedTokens(std::span<TokensWork* const> works, TokenSequences TokensWork::* which,
               std::int64_t pad_token_id) {
    std::size_t rows = 0;
    for (TokensWork* work : works) {
      rows += (work->*which).count();
      longest_ = std::max(longest_, (work->*which).longest());
    }
    const auto width = static_cast<std::size_t>(longest_);
    ids_.assign(rows * width, pad_token_id);
    mask_.assign(rows * width, 0);
    std::size_t at = 0;
    for (TokensWork* work : works) {
      const TokenSequences& sequences = work->*which;
      for (std::size_t i = 0; i < sequences.count(); ++i, at += width) {
        const std::size_t first = sequences.starts[i];
        const std::size_t count = sequences.starts[i + 1] - first;
        std::copy_n(sequences.ids.begin() + static_cast<std::ptrdiff_t>(first), count,
                    ids_.begin() + static_cast<std::ptrdiff_t>(at));
        std::fill_n(mask_.begin() + static_cast<std::ptrdiff_t>(at), count, 1);
      }
    }
    shape_ = {static_cast<std::int64_t>(rows), longest_};
  }

  std::int64_t longest() const { return longest_; }
  Tensor ids() { return view(ids_); }
  Tensor mask() { return view(mask_); }

 private:
  Tensor view(std::vector<std::int64_t>& elements) const {
    return {DataType::kInt64, shape_, reinterpret_cast<std::byte*>(elements.data())};
  }

  std::int64_t longest_ = 0;
  Shape shape_;
  std::vector<std::int64_t> ids_, mask_;
};

// The tensors of all works, row after row; those of padded rows as long as the longest.
class JoinedTensors {
 public:
  explicit JoinedTensors(std::span<TokensWork* const> works) {
    const TensorInput& first = works.front()->given;
    const bool ragged = !first.lengths.empty();
    whole_ = first.tensor;
    std::int64_t rows = 0;
    for (const TokensWork* work : works) {
      const Shape& shape = work->given.tensor.shape;
      rows += shape[0];
      if (ragged) whole_.shape[1] = std::max(whole_.shape[1], shape[1]);
    }
    whole_.shape[0] = rows;
    if (ragged) mask_all(works);
    if (works.size() == 1) return;  // in place
    elements_ = Bytes::allocate(whole_.byte_size());
    whole_.data = elements_.data();
    const std::size_t row_bytes = whole_.byte_size() / static_cast<std::size_t>(rows);
    std::byte* at = elements_.data();
    for (const TokensWork* work : works) {
      const Tensor& tensor = work->given.tensor;
      const auto count = static_cast<std::size_t>(tensor.shape[0]);
      const std::size_t bytes = tensor.byte_size() / count;
      for (std::size_t row = 0; row < count; ++row, at += row_bytes) {
        std::memcpy(at, tensor.data + row * bytes, bytes);
        std::memset(at + bytes, 0, row_bytes - bytes);
      }
    }
  }

  Tensor tensor() const { return whole_; }
  Tensor mask() {
    return {DataType::kInt64,
            {whole_.shape[0], whole_.shape[1]},
            reinterpret_cast<std::byte*>(mask_.data())};
  }

 private:
  void mask_all(std::span<TokensWork* const> works) {
    const auto width = static_cast<std::size_t>(whole_.shape[1]);
    mask_.assign(static_cast<std::size_t>(whole_.shape[0]) * width, 0);
    auto at = mask_.begin();
    for (const TokensWork* work : works) {
      for (const std::int64_t length : work->given.lengths) {
        std::fill_n(at, length, 1);
        at += static_cast<std::ptrdiff_t>(width);
      }
    }
  }

  Tensor whole_;
  Bytes elements_;
  std::vector<std::int64_t> mask_;
};

// What kind of token each id is, as the ids are padded; 0 where nobody says.
std::vector<std::int64_t> padded_types(std::span<TokensWork* const> works, std::size_t width) {
  std::size_t rows = 0;
  for (const TokensWork* work : works) rows += work->source.count();
  std::vector<std::int64_t> types(rows * width, 0);
  std::size_t at = 0;
  for (const TokensWork* work : works) {
    for (std::size_t i = 0; i < work->source.count(); ++i, at += width) {
      if (work->source_types.empty()) continue;
      const auto given =
          std::span(work->source_types)
              .subspan(work->source.starts[i], work->source.starts[i + 1] - work->source.starts[i]);
      std::ranges::copy(given, types.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  return types;
}

bool has_target(const TokensWork& work) { return work.target.count() > 0; }

// Whether the first axis of an output is the batch: then the graph leaves its size open.
bool by_sequence(const Session& session, std::string_view output) {
  const auto port = std::ranges::find(session.outputs(), output, &Port::name);
  return port != session.outputs().end() && !port->shape.empty() && port->shape.front() < 0;
}

// Rows [first, first + count) of a result, which they keep alive.
OwnedTensor rows_of(const OwnedTensor& whole, std::size_t first, std::size_t count) {
  OwnedTensor rows = whole;
  const std::size_t all = static_cast<std::size_t>(whole.tensor.shape[0]);
  rows.tensor.data += whole.tensor.byte_size() / all * first;
  rows.tensor.shape[0] = static_cast<std::int64_t>(count);
  return rows;
}

// Every output that any of the works wants, once.
std::vector<std::string_view> wanted_outputs(std::span<TokensWork* const> works) {
  std::vector<std::string_view> names;
  for (const TokensWork* work : works) {
    for (const std::string& name : work->outputs) {
      if (std::ranges::find(names, name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

}  // namespace

std::int64_t TokenSequences::longest() const {
  std::size_t most = 0;
  for (std::size_t i = 0; i < count(); ++i) most = std::max(most, starts[i + 1] - starts[i]);
  return static_cast<std::int64_t>(most);
}

std::size_t TokensWork::count() const {
  return given.name.empty() ? source.count() : static_cast<std::size_t>(given.tensor.shape[0]);
}

std::int64_t TokensWork::longest_source() const { return std::max(source.longest(), given.tokens); }

BatchKey batch_key(const TokensWork& work) {
  // Works whose outputs differ may run together all the same: a hash that is equal by chance costs
  // outputs that not all of them want.
  std::uint64_t outputs = 0;
  for (const std::string& name : work.outputs) {
    outputs = outputs * 31 + std::hash<std::string_view>{}(name);
  }
  return {reinterpret_cast<std::uintptr_t>(work.model.get()),
          reinterpret_cast<std::uintptr_t>(work.variant),
          outputs,
          static_cast<std::uint64_t>(bucket(std::max<std::int64_t>(1, work.source.longest()))),
          static_cast<std::uint64_t>(has_target(work) ? bucket(work.target.longest()) : 0),
          static_cast<std::uint64_t>(work.given.tokens > 0 ? bucket(work.given.tokens) : 0)};
}

std::size_t hidden_bytes(const TokensWork& work) {
  const std::size_t tokens =
      static_cast<std::size_t>(work.longest_source() + work.target.longest());
  const std::size_t given = work.given.name.empty() ? 0 : work.given.tensor.byte_size();
  return given + sizeof(float) * work.count() * tokens *
                     static_cast<std::size_t>(work.model->facts.hidden_size);
}

void attend_tokens_together(std::span<TokensWork* const> works, Stop* stop) {
  const TokensWork& first = *works.front();
  const Session& session = *first.variant->session;
  const std::int64_t pad = first.model->facts.pad_token_id;

  PaddedTokens source(works, &TokensWork::source, pad);
  PaddedTokens target(works, &TokensWork::target, pad);
  std::vector<Session::Feed> feeds;
  std::vector<std::int64_t> types;
  if (first.source.count() > 0) {
    feeds.push_back({"input_ids", source.ids()});
    feeds.push_back({"attention_mask", source.mask()});
    if (session.takes("token_type_ids")) {
      types = padded_types(works, static_cast<std::size_t>(source.longest()));
      const Tensor ids = feeds.front().tensor;
      feeds.push_back(
          {"token_type_ids", {ids.dtype, ids.shape, reinterpret_cast<std::byte*>(types.data())}});
    }
  }
  if (has_target(first)) {
    feeds.push_back({"decoder_input_ids", target.ids()});
    feeds.push_back({"decoder_attention_mask", target.mask()});
  }
  std::optional<JoinedTensors> given;
  if (!first.given.name.empty()) {
    given.emplace(works);
    feeds.push_back({first.given.name, given->tensor()});
    if (!first.given.lengths.empty()) feeds.push_back({first.given.mask_name, given->mask()});
  }

  std::vector<Session::Fetch> fetches;
  for (const std::string_view name : wanted_outputs(works)) fetches.push_back({name, {}, {}});
  first.variant->session->run(feeds, fetches, stop);

  std::size_t row = 0;
  for (TokensWork* work : works) {
    const std::size_t rows = work->count();
    work->padded_source = source.longest();
    work->padded_target = target.longest();
    work->results.clear();
    for (const std::string& name : work->outputs) {
      const OwnedTensor& made =
          std::ranges::find(fetches, std::string_view(name), &Session::Fetch::name)->made;
      work->results.push_back(by_sequence(session, name) ? rows_of(made, row, rows) : made);
    }
    row += rows;
  }
}

}  // namespace attnserve::engine
