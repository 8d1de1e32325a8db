// Which graphs of a model compute a request.
#pragma once

#include <string_view>

#include "engine/attend.h"
#include "engine/model.h"
#include "requests/sizes.h"

namespace attnserve::requests {

struct Graphs {
  const engine::Variant* variant = nullptr;  // gives output and weights or, without, the rest
  const engine::Variant* diagnosis =
      nullptr;  // says what the weights say, if they need not be held
};

// `forced`: the variant asked for by name; empty: any. Throws RequestError as
// engine::Model::choose.
Graphs chosen_graphs(const engine::Model& model, std::string_view forced, const TensorSpecs& specs,
                     bool softcap, const engine::Wanted& wanted, const engine::Dims& dims);

}  // namespace attnserve::requests
