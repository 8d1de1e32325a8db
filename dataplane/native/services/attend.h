// Attend, and the small methods beside it, of attnserve.v1.AttentionService.
#pragma once

#include "services/unary.h"

namespace attnserve::services {

UnaryBehaviour attend(Core& core);
UnaryBehaviour renew_tensor(Core& core);
UnaryBehaviour drop_tensor(Core& core);
UnaryBehaviour register_shared_memory(Core& core);
UnaryBehaviour unregister_shared_memory(Core& core);

// The elements that came within a message, by input.
std::array<ByteSpan, wire::kInputs> inline_elements(const wire::AttendRequest& message);

}  // namespace attnserve::services
