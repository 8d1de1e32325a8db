// The tensors of a request of the Open Inference Protocol: what was given, and what is asked for.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "requests/infer_parameters.h"
#include "wire/attention.h"
#include "wire/open_inference.h"

namespace attnserve::requests {

// One output that was asked for, before it is known whether the model has it.
struct Wish {
  std::string_view name;
  std::optional<wire::Output> output;  // none: no model has it
  std::optional<SharedPlaces::Place> place;
  const wire::Parameters* parameters;  // of the message; nullptr: it names no outputs
};

// What a request names, in its order; the main output if it names none. Throws RequestError: a name
// comes twice, or its shared memory cannot be used.
std::vector<Wish> wishes_of(const wire::InferRequest& message, SharedPlaces& places);

// The inputs of a request, for the names that any model has.
struct Inputs {
  std::array<const wire::InferInput*, wire::kInputs> tensors{};
  std::array<ByteSpan, wire::kInputs> elements{};
  std::array<bool, wire::kInputs> shared{};
  std::optional<std::string_view> unknown;  // the first name that no model has
};

// Throws RequestError: they are not as the protocol has them.
Inputs inputs_of(const wire::InferRequest& message, SharedPlaces& places);

}  // namespace attnserve::requests
