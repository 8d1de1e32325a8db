#include "services/handled.h"

#include <utility>

#include "services/stream_state.h"

namespace attnserve::services {
namespace {

// One message at a time: the next one is read when this one has been answered.
class StreamHandler final : public grpc::CallHandler {
 public:
  StreamHandler(Core& core, HandlerQueue& queue, std::shared_ptr<grpc::Call> call)
      : queue_(queue), call_(call), state_(StreamState::open(core, std::move(call), "")) {}

  void on_message(Bytes message) override {
    call_->pause();
    const grpc::CallInfo& info = state_->info();
    const auto request = request_context(info);
    state_->begun();
    state_->started(request);
    hand_over(queue_, info.path, info.peer, std::move(message), request, {},
              [call = call_, state = state_, request](Delivery delivery) {
                if (!delivery.status.ok()) return state->fail(std::move(delivery.status));
                state->answer(request, std::move(delivery));
                call->resume();
              });
  }

  void on_half_close() override { state_->read_all(); }
  void on_end(Code reason) override { state_->ended(reason); }

 private:
  HandlerQueue& queue_;
  const std::shared_ptr<grpc::Call> call_;
  const std::shared_ptr<StreamState> state_;
};

}  // namespace

void hand_over(HandlerQueue& queue, std::string path, std::string peer, Bytes message,
               std::shared_ptr<schedule::RequestContext> request, Admitted admitted,
               Deliver deliver) {
  const auto place = std::make_shared<Admitted>(std::move(admitted));
  auto answer = [place, deliver](Status status, Bytes bytes) {
    if (status.ok()) place->answered();
    place->release();
    deliver(status.ok() ? delivery_of(OutMessage::of(std::move(bytes)))
                        : Delivery{std::move(status), {}});
  };
  const auto handed = std::make_shared<HandledRequest>(
      std::move(path), std::move(peer), std::move(message), std::move(request), std::move(answer));
  if (auto refused = queue.push(handed)) handed->answer(std::move(*refused), {});
}

UnaryBehaviour handled(HandlerQueue& queue, std::string path) {
  return [&queue, path = std::move(path)](Bytes message, const std::shared_ptr<Reply>& reply,
                                          const std::shared_ptr<schedule::RequestContext>& request,
                                          Admitted admitted) {
    hand_over(queue, path, reply->info().peer, std::move(message), request, std::move(admitted),
              [reply](Delivery delivery) { reply->deliver(std::move(delivery)); });
  };
}

std::unique_ptr<grpc::CallHandler> handled_stream(Core& core, HandlerQueue& queue,
                                                  std::shared_ptr<grpc::Call> call) {
  return std::make_unique<StreamHandler>(core, queue, std::move(call));
}

}  // namespace attnserve::services
