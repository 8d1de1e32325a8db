#include "requests/options.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>

#include "base/status.h"
#include "base/text.h"
#include "requests/attend.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

// Equal but for rounding: floats travel where manifests have doubles.
bool close(double one, double other, double tolerance) {
  return std::abs(one - other) <= tolerance * std::max(std::abs(one), std::abs(other));
}

}  // namespace

ScoreOptions checked_score_options(const wire::AttendRequest& message, const engine::Model& model) {
  ScoreOptions options;
  if (!message.scale && !message.softcap) return options;
  const engine::ModelFacts& facts = model.facts;
  if (facts.kind != engine::Kind::kCore) {
    const std::string_view name = message.scale ? "scale" : "softcap";
    refuse(name, number_text(message.scale ? *message.scale : *message.softcap),
           text("nothing for ", name_of(facts.kind), " models"));
  }
  if (message.scale) {
    const double scale = *message.scale;
    if (!std::isfinite(scale) || scale <= 0) {
      refuse("scale", number_text(scale), "a finite number above 0");
    }
    const double factor = scale / facts.scale;
    if (!std::isfinite(factor) || !close(factor, 1.0, 1e-7)) options.query_factor = factor;
  }
  if (!message.softcap) return options;
  const double softcap = *message.softcap;
  if (!std::isfinite(softcap) || softcap < 0) {
    refuse("softcap", number_text(softcap), "a finite number, 0 (off) or more");
  }
  if (close(softcap, facts.softcap, 1e-6)) return options;
  if (softcap == 0) {
    throw RequestError(Code::kFailedPrecondition,
                       text("softcap: given 0; model ", facts.name, " was exported with softcap ",
                            facts.softcap, "; allowed: a number above 0, or another model"));
  }
  options.softcap = message.softcap;
  return options;
}

engine::Wanted checked_wanted(const wire::ReturnOptions& returns, const engine::Dims& dims) {
  if (returns.top_k > dims.key_len) {
    refuse("returns.top_k", std::to_string(returns.top_k),
           text("0..", dims.key_len, ", the number of keys"));
  }
  const std::int64_t longest = std::max(dims.query_len, dims.key_len);
  if (returns.mass_by_distance > longest) {
    refuse("returns.mass_by_distance", std::to_string(returns.mass_by_distance),
           text("0..", longest, ", the longest length"));
  }
  const engine::Wanted wanted{
      .output = !returns.no_output,
      .weights = returns.weights,
      .entropy = returns.entropy,
      .top_k = returns.top_k,
      .mass_per_key = returns.mass_per_key,
      .mass_by_distance = returns.mass_by_distance,
      .log_sum_exp = returns.log_sum_exp,
  };
  if (!wanted.output && !wanted.weights && !wanted.diagnosed() && !wanted.log_sum_exp) {
    refuse("returns", "nothing to return", "at least one thing");
  }
  return wanted;
}

std::uint32_t checked_priority(std::uint32_t given) {
  if (given > kLow) {
    refuse("priority", std::to_string(given),
           text(kHigh, " (high), ", kNormal, " (normal), ", kLow, " (low), 0 (normal)"));
  }
  return given == 0 ? kNormal : given;
}

}  // namespace attnserve::requests
