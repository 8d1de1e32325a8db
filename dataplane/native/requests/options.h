// What a request asks for beside its tensors: scale, softcap, what to return, priority.
#pragma once

#include <cstdint>
#include <optional>

#include "engine/attend.h"
#include "engine/model.h"
#include "wire/attention.h"

namespace attnserve::requests {

struct ScoreOptions {
  double query_factor = 1.0;     // what query is multiplied by to give the scale asked for
  std::optional<float> softcap;  // unlike the model's own
};

// Throws RequestError INVALID_ARGUMENT, or FAILED_PRECONDITION for a softcap that cannot be turned
// off.
ScoreOptions checked_score_options(const wire::AttendRequest& message, const engine::Model& model);

// Throws RequestError INVALID_ARGUMENT.
engine::Wanted checked_wanted(const wire::ReturnOptions& returns, const engine::Dims& dims);

// 0 is kNormal. Throws RequestError INVALID_ARGUMENT: there is no such priority.
std::uint32_t checked_priority(std::uint32_t given);

}  // namespace attnserve::requests
