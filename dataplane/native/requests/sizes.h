// What a request takes and what its answer will hold.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/attend.h"
#include "engine/model.h"
#include "requests/attend.h"
#include "requests/limits.h"
#include "requests/wide.h"
#include "wire/attention.h"

namespace attnserve::requests {

using TensorSpecs = std::array<std::optional<TensorSpec>, wire::kInputs>;

// All tensors of a request, or of an answer. Throw RequestError RESOURCE_EXHAUSTED: they take more
// bytes than is allowed.
void check_request_bytes(Wide total, const Limits& limits);
void check_response_bytes(Wide total, const Limits& limits);

// Of all tensors of a request. Throws RequestError RESOURCE_EXHAUSTED: more than is allowed.
std::size_t checked_request_bytes(const TensorSpecs& specs, const Limits& limits);

struct Results {
  std::vector<wire::ResultSpec> specs;  // in the order of their field numbers
  std::size_t byte_size = 0;
};

// The tensors of the answer. `layer_output`: the shape of a layer's output; nullptr: a core's.
// Throws RequestError RESOURCE_EXHAUSTED: they take more than is allowed.
Results checked_results(const engine::Model& model, const Shape* layer_output,
                        const engine::Dims& dims, const engine::Wanted& wanted,
                        const Limits& limits);

// Estimated memory that a variant takes while it runs. Throws RequestError RESOURCE_EXHAUSTED: more
// than a request may take.
std::size_t checked_working_bytes(const engine::Model& model, const engine::Variant& variant,
                                  const engine::Dims& dims, std::size_t tensor_bytes,
                                  const Limits& limits);

// Of the mask that hides padded queries of self-attention from what is said of the weights: a
// boolean bias is written out for it. 0 where there is none.
std::size_t without_padding_bytes(const engine::Model& model, const TensorSpecs& specs,
                                  const engine::Dims& dims);

// Where the answer's tensors, of so many bytes each, go. Throws RequestError INVALID_ARGUMENT: they
// do not fit there.
Region checked_output_region(const wire::RegionMessage& message,
                             std::span<const std::size_t> byte_sizes);
Region checked_output_region(const wire::RegionMessage& message,
                             const std::vector<wire::ResultSpec>& results);

}  // namespace attnserve::requests
