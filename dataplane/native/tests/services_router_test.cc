// Who may call what: told from the headers, before any of a body.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "services/router.h"
#include "services_support.h"

using namespace attnserve;
using namespace attnserve::services;

namespace {

const std::string kAttention = "/attnserve.v1.AttentionService/";
const std::string kInference = "/inference.GRPCInferenceService/";

std::string digest_of(const std::string& token) {
  const identity::Digest digest = identity::sha256(token);
  return {digest.begin(), digest.end()};
}

CoreOptions guarded() {
  CoreOptions options;
  options.limits.max_bytes_in_flight = 1U << 20;
  options.kv.max_bytes = 0;
  options.callers.required = true;
  return options;
}

struct Served {
  Core core;
  Router router{core};

  explicit Served(const CoreOptions& options = guarded()) : core(options) {
    core.serving = true;
    core.callers.replace({{"i", identity::kInfer, "sha256", digest_of("infer"), {.calls = 2}},
                          {"s", identity::kSessions, "sha256", digest_of("sessions"), {}},
                          {"a", identity::kAdmin, "sha256", digest_of("admin"), {}},
                          {"m", identity::kMove, "sha256", digest_of("move"), {}},
                          {"n", 0, "sha256", digest_of("none"), {}}});
  }

  std::variant<grpc::Reception, Status> call(const std::string& path, const std::string& token,
                                             std::shared_ptr<NotedCall>* made = nullptr) {
    auto call = std::make_shared<NotedCall>(path, token.empty() ? "" : "Bearer " + token);
    if (made != nullptr) *made = call;
    return router.accept(call);
  }
  Code code(const std::string& path, const std::string& token) {
    const auto verdict = call(path, token);
    const Status* refused = std::get_if<Status>(&verdict);
    return refused ? refused->code : Code::kOk;
  }
};

}  // namespace

TEST_CASE("without a token that is known, nothing but probes is answered") {
  Served it;
  for (const char* method : {"Attend", "AttendStream", "AttendTokens", "Decode", "PutTensor",
                             "ListModels", "ServerInfo", "RegisterSharedMemory"}) {
    CHECK_MESSAGE(it.code(kAttention + method, "") == Code::kUnauthenticated, method);
    CHECK_MESSAGE(it.code(kAttention + method, "wrong") == Code::kUnauthenticated, method);
    CHECK_MESSAGE(it.code(kAttention + method, "none") == Code::kPermissionDenied, method);
  }
  CHECK(it.code("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "") ==
        Code::kUnauthenticated);
  for (const std::string& path :
       {std::string("/grpc.health.v1.Health/Check"), std::string("/grpc.health.v1.Health/Watch"),
        kInference + "ServerLive", kInference + "ServerReady"}) {
    CHECK_MESSAGE(it.code(path, "") == Code::kOk, path);
  }
  CHECK(it.code("/no/Method", "") == Code::kUnimplemented);
}

TEST_CASE("each role may do its own and no more") {
  Served it;
  const std::vector<std::pair<std::string, std::vector<std::string>>> allowed{
      {kAttention + "Attend", {"infer"}},
      {kAttention + "Decode", {"sessions"}},
      {kAttention + "MoveSession", {"move"}},
      {kAttention + "PutTensor", {"infer", "sessions"}},
      {kInference + "ModelInfer", {"infer"}},
      {kInference + "ModelStreamInfer", {"infer"}},
      {kInference + "RepositoryModelLoad", {"admin"}},
      {kInference + "RepositoryModelUnload", {"admin"}},
      {kInference + "ModelStatistics", {"admin"}},
      {kInference + "RepositoryIndex", {"infer", "sessions", "admin", "move"}},
      {kAttention + "ListModels", {"infer", "sessions", "admin", "move"}},
  };
  for (const auto& [path, roles] : allowed) {
    for (const char* role : {"infer", "sessions", "admin", "move"}) {
      const bool may = std::find(roles.begin(), roles.end(), role) != roles.end();
      CHECK_MESSAGE(it.code(path, role) == (may ? Code::kOk : Code::kPermissionDenied), path,
                    " by ", role);
    }
  }
}

TEST_CASE("a call knows its caller, whose bytes it is charged to, and is counted until its end") {
  Served it;
  std::shared_ptr<NotedCall> call;
  auto first = it.call(kAttention + "Attend", "infer", &call);
  REQUIRE(std::holds_alternative<grpc::Reception>(first));
  REQUIRE(call->info().caller);
  CHECK(call->info().caller->name == "i");
  CHECK(call->info().peer == "ipv4:127.0.0.1:4242@i");
  CHECK(call->info().authorization.empty());
  CHECK(std::get<grpc::Reception>(first).budget == &call->info().caller->in_flight);
  auto second = it.call(kAttention + "Attend", "infer");
  CHECK(std::holds_alternative<grpc::Reception>(second));
  CHECK(it.code(kAttention + "Attend", "infer") == Code::kResourceExhausted);  // two are allowed
  CHECK(it.code(kInference + "ServerLive", "") == Code::kOk);
  first = Status{};
  CHECK(it.code(kAttention + "Attend", "infer") == Code::kOk);
}

TEST_CASE("while sessions are moved nothing new is taken but what belongs to them") {
  Served it;
  it.core.moving = true;
  for (const char* method : {"Attend", "AttendStream", "AttendTokens"}) {
    CHECK_MESSAGE(it.code(kAttention + method, "infer") == Code::kUnavailable, method);
  }
  CHECK(it.code(kAttention + "MoveSession", "move") == Code::kUnavailable);
  CHECK(it.code(kAttention + "Decode", "sessions") == Code::kOk);
  CHECK(it.code(kAttention + "ServerInfo", "sessions") == Code::kOk);
}

TEST_CASE("where nobody need say who it is, all may do everything") {
  CoreOptions options = guarded();
  options.callers.required = false;
  Served it(options);
  std::shared_ptr<NotedCall> call;
  const auto accepted = it.call(kInference + "RepositoryModelUnload", "", &call);
  CHECK(std::holds_alternative<grpc::Reception>(accepted));
  CHECK(call->info().peer == "ipv4:127.0.0.1:4242");
  CHECK(it.code(kAttention + "Attend", "wrong") == Code::kOk);
}
