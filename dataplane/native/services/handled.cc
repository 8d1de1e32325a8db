#include "services/handled.h"

#include <atomic>
#include <utility>

namespace attnserve::services {
namespace {

// One message at a time: the next one is read when this one has been answered.
class StreamHandler final : public grpc::CallHandler {
 public:
  StreamHandler(HandlerQueue& queue, std::shared_ptr<grpc::Call> call)
      : queue_(queue), shared_(std::make_shared<Shared>(std::move(call))) {}

  void on_message(Bytes message) override {
    shared_->call->pause();
    shared_->under_way = true;
    const grpc::CallInfo& info = shared_->call->info();
    request_ = request_context(info);
    hand_over(queue_, info.path, info.peer, std::move(message), request_, {},
              [shared = shared_](Delivery delivery) {
                if (!delivery.status.ok()) {
                  shared->call->finish(std::move(delivery.status));
                  return;
                }
                for (OutMessage& answer : delivery.messages) shared->call->send(std::move(answer));
                if (shared->under_way.exchange(false) && shared->read_all) {
                  shared->call->finish({});
                } else {
                  shared->call->resume();
                }
              });
  }

  void on_half_close() override {
    shared_->read_all = true;
    if (!shared_->under_way) shared_->call->finish({});
  }

  void on_end(Code) override {
    if (request_) request_->cancelled = true;
  }

 private:
  struct Shared {
    explicit Shared(std::shared_ptr<grpc::Call> call_) : call(std::move(call_)) {}
    const std::shared_ptr<grpc::Call> call;
    // Each is set by one thread and read by the other; finishing twice does nothing.
    std::atomic<bool> under_way{false}, read_all{false};
  };

  HandlerQueue& queue_;
  const std::shared_ptr<Shared> shared_;
  std::shared_ptr<schedule::RequestContext> request_;
};

}  // namespace

void hand_over(HandlerQueue& queue, std::string path, std::string peer, Bytes message,
               std::shared_ptr<schedule::RequestContext> request, Admitted admitted,
               Deliver deliver) {
  const auto place = std::make_shared<Admitted>(std::move(admitted));
  auto answer = [place, deliver](Status status, Bytes bytes) {
    if (status.ok()) place->answered();
    place->release();
    Delivery delivery{std::move(status), {}};
    if (delivery.status.ok()) delivery.messages.push_back(OutMessage::of(std::move(bytes)));
    deliver(std::move(delivery));
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

std::unique_ptr<grpc::CallHandler> handled_stream(HandlerQueue& queue,
                                                  std::shared_ptr<grpc::Call> call) {
  return std::make_unique<StreamHandler>(queue, std::move(call));
}

}  // namespace attnserve::services
