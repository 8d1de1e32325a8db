#include "services/put_tensor.h"

#include <optional>
#include <string>
#include <utility>

#include "base/copy.h"
#include "base/text.h"
#include "requests/tensor_spec.h"

namespace attnserve::services {
namespace {

const std::string kMethod = "PutTensor";

class PutTensorHandler final : public grpc::CallHandler {
 public:
  PutTensorHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core),
        reply_(std::make_shared<Reply>(core, std::move(call), kMethod)),
        room_(core.stored.begin(part())),
        pace_(core.upload_pace) {}

  void on_message(Bytes message) override {
    if (over_) return;
    attempt([&] { take(message); });
  }

  void on_half_close() override {
    if (over_) return;
    attempt([&] { store(); });
  }

  void on_end(Code reason) override { reply_->ended(reason); }

  // From the header on, which is followed by all else at once.
  TimePoint due() const override { return over_ ? kNever : pace_.due(); }
  void on_due(TimePoint) override {
    attempt([&] { throw RequestError(pace_.late("stream")); });
  }
  void on_held(Duration held) override { pace_.forgive(held); }

 private:
  template <class Step>
  void attempt(const Step& step) {
    try {
      step();
    } catch (...) {
      Status status = status_of(std::current_exception());
      if (status.code == Code::kResourceExhausted) upload_.lacks_room();
      over_ = true;
      tensor_.elements = Bytes();
      room_ = core_.stored.begin(part());  // what was claimed is free again
      upload_ = {};
      reply_->deliver({std::move(status), {}});
    }
  }

  ByteBudget* part() const {
    const auto& caller = reply_->info().caller;
    return caller ? &caller->stored : nullptr;
  }

  void take(const Bytes& message) {
    const wire::PutTensorRequest decoded = wire::decode_put_tensor(message.span());
    if (!spec_) {
      take_header(decoded);
    } else if (received_ == spec_->byte_size) {
      throw RequestError(
          invalid_argument("stream", "more messages", "none after the last element"));
    } else {
      take_chunk(decoded);
    }
  }

  void take_header(const wire::PutTensorRequest& decoded) {
    if (!decoded.header) {
      throw RequestError(invalid_argument("body", decoded.chunk ? "chunk" : "nothing", "header"));
    }
    const wire::TensorMessage& tensor = *decoded.header;
    requests::TensorSpec spec =
        requests::check_tensor(requests::TensorRule{"tensor"}, tensor, true, nullptr);
    upload_ = core_.stored_uploads.begin(reply_->info().peer);
    core_.stored.check_fits(spec.byte_size);
    lease_ = lease_of(decoded.lease);
    tensor_.dtype = spec.dtype;
    tensor_.shape = spec.shape;
    tensor_.elements = Bytes::allocate(spec.byte_size);
    if (spec.region) {
      const sessions::RegionView view =
          core_.regions.view(spec.region->name, spec.region->offset, spec.region->byte_size,
                             sessions::owner_of(reply_->info().peer));
      append(view.bytes);
      view.check_intact();
    } else if (!spec.chunked) {
      append(tensor.data);
    }
    spec_ = std::move(spec);
    pace_.begin(Clock::now());
  }

  void take_chunk(const wire::PutTensorRequest& decoded) {
    if (!decoded.chunk || decoded.chunk->tensor != 0) {
      throw RequestError(invalid_argument("body", "no chunk of tensor 0", "its chunks"));
    }
    const wire::TensorChunk& chunk = *decoded.chunk;
    if (chunk.offset != received_) {
      throw RequestError(invalid_argument("chunk.offset", std::to_string(chunk.offset),
                                          std::to_string(received_)));
    }
    const std::size_t left = spec_->byte_size - received_;
    if (chunk.data.empty() || chunk.data.size() > left) {
      throw RequestError(invalid_argument("chunk.data", text(chunk.data.size(), " bytes"),
                                          text("1..", left, " bytes")));
    }
    append(chunk.data);
    pace_.took(chunk.data.size(), Clock::now());
  }

  // Room is claimed as bytes come: what was announced and never comes takes nobody's.
  void append(ByteSpan elements) {
    upload_.take(elements.size());
    room_.claim(elements.size());
    copy_bytes(tensor_.elements.data() + received_, elements.data(), elements.size());
    received_ += elements.size();
  }

  void store() {
    if (!spec_) throw RequestError(invalid_argument("body", "nothing", "header"));
    if (received_ < spec_->byte_size) {
      throw RequestError(invalid_argument("stream", text("its end after ", received_, " bytes"),
                                          text(spec_->byte_size, " bytes")));
    }
    over_ = true;
    upload_ = {};
    const sessions::Stored stored = core_.stored.put(std::move(tensor_), std::move(room_), lease_,
                                                     sessions::name_of_caller(reply_->info().peer));
    reply_->deliver(stored_delivery(stored));
  }

  Core& core_;
  const std::shared_ptr<Reply> reply_;
  sessions::Room room_;
  sessions::Upload upload_;
  Pace pace_;
  std::optional<requests::TensorSpec> spec_;  // once the header has come
  sessions::StoredTensor tensor_;
  std::size_t received_ = 0;
  Duration lease_{};
  bool over_ = false;
};

}  // namespace

Delivery stored_delivery(const sessions::Stored& stored) {
  return delivery_of(OutMessage::of(wire::encode_stored_tensor(
      stored.handle, static_cast<std::uint64_t>(stored.lease.count()), stored.byte_size)));
}

std::unique_ptr<grpc::CallHandler> put_tensor_handler(Core& core,
                                                      std::shared_ptr<grpc::Call> call) {
  return std::make_unique<PutTensorHandler>(core, std::move(call));
}

}  // namespace attnserve::services
