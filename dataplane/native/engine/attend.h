// Attentions that have been checked: computed alone, several as one, or some heads at a time.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"
#include "engine/model.h"

namespace attnserve::engine {

// Graph inputs of an attention; the first eleven are numbered as wire::Input.
enum class Feed : std::uint8_t {
  kQuery,
  kKey,
  kValue,
  kHiddenStates,
  kContext,
  kKeyLengths,
  kBias,
  kSinks,
  kPrefixLengths,
  kCuSeqlensQ,
  kCuSeqlensK,
  kMask,
  kSoftcap,
  kTopK,
  kDistances
};
constexpr std::size_t kFeeds = 15;
std::string_view name_of(Feed feed);  // "top_k"

// Results of an attention, numbered as wire::Output.
enum class Result : std::uint8_t {
  kOutput,
  kWeights,
  kEntropy,
  kTopKIndices,
  kTopKWeights,
  kMassPerKey,
  kMassByDistance,
  kLogSumExp
};
constexpr std::size_t kResults = 8;
std::string_view name_of(Result result);

// What to return of an attention.
struct Wanted {
  bool output = true, weights = false, entropy = false;
  std::int64_t top_k = 0;
  bool mass_per_key = false;
  std::int64_t mass_by_distance = 0;
  bool log_sum_exp = false;
  bool diagnosed() const { return entropy || top_k || mass_per_key || mass_by_distance; }
  bool operator==(const Wanted&) const = default;
};

struct Dims {
  std::int64_t batch = 1, num_heads = 1, query_len = 1, key_len = 1;
  std::int64_t packed = 0;  // sequences that lie one after another in a batch of 1; 0: they do not
  std::int64_t sequences() const { return packed > 0 ? packed : batch; }
};

// Equal for works that can run as one if both are joinable, and that take alike long a sequence.
using BatchKey = std::array<std::uint64_t, 8>;

// One attention: checked, complete, ready to run. Feeds and results are views; whoever made the
// work keeps their memory until it has run. Results may be unaligned.
struct AttendWork {
  ModelPtr model;
  const Variant* variant = nullptr;  // gives output and weights or, if neither is wanted, the rest
  const Variant* diagnosis =
      nullptr;  // gives what the weights say; nullptr: nothing, or from weights
  Wanted wanted;
  Dims dims;
  std::array<Tensor, kFeeds> feeds;      // data == nullptr: absent
  std::array<Tensor, kResults> results;  // where to put what is wanted; data == nullptr: not wanted
  BatchKey key{};
  bool joinable = false;
};

// The length that a bucket of lengths ends with: less than a quarter of it is padding.
std::int64_t bucket(std::int64_t length);

// The key of a work with these: equal ones can be joined, and take alike long for each sequence.
// `softcap`: other than the model's own. `apart`: with a bias or sinks of its own, or packed; such
// are never joined.
BatchKey batch_key(const Model& model, const Variant& variant, const Variant* diagnosis,
                   const Wanted& wanted, const Dims& dims, std::optional<float> softcap,
                   bool apart);

// Computes attentions of one key in one run, padded to the longest, and puts the results where each
// wants them. One work alone is computed without a copy. Throws as Session::run.
void attend_together(std::span<AttendWork* const> works, Stop* stop);

// Whether heads of a work can be computed by themselves, and the work of kv heads [first, last)
// with what belongs to them of query and output: views into the whole work's tensors.
bool divisible(const AttendWork& work, std::size_t tensor_bytes);
AttendWork part_of(const AttendWork& work, std::int64_t first, std::int64_t last);

}  // namespace attnserve::engine
