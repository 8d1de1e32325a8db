#include "services/health.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "wire/open_inference.h"

namespace attnserve::services {
namespace {

constexpr int kServing = 1, kNotServing = 2, kServiceUnknown = 3;

// Those whose health is known; the empty name is the server's.
constexpr std::array<std::string_view, 4> kServices = {
    "", "attnserve.v1.AttentionService", "inference.GRPCInferenceService", "grpc.health.v1.Health"};

int health_of(const Core& core, std::string_view service) {
  if (std::find(kServices.begin(), kServices.end(), service) == kServices.end()) {
    return kServiceUnknown;
  }
  return core.ready() ? kServing : kNotServing;
}

OutMessage message(int health) { return OutMessage::of(wire::encode_health(health)); }

// Says how it is, and again when that changes, to the end when the server drains.
class WatchHandler final : public grpc::CallHandler {
 public:
  WatchHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core), call_(std::move(call)) {}

  void on_message(Bytes bytes) override {
    if (drain_number_ != 0) return;
    std::string service;
    try {
      service = std::string(wire::decode_health_check(bytes.span()));
    } catch (...) {
      call_->finish(status_of(std::current_exception()));
      return;
    }
    watch_number_ =
        core_.health.add([&core = core_, service, weak = std::weak_ptr(call_), told = 0]() mutable {
          const int health = health_of(core, service);
          if (health == std::exchange(told, health)) return;
          if (const auto call = weak.lock()) call->send(message(health));
        });
    const auto drain = [weak = std::weak_ptr(call_)] {
      if (const auto call = weak.lock()) {
        call->send(message(kNotServing));
        call->finish(schedule::shutting_down());
      }
    };
    drain_number_ = core_.streams.add({false, drain, [](Bytes) {}});
  }
  void on_half_close() override {}
  void on_end(Code) override {
    core_.health.remove(watch_number_);
    core_.streams.remove(drain_number_);
  }

 private:
  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  std::uint64_t watch_number_ = 0, drain_number_ = 0;  // once it watches
};

}  // namespace

UnaryBehaviour health_check(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>&, Admitted) {
    const int health = health_of(core, wire::decode_health_check(bytes.span()));
    if (health == kServiceUnknown) {
      throw RequestError(Code::kNotFound,
                         "service: given one that is not here; reflection lists them");
    }
    reply->deliver(delivery_of(message(health)));
  };
}

std::unique_ptr<grpc::CallHandler> health_watch_handler(Core& core,
                                                        std::shared_ptr<grpc::Call> call) {
  return std::make_unique<WatchHandler>(core, std::move(call));
}

}  // namespace attnserve::services
