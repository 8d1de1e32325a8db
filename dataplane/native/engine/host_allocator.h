// Where ONNX Runtime's computations on the CPU get their memory. Private to engine/.
#pragma once

#include "engine/onnxruntime_abi.h"

namespace attnserve::engine {

// Memory from the pool that requests have theirs from, which is bounded and trimmed: ONNX Runtime's
// own arena keeps all that a large request ever needed. `info` says that it is the host's; both
// live until the process ends. Called once for an environment.
ort::HostAllocator* host_allocator(const ort::MemoryInfo* info);

}  // namespace attnserve::engine
