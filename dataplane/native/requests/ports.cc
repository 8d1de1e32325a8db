#include "requests/ports.h"

#include <algorithm>
#include <memory>
#include <string_view>

namespace attnserve::requests {
namespace {

bool any_takes(const engine::Model& model, std::string_view name) {
  return std::ranges::any_of(model.variants, [&](const std::unique_ptr<engine::Variant>& variant) {
    return !variant->paged() && variant->session->takes(name);
  });
}

bool any_gives(const engine::Model& model, std::string_view name) {
  return std::ranges::any_of(model.variants, [&](const std::unique_ptr<engine::Variant>& variant) {
    return !variant->paged() && variant->session->gives(name);
  });
}

}  // namespace

std::string input_names(const engine::Model& model) {
  std::string names = "query, key, value";
  if (model.facts.kind != engine::Kind::kCore) {
    names = model.facts.context_dim ? "hidden_states, context" : "hidden_states";
  }
  for (const std::string_view name :
       {"key_lengths", "bias", "sinks", "prefix_lengths", "cu_seqlens_q", "cu_seqlens_k"}) {
    if (any_takes(model, name)) names.append(", ").append(name);
  }
  return names;
}

std::string output_names(const engine::Model& model) {
  std::string names = "output";
  const bool weights = any_gives(model, "weights");
  if (weights) names += ", weights";
  if (weights || any_gives(model, "entropy")) {
    names += ", entropy, top_k_indices, top_k_weights, mass_per_key, mass_by_distance";
  }
  if (any_gives(model, "log_sum_exp")) names += ", log_sum_exp";
  return names;
}

}  // namespace attnserve::requests
