#include "requests/variants.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>

#include "wire/attention.h"

namespace attnserve::requests {
namespace {

// The outputs of a variant that says what the weights say.
constexpr std::array<std::string_view, 5> kDiagnostics{
    "entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights"};

// A few names, each a literal.
struct Names {
  std::array<std::string_view, wire::kInputs + 1> names;
  std::size_t count = 0;
  void add(std::string_view name) { names[count++] = name; }
  std::span<const std::string_view> all() const { return {names.data(), count}; }
};

Names input_names(const TensorSpecs& specs, bool softcap, bool with_value) {
  Names inputs;
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    const auto input = static_cast<wire::Input>(at);
    if (specs[at] && (with_value || input != wire::Input::kValue)) inputs.add(name_of(input));
  }
  if (softcap) inputs.add("softcap");
  return inputs;
}

}  // namespace

Graphs chosen_graphs(const engine::Model& model, std::string_view forced, const TensorSpecs& specs,
                     bool softcap, const engine::Wanted& wanted, const engine::Dims& dims) {
  Names inputs = input_names(specs, softcap, true);
  Names given;
  if (wanted.output) given.add("output");
  if (wanted.log_sum_exp) given.add("log_sum_exp");
  std::span<const std::string_view> outputs;
  Graphs graphs;
  if (wanted.weights) {
    given.add("weights");
    if (dims.packed > 0 && wanted.diagnosed()) {
      // Weights alone do not say where sequences begin.
      graphs.diagnosis = model.find(input_names(specs, softcap, false).all(), kDiagnostics);
    }
  } else if (wanted.diagnosed()) {
    const engine::Variant* named = forced.empty() ? nullptr : model.named(forced);
    // Weights do not depend on value.
    const Names without_value = input_names(specs, softcap, false);
    if (dims.packed > 0 || named == nullptr || !named->session->gives("weights")) {
      graphs.diagnosis = model.find(without_value.all(), kDiagnostics);
    }
    if (graphs.diagnosis == nullptr) {
      given.add("weights");
    } else if (given.count == 0) {
      outputs = kDiagnostics;
      inputs = without_value;
    }
  }
  if (outputs.empty()) outputs = given.all();
  const std::int64_t longest = std::max(dims.query_len, dims.key_len);
  graphs.variant = &model.choose(forced, inputs.all(), outputs, longest);
  return graphs;
}

}  // namespace attnserve::requests
