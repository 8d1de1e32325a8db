// What plans are made of, whichever protocol the request came by.
#pragma once

#include "engine/model.h"
#include "requests/attend.h"
#include "requests/sizes.h"
#include "wire/attention.h"

namespace attnserve::requests {

// plan_attend for a model that has been looked up; model and version of the message are not read.
AttendPlan plan_for(engine::ModelPtr model, const wire::AttendRequest& message,
                    const Context& context, std::string_view peer, bool chunks_allowed);

// Whether a request may be computed together with others: it brings nothing of its own that says
// who sees whom but lengths.
bool joinable(const TensorSpecs& specs, const engine::Dims& dims);

// Whether the graphs of a plan take an input.
bool takes(const AttendPlan& plan, engine::Feed feed);

// What a graph with an input for it is fed, if one of the plan's has it. Throws RequestError
// INVALID_ARGUMENT: neither the request nor the model says what. Never for a plan that was made.
float softcap_feed(const AttendPlan& plan);

}  // namespace attnserve::requests
