// A call whose caller showed a JSON Web Token that nobody has checked yet. The control plane does,
// once for each token; meanwhile nothing of the body is delivered, and the caller may send no more
// of it than a narrow window (see Http2Connection::narrow).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <variant>

#include "grpc/call.h"
#include "services/core.h"

namespace attnserve::services {

// As the path of a request to the control plane, whose message is the token. Whoever answers it has
// told `Callers::admit` before.
constexpr std::string_view kCheckWebToken = "/attnserve/CheckWebToken";

// Accepts the call, now that the token has been checked. On the connection's thread.
using AcceptChecked =
    std::function<std::variant<grpc::Reception, Status>(std::shared_ptr<grpc::Call>)>;

// `method`: as it is counted.
std::variant<grpc::Reception, Status> pending(Core& core, const std::shared_ptr<grpc::Call>& call,
                                              std::string_view token, const std::string& method,
                                              AcceptChecked accept);

}  // namespace attnserve::services
