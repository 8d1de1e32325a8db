// How queues of a bounded length refuse.
#pragma once

#include <chrono>
#include <cstddef>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::services {

inline Status too_many_waiting(std::size_t most) {
  return {Code::kResourceExhausted,
          text("requests: ", most, " of this kind are waiting; allowed: ", most),
          std::chrono::milliseconds(100)};
}

}  // namespace attnserve::services
