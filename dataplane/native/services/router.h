// All methods of the server, by their paths.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>

#include "grpc/call.h"
#include "services/core.h"
#include "services/unary.h"

namespace attnserve::services {

class Router final : public grpc::Service {
 public:
  explicit Router(Core& core);

  std::variant<grpc::Reception, Status> accept(std::shared_ptr<grpc::Call> call) override;
  void after_events() override { core_.scheduler.run_short(); }
  bool begins_unknown() override { return core_.callers.checks_web_tokens(); }
  bool rechecks() override { return core_.callers.required(); }
  std::optional<Status> recheck(const grpc::CallInfo& info, bool trusted) override;
  bool wants_bodies() override { return core_.admission.wants_bodies(); }
  void after_round(Duration busy) override { core_.admission.moved_bytes(busy); }
  void connection_closed(std::uint64_t connection) override {
    core_.regions.connection_closed(connection);
  }
  void count(std::string_view path, Code code) override;

 private:
  using Accepted = std::variant<grpc::Reception, Status>;
  using Accept = std::function<Accepted(std::shared_ptr<grpc::Call> call)>;
  using MakeHandler = std::unique_ptr<grpc::CallHandler> (*)(Core&, std::shared_ptr<grpc::Call>);
  struct Method {
    std::string name;  // as it is counted; empty: it is not
    Accept accept;
    // One of which its callers must have; none: nobody need say who it is.
    identity::Roles roles = identity::kAllRoles;
  };

  // `checked`: its web token was, a moment ago.
  Accepted accept_by(const Method& method, std::shared_ptr<grpc::Call> call, bool checked);
  static Status not_permitted(const Method& method, identity::Roles roles);
  // The call's caller may do this, and has not too much under way: else the refusal.
  static std::optional<Status> let_in(identity::Recognized who, const Method& method,
                                      grpc::Call& call, identity::OpenCall& open);
  // Begins to record a call that was let in, if it is to be.
  tracing::OpenRecording record(grpc::Call& call);

  // Methods of one request and one answer, in messages of at most `bytes`; those `admitted`
  // compute, and need a place before the body comes.
  void plain(const std::string& path, std::size_t bytes, UnaryBehaviour behaviour);
  void admitted(const std::string& path, std::size_t bytes, UnaryBehaviour behaviour);
  void stream(const std::string& path, MakeHandler make);  // that computes
  void add_attention();
  void add_inference();
  void add_infrastructure();

  Core& core_;
  std::unordered_map<std::string, Method> methods_;  // by path
};

}  // namespace attnserve::services
