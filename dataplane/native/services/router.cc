#include "services/router.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "services/attend.h"
#include "services/attend_stream.h"
#include "services/decode.h"
#include "services/handled.h"
#include "services/health.h"
#include "services/infer.h"
#include "services/move_session.h"
#include "services/pending.h"
#include "services/put_tensor.h"
#include "services/unary.h"

namespace attnserve::services {
namespace {

const std::string kAttention = "/attnserve.v1.AttentionService/";
const std::string kInference = "/inference.GRPCInferenceService/";
const std::string kHealth = "/grpc.health.v1.Health/";

// Messages of methods that take no tensors. Those of tokens are ids, text, pictures or sounds,
// which the control plane reads: bounded for its sake.
constexpr std::size_t kControlBytes = 1U << 20;
constexpr std::size_t kTokensBytes = 64U << 20;

// Methods of Triton's that are not here, and why.
constexpr std::pair<std::string_view, std::string_view> kMissing[] = {
    {"CudaSharedMemoryStatus", "this server takes no CUDA shared memory; use system shared memory"},
    {"CudaSharedMemoryRegister",
     "this server takes no CUDA shared memory; use system shared memory"},
    {"CudaSharedMemoryUnregister", "this server takes no CUDA shared memory"},
    {"LogSettings", "the log is set when the server starts, by --log-level and --log-format"},
};

// What callers must be allowed to do, one of them. Of methods that are not here, any of all; those
// with none are for everybody, as probes know no tokens.
struct Permission {
  const std::string& service;
  std::string_view method;
  identity::Roles roles;
};
using identity::kAdmin;
using identity::kInfer;
using identity::kMove;
using identity::kSessions;
const Permission kPermissions[] = {
    {kAttention, "Attend", kInfer},
    {kAttention, "AttendStream", kInfer},
    {kAttention, "AttendTokens", kInfer},
    {kAttention, "Decode", kSessions},
    {kAttention, "MoveSession", kMove},
    {kAttention, "PutTensor", kInfer | kSessions},
    {kAttention, "RenewTensor", kInfer | kSessions},
    {kAttention, "DropTensor", kInfer | kSessions},
    {kAttention, "RegisterSharedMemory", kInfer | kSessions},
    {kAttention, "UnregisterSharedMemory", kInfer | kSessions},
    {kInference, "ModelInfer", kInfer},
    {kInference, "ModelStreamInfer", kInfer},
    {kInference, "SystemSharedMemoryStatus", kInfer | kSessions},
    {kInference, "SystemSharedMemoryRegister", kInfer | kSessions},
    {kInference, "SystemSharedMemoryUnregister", kInfer | kSessions},
    {kInference, "ModelStatistics", kAdmin},
    {kInference, "RepositoryModelLoad", kAdmin},
    {kInference, "RepositoryModelUnload", kAdmin},
    {kInference, "TraceSetting", kAdmin},
    {kInference, "LogSettings", kAdmin},
    {kInference, "ServerLive", 0},
    {kInference, "ServerReady", 0},
    {kHealth, "Check", 0},
    {kHealth, "Watch", 0},
};

// What a call holds until it has ended.
struct Kept {
  Kept(identity::OpenCall open_, tracing::OpenRecording recording_)
      : open(std::move(open_)), recording(std::move(recording_)) {}

  identity::OpenCall open;
  tracing::OpenRecording recording;
};

}  // namespace

Router::Router(Core& core) : core_(core) {
  add_attention();
  add_inference();
  add_infrastructure();
  for (const Permission& each : kPermissions) {
    methods_.at(each.service + std::string(each.method)).roles = each.roles;
  }
}

Router::Accepted Router::accept(std::shared_ptr<grpc::Call> call) {
  const auto found = methods_.find(call->info().path);
  if (found == methods_.end()) return Status{Code::kUnimplemented, "Method not found!", {}};
  return accept_by(found->second, std::move(call), false);
}

Router::Accepted Router::accept_by(const Method& method, std::shared_ptr<grpc::Call> call,
                                   bool checked) {
  if (method.roles == 0) return method.accept(std::move(call));
  const grpc::CallInfo& info = call->info();
  identity::Callers& callers = core_.callers;
  identity::Verdict verdict;
  if (callers.required()) {
    const std::span<const std::string> names =
        info.certificate ? std::span(*info.certificate) : std::span<const std::string>();
    verdict = callers.recognize(info.authorization, names);
  } else {
    verdict = callers.at(sessions::address_of(info.peer));
  }
  if (auto* refused = std::get_if<Status>(&verdict)) return std::move(*refused);
  if (const auto* unchecked = std::get_if<identity::Unchecked>(&verdict)) {
    if (checked) return identity::unauthenticated("a token that has just run out");
    // Methods stay where they are.
    return pending(core_, call, unchecked->token, method.name,
                   [this, &method](std::shared_ptr<grpc::Call> again) {
                     return accept_by(method, std::move(again), true);
                   });
  }
  identity::OpenCall open;
  auto& who = std::get<identity::Recognized>(verdict);
  const std::shared_ptr<identity::Caller> caller = who.caller;
  if (auto refused = let_in(std::move(who), method, *call, open)) return std::move(*refused);
  tracing::OpenRecording recording = record(*call);
  Accepted accepted = method.accept(std::move(call));
  if (auto* reception = std::get_if<grpc::Reception>(&accepted)) {
    if (recording) recording->mark(tracing::Mark::kAdmitted, Clock::now());
    reception->budget = &caller->in_flight;
    reception->kept = std::make_shared<const Kept>(std::move(open), std::move(recording));
  } else if (recording) {
    recording->status(std::get<Status>(accepted).code);
  }
  return accepted;
}

// Callers that are not known, or may not do this, are recorded by nobody: they could fill traces.
tracing::OpenRecording Router::record(grpc::Call& call) {
  const grpc::CallInfo& info = call.info();
  if (!core_.recorder.wants(info.trace, info.arrived)) return {};
  tracing::Record begun;
  begun.context = info.trace;
  begun.trace_state = info.trace_state;
  begun.path = info.path;
  const std::string_view peer = info.peer;
  begun.peer =
      sessions::address_of(peer.substr(0, peer.size() - sessions::name_of_caller(peer).size()));
  begun.caller = info.caller->name;
  for (const auto& [name, value] : info.metadata) {
    if (name == "x-request-id") begun.request_id = value;
  }
  begun.marks[static_cast<std::size_t>(tracing::Mark::kArrived)] = info.arrived;
  const auto recording = core_.recorder.begin(std::move(begun));
  call.record(recording);
  return tracing::OpenRecording(recording);
}

std::optional<Status> Router::let_in(identity::Recognized who, const Method& method,
                                     grpc::Call& call, identity::OpenCall& open) {
  if ((who.roles & method.roles) == 0) return not_permitted(method, who.roles);
  if (auto refused = who.caller->enter(call.info().arrived, open)) return refused;
  const std::string name = who.caller->name;
  call.identify(std::move(who.caller), name, std::move(who.credential));
  return std::nullopt;
}

Status Router::not_permitted(const Method& method, identity::Roles roles) {
  return {Code::kPermissionDenied,
          text(method.name, ": given a caller that may ", identity::names_of(roles),
               "; allowed: one that may ", identity::names_of(method.roles)),
          {}};
}

std::optional<Status> Router::recheck(const grpc::CallInfo& info, bool trusted) {
  if (!info.caller || !info.credential) return std::nullopt;
  using Kind = identity::Credential::Kind;
  const bool certified = info.credential->kind == Kind::kCertificate;
  if (certified && !trusted) {
    return identity::unauthenticated("a certificate that is not trusted any more");
  }
  const std::span<const std::string> names =
      info.certificate ? std::span(*info.certificate) : std::span<const std::string>();
  const auto roles = core_.callers.still(*info.caller, *info.credential, names);
  if (!roles) {
    return identity::unauthenticated(certified ? "a certificate that it does not know any more"
                                               : "a token that was withdrawn, or has run out");
  }
  const Method& method = methods_.at(info.path);
  if ((*roles & method.roles) == 0) return not_permitted(method, *roles);
  return std::nullopt;
}

void Router::count(std::string_view path, Code code) {
  const auto found = methods_.find(std::string(path));
  if (found == methods_.end() || found->second.name.empty()) return;
  core_.statistics.count(found->second.name, code);
}

void Router::plain(const std::string& path, std::size_t bytes, UnaryBehaviour behaviour) {
  const std::string name = path.substr(path.rfind('/') + 1);
  methods_[path] = {name, [this, name, bytes, behaviour](std::shared_ptr<grpc::Call> call) {
                      return Accepted(grpc::Reception{
                          unary_handler(core_, std::move(call), name, {}, behaviour), bytes});
                    }};
}

void Router::admitted(const std::string& path, std::size_t bytes, UnaryBehaviour behaviour) {
  const std::string name = path.substr(path.rfind('/') + 1);
  methods_[path] = {
      name, [this, name, bytes, behaviour](std::shared_ptr<grpc::Call> call) -> Accepted {
        if (core_.moving) return schedule::shutting_down();
        auto place = Admitted::admit(core_, call->info().arrived, call->info().deadline);
        if (auto* refused = std::get_if<Status>(&place)) return std::move(*refused);
        return grpc::Reception{unary_handler(core_, std::move(call), name,
                                             std::move(std::get<Admitted>(place)), behaviour),
                               bytes};
      }};
}

void Router::stream(const std::string& path, MakeHandler make) {
  methods_[path] = {
      path.substr(path.rfind('/') + 1), [this, make](std::shared_ptr<grpc::Call> call) -> Accepted {
        if (core_.scheduler.draining() || (core_.moving && make != decode_handler)) {
          return schedule::shutting_down();
        }
        return grpc::Reception{make(core_, std::move(call)), core_.limits.max_message_bytes};
      }};
}

void Router::add_attention() {
  const std::size_t whole = core_.limits.max_message_bytes;
  admitted(kAttention + "Attend", whole, attend(core_));
  const std::size_t token_bytes = std::min(whole, kTokensBytes);
  admitted(kAttention + "AttendTokens", token_bytes,
           handled(core_.tokens, kAttention + "AttendTokens"));
  stream(kAttention + "AttendStream", attend_stream_handler);
  methods_[kAttention + "PutTensor"] = {
      "PutTensor", [this, whole](std::shared_ptr<grpc::Call> call) -> Accepted {
        return grpc::Reception{put_tensor_handler(core_, std::move(call)), whole};
      }};
  stream(kAttention + "Decode", decode_handler);
  stream(kAttention + "MoveSession", move_session_handler);
  plain(kAttention + "RenewTensor", kControlBytes, renew_tensor(core_));
  plain(kAttention + "DropTensor", kControlBytes, drop_tensor(core_));
  plain(kAttention + "RegisterSharedMemory", kControlBytes, register_shared_memory(core_));
  plain(kAttention + "UnregisterSharedMemory", kControlBytes, unregister_shared_memory(core_));
  for (const char* name : {"ListModels", "GetModel", "ServerInfo"}) {
    plain(kAttention + name, kControlBytes, handled(core_.control, kAttention + name));
  }
}

void Router::add_inference() {
  admitted(kInference + "ModelInfer", core_.limits.max_message_bytes, model_infer(core_));
  stream(kInference + "ModelStreamInfer", model_stream_infer_handler);
  const auto controlled = [this](const std::string& name, HandlerQueue& queue) {
    plain(kInference + name, kControlBytes, handled(queue, kInference + name));
  };
  for (const char* name :
       {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig",
        "ModelStatistics", "RepositoryIndex", "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "TraceSetting"}) {
    controlled(name, core_.control);
  }
  controlled("RepositoryModelLoad", core_.loading);
  controlled("RepositoryModelUnload", core_.loading);
  for (const auto& [name, reason] : kMissing) {
    const Status status{Code::kUnimplemented, text(name, ": ", reason), {}};
    methods_[kInference + std::string(name)] = {
        std::string(name), [status](std::shared_ptr<grpc::Call>) -> Accepted { return status; }};
  }
}

void Router::add_infrastructure() {
  methods_[kHealth + "Check"] = {
      "", [this](std::shared_ptr<grpc::Call> call) -> Accepted {
        return grpc::Reception{unary_handler(core_, std::move(call), "", {}, health_check(core_)),
                               kControlBytes};
      }};
  methods_[kHealth + "Watch"] = {"", [this](std::shared_ptr<grpc::Call> call) -> Accepted {
                                   return grpc::Reception{
                                       health_watch_handler(core_, std::move(call)), kControlBytes};
                                 }};
  for (const char* version : {"v1", "v1alpha"}) {
    const std::string path =
        text("/grpc.reflection.", version, ".ServerReflection/ServerReflectionInfo");
    methods_[path] = {"", [this](std::shared_ptr<grpc::Call> call) -> Accepted {
                        return grpc::Reception{
                            handled_stream(core_, core_.control, std::move(call)), kControlBytes};
                      }};
  }
}

}  // namespace attnserve::services
