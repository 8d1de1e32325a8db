// PagedAttention as a kernel of ONNX Runtime.
#pragma once

#include <atomic>
#include <cstdint>

#include "attention.h"
#include "operator_context.h"

namespace attnserve {

struct PagedSettings {
  std::int64_t num_kv_heads, head_dim, value_head_dim;
  float scale, softcap;
};

// Run one batch; `stop` as Problem::stop. Throws Failure, or std::invalid_argument for what is
// wrong with the inputs.
void paged_attention(const Context& context, const PagedSettings& settings, Element element,
                     const std::atomic<bool>* stop);

}  // namespace attnserve
