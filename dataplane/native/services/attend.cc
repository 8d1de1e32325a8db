#include "services/attend.h"

#include <utility>

#include "services/put_tensor.h"

namespace attnserve::services {

UnaryBehaviour attend(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>& request, Admitted admitted) {
    const auto message = std::make_shared<Bytes>(std::move(bytes));
    const wire::AttendRequest decoded = wire::decode_attend(message->span(), "Attend");
    const requests::Context context = core.context();
    requests::AttendPlan plan = requests::plan_attend(decoded, context, reply->info().peer, false);
    std::unique_ptr<Answer> answer = attend_answer(core, reply->info(), plan, std::nullopt);
    auto prepared =
        requests::prepare(std::move(plan), inline_elements(decoded), context, reply->info().peer);
    prepared->owners.push_back(message);
    begin_exchange(core, {request, std::move(admitted), request->arrived, std::move(prepared),
                          std::move(answer),
                          [reply](Delivery delivery) { reply->deliver(std::move(delivery)); }});
  };
}

UnaryBehaviour renew_tensor(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>&, Admitted) {
    const wire::RenewTensorRequest decoded = wire::decode_renew_tensor(bytes.span());
    reply->deliver(stored_delivery(core.stored.renew(
        decoded.handle, sessions::name_of_caller(reply->info().peer), lease_of(decoded.lease))));
  };
}

UnaryBehaviour drop_tensor(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>&, Admitted) {
    core.stored.drop(wire::decode_drop_tensor(bytes.span()),
                     sessions::name_of_caller(reply->info().peer));
    reply->deliver(delivery_of(OutMessage::of(wire::encode_empty())));
  };
}

UnaryBehaviour register_shared_memory(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>&, Admitted) {
    const wire::RegisterSharedMemoryRequest decoded =
        wire::decode_register_shared_memory(bytes.span());
    // Claiming pages takes as long as filling them.
    auto refused = core.chores.add(
        [&core, reply, key = std::string(decoded.key), byte_size = decoded.byte_size] {
          try {
            const grpc::CallInfo& info = reply->info();
            const std::string name = core.regions.add_private(
                key, byte_size, sessions::owner_of(info.peer), info.connection);
            // The connection may have closed meanwhile, when there was no region to end with it.
            if (reply->over()) core.regions.remove(name, sessions::owner_of(info.peer));
            reply->deliver(delivery_of(OutMessage::of(wire::encode_register_shared_memory(name))));
          } catch (...) {
            reply->deliver({status_of(std::current_exception()), {}});
          }
        });
    if (refused) reply->deliver({std::move(*refused), {}});
  };
}

UnaryBehaviour unregister_shared_memory(Core& core) {
  return [&core](Bytes bytes, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>&, Admitted) {
    core.regions.remove(wire::decode_unregister_shared_memory(bytes.span()),
                        sessions::owner_of(reply->info().peer));
    reply->deliver(delivery_of(OutMessage::of(wire::encode_empty())));
  };
}

std::array<ByteSpan, wire::kInputs> inline_elements(const wire::AttendRequest& message) {
  std::array<ByteSpan, wire::kInputs> elements;
  for (std::size_t index = 0; index < wire::kInputs; ++index) {
    if (message.tensors[index]) elements[index] = message.tensors[index]->data;
  }
  return elements;
}

}  // namespace attnserve::services
