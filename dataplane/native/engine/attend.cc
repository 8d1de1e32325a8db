#include "engine/attend.h"

#include <bit>

#include "engine/joining.h"
#include "engine/run.h"

namespace attnserve::engine {
namespace {

constexpr std::array<std::string_view, kFeeds> kFeedNames = {
    "query",        "key",  "value",   "hidden_states",  "context",
    "key_lengths",  "bias", "sinks",   "prefix_lengths", "cu_seqlens_q",
    "cu_seqlens_k", "mask", "softcap", "top_k",          "distances"};
constexpr std::array<std::string_view, kResults> kResultNames = {
    "output",        "weights",      "entropy",          "top_k_indices",
    "top_k_weights", "mass_per_key", "mass_by_distance", "log_sum_exp"};

// Requests below this are not worth the additional runs.
constexpr std::size_t kLeastPartedBytes = std::size_t{2} << 20;

std::uint64_t bits_of(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

// Flags of a batch key, in one number; above them how many kv heads a part has, 0: it is no part.
constexpr unsigned kPartShift = 8;

// The rows of heads [first, last) of [1, heads, length, dim].
Tensor heads_of(Tensor tensor, std::int64_t first, std::int64_t last) {
  const auto bytes_per_head =
      static_cast<std::size_t>(tensor.shape[2] * tensor.shape[3]) * item_bytes(tensor.dtype);
  tensor.data += static_cast<std::size_t>(first) * bytes_per_head;
  tensor.shape[1] = last - first;
  return tensor;
}

}  // namespace

std::string_view name_of(Feed feed) { return kFeedNames[static_cast<std::size_t>(feed)]; }
std::string_view name_of(Result result) { return kResultNames[static_cast<std::size_t>(result)]; }

// Up to 8 each length is a bucket of its own: decoding steps run by another path of the kernels.
// From there on there are four steps between powers of two.
std::int64_t bucket(std::int64_t length) {
  if (length <= 8) return length;
  const auto bits = std::bit_width(static_cast<std::uint64_t>(length - 1));
  const std::int64_t step = std::int64_t{1} << (bits - 3);  // at least 2
  return (length + step - 1) / step * step;
}

BatchKey batch_key(const Model& model, const Variant& variant, const Variant* diagnosis,
                   const Wanted& wanted, const Dims& dims, std::optional<float> softcap,
                   bool apart) {
  const bool masked = variant.session->takes(name_of(Feed::kKeyLengths));
  // What is summed over queries, or counts positions from the last one, bears no padded queries.
  const bool exact_keys = wanted.diagnosed() || !masked;
  const bool exact_queries = exact_keys || model.facts.bottom_right;
  std::uint64_t flags = 0;
  unsigned place = 0;
  for (const bool flag : {wanted.output, wanted.weights, wanted.entropy, wanted.mass_per_key,
                          softcap.has_value(), apart, wanted.log_sum_exp}) {
    flags |= std::uint64_t{flag} << place++;
  }
  flags |= std::uint64_t{std::bit_cast<std::uint32_t>(softcap.value_or(0.0F))} << 32U;
  const auto length = [](std::int64_t given, bool exact) {
    return static_cast<std::uint64_t>(exact ? given : bucket(given));
  };
  return {bits_of(&model),
          bits_of(&variant),
          bits_of(diagnosis),
          flags,
          static_cast<std::uint64_t>(wanted.top_k),
          static_cast<std::uint64_t>(wanted.mass_by_distance),
          length(dims.query_len, exact_queries),
          length(dims.key_len, exact_keys)};
}

void attend_together(std::span<AttendWork* const> works, Stop* stop) {
  if (works.size() == 1) return attend(*works.front(), stop);
  const JoinedWork joined(works);
  attend(joined.work(), stop);
  joined.share();
}

// Of one sequence only: the heads of several do not lie side by side. With the output alone: the
// operator that gives it takes any number of heads.
bool divisible(const AttendWork& work, std::size_t tensor_bytes) {
  return work.dims.batch == 1 && tensor_bytes >= kLeastPartedBytes &&
         work.variant->session->any_heads() && work.joinable && !work.wanted.weights &&
         !work.wanted.diagnosed() && !work.wanted.log_sum_exp;
}

AttendWork part_of(const AttendWork& work, std::int64_t first, std::int64_t last) {
  const auto feed = [](AttendWork& of, Feed which) -> Tensor& {
    return of.feeds[static_cast<std::size_t>(which)];
  };
  AttendWork part = work;
  const std::int64_t kv_heads = feed(part, Feed::kKey).shape[1];
  const std::int64_t sharing = work.dims.num_heads / kv_heads;
  Tensor& output = part.results[static_cast<std::size_t>(Result::kOutput)];
  for (Tensor* tensor : {&feed(part, Feed::kQuery), &output}) {
    *tensor = heads_of(*tensor, first * sharing, last * sharing);
  }
  for (Tensor* tensor : {&feed(part, Feed::kKey), &feed(part, Feed::kValue)}) {
    *tensor = heads_of(*tensor, first, last);
  }
  if (Tensor& sinks = feed(part, Feed::kSinks); sinks.data != nullptr) {
    sinks.data += static_cast<std::size_t>(first * sharing) * item_bytes(sinks.dtype);
    sinks.shape = {(last - first) * sharing};
  }
  part.dims.num_heads = (last - first) * sharing;
  part.key[3] |= static_cast<std::uint64_t>(last - first) << kPartShift;
  part.joinable = false;
  return part;
}

}  // namespace attnserve::engine
