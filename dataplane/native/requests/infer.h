// Requests of the Open Inference Protocol, made into the same plans as all others.
// Codes and messages are part of the API: docs/open-inference-protocol.md.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "requests/attend.h"
#include "wire/open_inference.h"

namespace attnserve::requests {

// One output that was asked for, in the order of the request.
struct AskedOutput {
  std::size_t result = 0;        // index into plan.results
  std::optional<Region> region;  // where it goes; none: into the answer
  MutableByteSpan place;         // the region's bytes, while InferPlan::regions lives
  // The shared-memory parameters to repeat in the answer, as given.
  wire::Parameters parameters;  // views into the request's message
};

struct InferPlan {
  AttendPlan attend;
  std::array<ByteSpan, wire::kInputs>
      elements;               // views into the message, `memory` or shared memory
  std::vector<Bytes> memory;  // elements that came one by one, with what they are charged
  std::vector<AskedOutput> outputs;
  std::uint64_t timeout = 0;                  // microseconds; 0: none
  std::vector<sessions::RegionView> regions;  // that elements lie in, or outputs go to
};

// For core and layer models; FAILED_PRECONDITION for others. `model` is what models.get answered
// for it. Parameters that nobody here knows, of the request or of its tensors, are ignored, as
// Triton does; known ones are checked. Takes the elements of `contents` out of the message. Throws
// RequestError.
InferPlan plan_infer(wire::InferRequest& message, engine::ModelPtr model, const Context& context,
                     std::string_view peer);

// The results of a plan as the answer's outputs, in the order asked for: names, datatypes, shapes.
// Throws RequestError RESOURCE_EXHAUSTED if those that go into the answer exceed max_message_bytes,
// INVALID_ARGUMENT if one is larger than its region.
std::vector<wire::InferResult> answer_outputs(const InferPlan& plan, const Limits& limits);

}  // namespace attnserve::requests
