// The tensors that a core or layer model takes and gives, by the names of the Open Inference
// Protocol, as messages list them.
#pragma once

#include <string>

#include "engine/model.h"

namespace attnserve::requests {

std::string input_names(const engine::Model& model);   // "query, key, value, key_lengths"
std::string output_names(const engine::Model& model);  // "output, weights, ..."

}  // namespace attnserve::requests
