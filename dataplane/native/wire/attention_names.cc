// The tensors of AttendRequest and AttendResponse: names and numbers.
#include <algorithm>

#include "wire/attention.h"

namespace attnserve::wire {

namespace {

// The tensors of an answer have consecutive numbers from here on.
constexpr std::uint32_t kFirstField = 4;
constexpr std::array<std::uint32_t, kInputs> kInputFields{4, 5, 6, 7, 8, 9, 10, 17, 18, 19, 20};

constexpr std::array<std::string_view, kInputs> kInputNames{
    "query", "key",   "value",          "hidden_states", "context",     "key_lengths",
    "bias",  "sinks", "prefix_lengths", "cu_seqlens_q",  "cu_seqlens_k"};
constexpr std::array<std::string_view, kOutputs> kOutputNames{
    "output",        "weights",      "entropy",          "top_k_indices",
    "top_k_weights", "mass_per_key", "mass_by_distance", "log_sum_exp"};

template <class T, std::size_t N>
std::optional<T> find(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return std::nullopt;
  return static_cast<T>(found - names.begin());
}

}  // namespace

std::string_view name_of(Input input) { return kInputNames[static_cast<std::size_t>(input)]; }

std::string_view name_of(Output output) { return kOutputNames[static_cast<std::size_t>(output)]; }

std::uint32_t field_of(Input input) { return kInputFields[static_cast<std::size_t>(input)]; }

std::uint32_t field_of(Output output) { return kFirstField + static_cast<std::uint32_t>(output); }

std::optional<Input> input_of_field(std::uint64_t field) {
  const auto* found = std::ranges::find(kInputFields, field);
  if (found == kInputFields.end()) return std::nullopt;
  return static_cast<Input>(found - kInputFields.begin());
}

std::optional<Input> input_of_name(std::string_view name) { return find<Input>(kInputNames, name); }

std::optional<Output> output_of_name(std::string_view name) {
  return find<Output>(kOutputNames, name);
}

}  // namespace attnserve::wire
