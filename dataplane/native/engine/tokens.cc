#include "engine/tokens.h"

#include <algorithm>
#include <cstring>
#include <functional>
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

BatchKey batch_key(const TokensWork& work) {
  // Works whose outputs differ may run together all the same: a hash that is equal by chance costs
  // outputs that not all of them want.
  std::uint64_t outputs = 0;
  for (const std::string& name : work.outputs) {
    outputs = outputs * 31 + std::hash<std::string_view>{}(name);
  }
  return {reinterpret_cast<std::uintptr_t>(work.model.get()),
          reinterpret_cast<std::uintptr_t>(work.variant), outputs,
          static_cast<std::uint64_t>(bucket(work.source.longest())),
          static_cast<std::uint64_t>(has_target(work) ? bucket(work.target.longest()) : 0)};
}

std::size_t hidden_bytes(const TokensWork& work) {
  const std::size_t tokens =
      static_cast<std::size_t>(work.source.longest() + work.target.longest());
  return sizeof(float) * work.source.count() * tokens *
         static_cast<std::size_t>(work.model->facts.hidden_size);
}

void attend_tokens_together(std::span<TokensWork* const> works, Stop* stop) {
  const TokensWork& first = *works.front();
  const Session& session = *first.variant->session;
  const std::int64_t pad = first.model->facts.pad_token_id;

  PaddedTokens source(works, &TokensWork::source, pad);
  PaddedTokens target(works, &TokensWork::target, pad);
  std::vector<Session::Feed> feeds = {{"input_ids", source.ids()},
                                      {"attention_mask", source.mask()}};
  std::vector<std::int64_t> types;
  if (session.takes("token_type_ids")) {
    types = padded_types(works, static_cast<std::size_t>(source.longest()));
    const Tensor ids = feeds.front().tensor;
    feeds.push_back(
        {"token_type_ids", {ids.dtype, ids.shape, reinterpret_cast<std::byte*>(types.data())}});
  }
  if (has_target(first)) {
    feeds.push_back({"decoder_input_ids", target.ids()});
    feeds.push_back({"decoder_attention_mask", target.mask()});
  }

  std::vector<Session::Fetch> fetches;
  for (const std::string_view name : wanted_outputs(works)) fetches.push_back({name, {}, {}});
  first.variant->session->run(feeds, fetches, stop);

  std::size_t row = 0;
  for (TokensWork* work : works) {
    const std::size_t rows = work->source.count();
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
