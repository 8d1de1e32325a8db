// PutTensor of attnserve.v1.AttentionService: a tensor that stays in the server.
#pragma once

#include <algorithm>
#include <cstdint>

#include "services/unary.h"

namespace attnserve::services {

// A lease as callers send it, in microseconds; far beyond any that a server allows it is cut, since
// it would not fit into a duration.
inline Duration lease_of(std::uint64_t microseconds) {
  constexpr std::uint64_t kLongest = 1'000'000ULL * 3600 * 24 * 365;
  return std::chrono::microseconds(std::min(microseconds, kLongest));
}

// What PutTensor and RenewTensor answer.
Delivery stored_delivery(const sessions::Stored& stored);

std::unique_ptr<grpc::CallHandler> put_tensor_handler(Core& core, std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
