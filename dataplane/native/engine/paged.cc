#include "engine/paged.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "base/copy.h"

namespace attnserve::engine {
namespace {

// More new tokens of a sequence than this are computed by tiles, in another time for each pair of
// query and key.
constexpr std::int64_t kFewTokens = 8;
// What a sequence costs beside its keys, and a run beside its sequences, in keys.
constexpr std::int64_t kSequenceUnits = 64, kRunUnits = 256;
constexpr std::size_t kTileBytes = std::size_t{1} << 20;
// What graphs that make heads themselves hold of them, each as large as the query in FP32 at most:
// query, key and value, the first two turned, and the output.
constexpr std::size_t kHeadCopies = 6;

std::uint64_t bits_of(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

Tensor integers(std::span<const std::int64_t> values) {
  // An empty tensor has a place too.
  static std::int64_t nothing = 0;
  const std::int64_t* data = values.empty() ? &nothing : values.data();
  return {DataType::kInt64,
          {static_cast<std::int64_t>(values.size())},
          reinterpret_cast<std::byte*>(const_cast<std::int64_t*>(data))};
}

// Bytes of one token's row.
std::size_t row_bytes(const Tensor& tensor) {
  std::size_t bytes = item_bytes(tensor.dtype);
  for (std::size_t axis = 1; axis < tensor.shape.rank(); ++axis) {
    bytes *= static_cast<std::size_t>(tensor.shape[axis]);
  }
  return bytes;
}

// The same without tokens: to the operator it is absent.
Tensor none_of(Tensor tensor) {
  alignas(std::max_align_t) static std::byte nothing[1];
  tensor.shape[0] = 0;
  tensor.data = nothing;
  return tensor;
}

// Of each new token in its sequence: as many keys are before it, in a tree on its path.
std::vector<std::int64_t> positions_of(const PagedWork& work) {
  std::vector<std::int64_t> positions;
  positions.reserve(static_cast<std::size_t>(work.starts.back()));
  for (std::size_t at = 0; at < work.lengths.size(); ++at) {
    const std::int64_t begin = work.starts[at], count = work.starts[at + 1] - begin;
    const std::int64_t before = work.lengths[at] - count;
    for (std::int64_t token = 0; token < count; ++token) {
      const std::int64_t parent =
          work.parents.empty() ? token - 1 : work.parents[static_cast<std::size_t>(begin + token)];
      positions.push_back(parent < 0 ? before
                                     : positions[static_cast<std::size_t>(begin + parent)] + 1);
    }
  }
  return positions;
}

class Run {
 public:
  explicit Run(const PagedWork& work)
      : work_(work),
        spec_{work.spec.page_tokens,
              work.spec.cache_type,
              work.spec.window,
              work.spec.kept_first,
              work.spec.causal ? 1 : 0,
              work.spec.latent ? 1 : 0,
              work.entropy.data != nullptr ? 1 : 0} {
    if (takes_positions(*work.variant)) positions_ = positions_of(work);
  }

  void attend(bool adds_keys, Stop* stop) {
    const auto [key, value] = keys(adds_keys);
    std::array<Session::Fetch, 4> fetches;
    std::size_t count = 0;
    const auto fetch = [&](std::string_view name, const Tensor& into) {
      if (into.data == nullptr) return;
      fetches[count].name = name;
      fetches[count++].into = into;
    };
    fetch("output", work_.output);
    fetch("log_sum_exp", work_.log_sum_exp);
    fetch("entropy", work_.entropy);
    const Bytes memory = add_weights(fetch);
    run(work_.query, key, value, work_.starts, work_.parents, work_.weights_of,
        {fetches.data(), count}, stop);
    if (memory.empty()) return;
    const std::byte* from = memory.data();
    for (const Tensor& weights : work_.weights) {
      copy_bytes(weights.data, from, weights.byte_size());
      from += weights.byte_size();
    }
  }

  // The new keys alone.
  void store(Stop* stop) {
    const auto [key, value] = keys(true);
    std::array<Session::Fetch, 1> fetches;
    fetches[0].name = "output";
    run(none_of(work_.query), key, value, work_.key_starts, {}, {}, fetches, stop);
  }

 private:
  std::pair<Tensor, Tensor> keys(bool adds) const {
    const Tensor no_value = none_of(work_.value);
    if (!adds) return {none_of(work_.key), no_value};
    return {work_.key, work_.spec.latent ? no_value : work_.value};
  }

  // The weights of one sequence are computed where they are wanted, those of several one after
  // another in memory that is returned.
  template <class Add>
  Bytes add_weights(const Add& fetch) const {
    if (work_.weights.empty()) return {};
    if (work_.weights.size() == 1) {
      Tensor all = work_.weights.front();
      all.shape = {all.shape.elements()};
      fetch("weights", all);
      return {};
    }
    std::int64_t count = 0;
    for (const Tensor& weights : work_.weights) count += weights.shape.elements();
    Bytes memory = Bytes::allocate(static_cast<std::size_t>(count) * sizeof(float));
    fetch("weights", Tensor{DataType::kFp32, {count}, memory.data()});
    return memory;
  }

  void run(const Tensor& query, const Tensor& key, const Tensor& value,
           std::span<const std::int64_t> starts, std::span<const std::int64_t> parents,
           std::span<const std::int64_t> weights_of, std::span<Session::Fetch> fetches,
           Stop* stop) {
    const Tensor cache{
        DataType::kUint8, {static_cast<std::int64_t>(work_.cache.size())}, work_.cache.data()};
    // More than a graph takes: query, key and value, or hidden states; positions or none.
    const std::array<Session::Feed, 14> feeds{{{"query", query},
                                               {"key", key},
                                               {"value", value},
                                               {"cache", cache},
                                               {"starts", integers(starts)},
                                               {"lengths", integers(work_.lengths)},
                                               {"table_starts", integers(work_.table_starts)},
                                               {"table", integers(work_.table)},
                                               {"spec", integers(spec())},
                                               {"parents", integers(parents)},
                                               {"weights_of", integers(weights_of)},
                                               {"hidden_states", work_.hidden_states},
                                               {"positions", integers(positions_)},
                                               {"sinks", work_.sinks}}};
    work_.variant->session->run(feeds, fetches, stop);
  }

  // Graphs exported earlier take fewer numbers.
  std::span<const std::int64_t> spec() const {
    for (const Port& port : work_.variant->session->inputs()) {
      if (port.name != "spec" || port.shape.size() != 1 || port.shape[0] < 0) continue;
      return std::span(spec_).first(
          std::min(spec_.size(), static_cast<std::size_t>(port.shape[0])));
    }
    return spec_;
  }

  const PagedWork& work_;
  const std::array<std::int64_t, 7> spec_;
  std::vector<std::int64_t> positions_;
};

void attend(const PagedWork& work, Stop* stop) {
  Run run(work);
  const bool adds_keys = work.key.data != nullptr;
  // Where queries and keys are not the same tokens, the operator takes them one after the other.
  const bool apart = adds_keys && !work.spec.causal;
  if (apart) run.store(stop);
  run.attend(adds_keys && !apart, stop);
}

// Appends offsets that count on from what the others end with.
void append_starts(std::vector<std::int64_t>& all, std::span<const std::int64_t> starts) {
  const std::int64_t before = all.back();
  for (const std::int64_t start : starts.subspan(1)) all.push_back(before + start);
}

// Several works as one, with memory of its own.
class JoinedPaged {
 public:
  explicit JoinedPaged(std::span<PagedWork* const> works) : works_(works) {
    const PagedWork& first = *works.front();
    joint_.variant = first.variant;
    joint_.spec = first.spec;
    joint_.cache = first.cache;
    joint_.sinks = first.sinks;
    std::int64_t tokens = 0, sequences = 0;
    bool trees = false;
    for (const PagedWork* work : works) {
      tokens += work->query.shape[0];
      trees |= !work->parents.empty();
      append_starts(starts_, work->starts);
      append_starts(joint_.table_starts, work->table_starts);
      joint_.lengths.insert(joint_.lengths.end(), work->lengths.begin(), work->lengths.end());
      joint_.table.insert(joint_.table.end(), work->table.begin(), work->table.end());
      for (const std::int64_t of : work->weights_of) joint_.weights_of.push_back(sequences + of);
      joint_.weights.insert(joint_.weights.end(), work->weights.begin(), work->weights.end());
      sequences += static_cast<std::int64_t>(work->lengths.size());
    }
    if (trees) join_parents();
    joint_.starts = joint_.key_starts = starts_;
    joint_.parents = parents_;
    joint_.query = first.query;
    joint_.query.shape[0] = tokens;
    // Of those that do not come, a graph is told dtype and shape all the same.
    joint_.key = first.key;
    joint_.value = first.value;
    if (first.hidden_states.data != nullptr) {
      gather(&PagedWork::hidden_states, tokens);
    } else {
      gather(&PagedWork::query, tokens);
    }
    if (first.key.data != nullptr) {
      gather(&PagedWork::key, tokens);
      if (!first.spec.latent) gather(&PagedWork::value, tokens);
    }
    for (const auto result : kResults) make_room(result, tokens);
  }
  JoinedPaged(const JoinedPaged&) = delete;
  JoinedPaged& operator=(const JoinedPaged&) = delete;

  const PagedWork& work() const { return joint_; }

  // After the run: puts each work's part of the results where it wants it.
  void share() const {
    for (const auto result : kResults) {
      const Tensor& joint = joint_.*result;
      if (joint.data == nullptr) continue;
      const std::byte* from = joint.data;
      for (PagedWork* work : works_) {
        const Tensor& own = work->*result;
        if (own.data != nullptr) std::memcpy(own.data, from, own.byte_size());
        from += static_cast<std::size_t>(work->query.shape[0]) * row_bytes(joint);
      }
    }
  }

 private:
  using Member = Tensor PagedWork::*;
  static constexpr std::array<Member, 3> kResults{&PagedWork::output, &PagedWork::log_sum_exp,
                                                  &PagedWork::entropy};

  void join_parents() {
    for (const PagedWork* work : works_) {
      if (!work->parents.empty()) {
        parents_.insert(parents_.end(), work->parents.begin(), work->parents.end());
        continue;
      }
      for (std::size_t at = 0; at + 1 < work->starts.size(); ++at) {
        const std::int64_t count = work->starts[at + 1] - work->starts[at];
        for (std::int64_t token = 0; token < count; ++token) parents_.push_back(token - 1);
      }
    }
  }

  void allocate(Member which, const Tensor& like, std::int64_t tokens) {
    Tensor& joint = joint_.*which;
    joint = like;
    joint.shape[0] = tokens;
    joint.data = memory_.emplace_back(Bytes::allocate(joint.byte_size())).data();
  }

  void gather(Member which, std::int64_t tokens) {
    allocate(which, works_.front()->*which, tokens);
    std::byte* to = (joint_.*which).data;
    for (const PagedWork* work : works_) {
      const Tensor& own = work->*which;
      copy_bytes(to, own.data, own.byte_size());
      to += own.byte_size();
    }
  }

  // If any work wants it.
  void make_room(Member which, std::int64_t tokens) {
    const auto wants = std::ranges::find_if(
        works_, [&](const PagedWork* work) { return (work->*which).data != nullptr; });
    if (wants != works_.end()) allocate(which, (**wants).*which, tokens);
  }

  std::span<PagedWork* const> works_;
  PagedWork joint_;
  std::vector<std::int64_t> starts_{0}, parents_;
  std::vector<Bytes> memory_;  // that joint_ views
};

}  // namespace

bool takes_positions(const Variant& paged) { return paged.session->takes("positions"); }
bool gives_weights(const Variant& paged) { return paged.session->takes("weights_of"); }
bool takes_sinks(const Variant& paged) { return paged.session->takes("sinks"); }

void PagedWork::add(std::int64_t length, std::span<const std::int64_t> pages) {
  lengths.push_back(length);
  table.insert(table.end(), pages.begin(), pages.end());
  table_starts.push_back(static_cast<std::int64_t>(table.size()));
}

BatchKey batch_key(const PagedWork& work) {
  std::int64_t most = 0;
  for (std::size_t at = 0; at + 1 < work.starts.size(); ++at) {
    most = std::max(most, work.starts[at + 1] - work.starts[at]);
  }
  const PagedSpec& spec = work.spec;
  const std::uint64_t flags =
      (std::uint64_t{spec.causal} << 0U) | (std::uint64_t{work.key.data != nullptr} << 1U) |
      (std::uint64_t{most > kFewTokens} << 2U) | (std::uint64_t{spec.latent} << 3U) |
      (static_cast<std::uint64_t>(spec.cache_type) << 8U);
  return {bits_of(work.variant), static_cast<std::uint64_t>(spec.page_tokens),
          bits_of(work.sinks.data), static_cast<std::uint64_t>(spec.window),
          static_cast<std::uint64_t>(spec.kept_first),
          static_cast<std::uint64_t>(work.query.shape[1]), flags,
          // No other work's key has this.
          ~std::uint64_t{0}};
}

std::int64_t units(const PagedWork& work) {
  const PagedSpec& spec = work.spec;
  std::int64_t sum = kRunUnits;
  for (std::size_t at = 0; at < work.lengths.size(); ++at) {
    const std::int64_t tokens = work.starts[at + 1] - work.starts[at];
    std::int64_t keys = work.lengths[at];
    if (spec.window >= 0) keys = std::min(keys, spec.window + 1 + spec.kept_first);
    sum += kSequenceUnits + (tokens > kFewTokens ? tokens : 1) * keys;
  }
  // A token's projections are about as much as attention to so many keys; so is reading weights.
  if (work.hidden_states.data != nullptr) {
    sum += (1 + work.starts.back()) * work.hidden_states.shape[1];
  }
  for (const std::int64_t of : work.weights_of) {
    const auto at = static_cast<std::size_t>(of);
    sum += (work.starts[at + 1] - work.starts[at]) * work.lengths[at];
  }
  return sum;
}

std::size_t working_bytes(const PagedWork& work) {
  std::size_t tensors = 0;
  for (const Tensor* tensor : {&work.query, &work.key, &work.value, &work.output}) {
    if (tensor->data != nullptr) tensors += tensor->byte_size();
  }
  if (work.hidden_states.data != nullptr) tensors += work.hidden_states.byte_size();
  if (work.hidden_states.data != nullptr || takes_positions(*work.variant)) {
    tensors += kHeadCopies * Tensor{DataType::kFp32, work.query.shape, nullptr}.byte_size();
  }
  for (const Tensor& weights : work.weights) tensors += weights.byte_size();
  return kTileBytes + 2 * tensors;
}

void attend_paged_together(std::span<PagedWork* const> works, Stop* stop) {
  if (works.size() == 1) return attend(*works.front(), stop);
  const JoinedPaged joined(works);
  attend(joined.work(), stop);
  joined.share();
}

}  // namespace attnserve::engine
