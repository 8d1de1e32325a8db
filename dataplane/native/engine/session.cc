#include "engine/session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "base/copy.h"
#include "base/status.h"
#include "base/text.h"
#include "engine/onnxruntime.h"

namespace attnserve::engine {
namespace {

class OrtStop final : public Stop {
 public:
  explicit OrtStop(std::shared_ptr<const OnnxRuntime> runtime)
      : runtime_(std::move(runtime)), options_(runtime_->make<ort::RunOptions>([this](auto out) {
          return runtime_->api().create_run_options(out);
        })) {}

  void request() override {
    if (requested_.exchange(true, std::memory_order_relaxed)) return;
    runtime_->check(runtime_->api().set_terminate(options_.get()));
  }
  bool requested() const override { return requested_.load(std::memory_order_relaxed); }

  const ort::RunOptions* options() const { return options_.get(); }
  const std::atomic<bool>& flag() const { return requested_; }

 private:
  std::shared_ptr<const OnnxRuntime> runtime_;
  Handle<ort::RunOptions> options_;
  std::atomic<bool> requested_{false};
};

// While it lives, operators that begin on this thread heed a stop.
class StopScope {
 public:
  StopScope(const OnnxRuntime& runtime, const OrtStop* stop) : runtime_(runtime), stop_(stop) {
    if (stop_ != nullptr) runtime_.set_stop_flag(&stop_->flag());
  }
  StopScope(const StopScope&) = delete;
  StopScope& operator=(const StopScope&) = delete;
  ~StopScope() {
    if (stop_ != nullptr) runtime_.set_stop_flag(nullptr);
  }

 private:
  const OnnxRuntime& runtime_;
  const OrtStop* stop_;
};

// Values of one run, side by side as ONNX Runtime takes them. Released with this.
class Values {
 public:
  explicit Values(const ort::Interface& api) : api_(api) {}
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;
  ~Values() {
    for (ort::Value* value : values_) {
      if (value != nullptr) api_.release(value);
    }
  }

  void reserve(std::size_t count) { values_.reserve(count); }
  ort::Value*& add() { return values_.emplace_back(nullptr); }
  ort::Value** data() { return values_.data(); }
  ort::Value* take(std::size_t index) { return std::exchange(values_[index], nullptr); }

 private:
  const ort::Interface& api_;
  std::vector<ort::Value*> values_;
};

class OrtSession final : public Session {
 public:
  OrtSession(std::shared_ptr<const OnnxRuntime> runtime, Handle<ort::Session> session);

  const std::vector<Port>& inputs() const override { return inputs_; }
  const std::vector<Port>& outputs() const override { return outputs_; }
  bool any_heads() const override { return any_heads_; }
  std::unique_ptr<Stop> make_stop() override { return std::make_unique<OrtStop>(runtime_); }
  void run(std::span<const Feed> feeds, std::span<Fetch> fetches, Stop* stop) override;

 private:
  void view(const Tensor& tensor, ort::Value*& value) const;
  OwnedTensor own(ort::Value* value) const;
  const char* output_name(std::string_view name) const;

  std::shared_ptr<const OnnxRuntime> runtime_;
  Handle<ort::Session> session_;
  std::vector<Port> inputs_, outputs_;
  std::vector<const char*> input_names_;  // of inputs_, whose strings stay where they are
  bool any_heads_ = false;
};

Tensor shaped(const OnnxRuntime& runtime, const ort::TensorInfo* info) {
  const ort::Interface& api = runtime.api();
  ort::ElementType type{};
  std::size_t rank = 0;
  runtime.check(api.element_type(info, &type));
  runtime.check(api.dimension_count(info, &rank));
  std::vector<std::int64_t> sizes(rank);
  runtime.check(api.dimensions(info, sizes.data(), rank));
  if (rank > kMostDimensions) throw std::runtime_error(text("a tensor of rank ", rank));
  return {data_type_of(type), Shape(std::span<const std::int64_t>(sizes)), nullptr};
}

Port port_of(const OnnxRuntime& runtime, char* raw_name, ort::Allocator* allocator,
             const ort::TypeInfo* type) {
  Port port;
  port.name = raw_name;
  runtime.check(runtime.api().free(allocator, raw_name));
  const ort::TensorInfo* info = nullptr;
  runtime.check(runtime.api().tensor_info(type, &info));
  if (info == nullptr) return port;  // no tensor: attnserve has no type for it
  const Tensor tensor = shaped(runtime, info);
  port.dtype = tensor.dtype;
  port.shape.assign(tensor.shape.sizes().begin(), tensor.shape.sizes().end());
  return port;
}

OrtSession::OrtSession(std::shared_ptr<const OnnxRuntime> runtime, Handle<ort::Session> session)
    : runtime_(std::move(runtime)), session_(std::move(session)) {
  const ort::Interface& api = runtime_->api();
  ort::Allocator* allocator = nullptr;
  runtime_->check(api.default_allocator(&allocator));
  std::size_t count = 0;
  runtime_->check(api.input_count(session_.get(), &count));
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    const auto type = runtime_->make<ort::TypeInfo>(
        [&](auto out) { return api.input_type(session_.get(), i, out); });
    runtime_->check(api.input_name(session_.get(), i, allocator, &name));
    inputs_.push_back(port_of(*runtime_, name, allocator, type.get()));
  }
  // Those that may be left out are given all the same.
  runtime_->check(api.optional_input_count(session_.get(), &count));
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    const auto type = runtime_->make<ort::TypeInfo>(
        [&](auto out) { return api.optional_input_type(session_.get(), i, out); });
    runtime_->check(api.optional_input_name(session_.get(), i, allocator, &name));
    inputs_.push_back(port_of(*runtime_, name, allocator, type.get()));
  }
  runtime_->check(api.output_count(session_.get(), &count));
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    const auto type = runtime_->make<ort::TypeInfo>(
        [&](auto out) { return api.output_type(session_.get(), i, out); });
    runtime_->check(api.output_name(session_.get(), i, allocator, &name));
    outputs_.push_back(port_of(*runtime_, name, allocator, type.get()));
  }
  for (const Port& port : inputs_) input_names_.push_back(port.name.c_str());

  int with_heads = 0, fixed = 0;
  for (const auto* ports : {&inputs_, &outputs_}) {
    for (const Port& port : *ports) {
      if (port.name != "query" && port.name != "key" && port.name != "value") continue;
      ++with_heads;
      if (port.shape.size() < 2 || port.shape[1] >= 0) ++fixed;
    }
  }
  any_heads_ = with_heads == 3 && fixed == 0;
}

// A value over a tensor's memory.
void OrtSession::view(const Tensor& tensor, ort::Value*& value) const {
  const auto sizes = tensor.shape.sizes();
  runtime_->check(runtime_->api().create_tensor(runtime_->host(), tensor.data, tensor.byte_size(),
                                                sizes.data(), sizes.size(),
                                                element_type_of(tensor.dtype), &value));
}

// Takes a value over; its memory is ONNX Runtime's.
OwnedTensor OrtSession::own(ort::Value* value) const {
  const ort::Interface& api = runtime_->api();
  std::shared_ptr<ort::Value> owner(
      value, [runtime = runtime_](ort::Value* it) { runtime->api().release(it); });
  const auto info =
      runtime_->make<ort::TensorInfo>([&](auto out) { return api.tensor_info(value, out); });
  Tensor tensor = shaped(*runtime_, info.get());
  void* data = nullptr;
  runtime_->check(api.tensor_data(value, &data));
  tensor.data = static_cast<std::byte*>(data);
  return {tensor, std::move(owner)};
}

const char* OrtSession::output_name(std::string_view name) const {
  for (const Port& port : outputs_) {
    if (port.name == name) return port.name.c_str();
  }
  throw std::logic_error(text("the graph gives no ", name));
}

// The status of a run that failed, by ONNX Runtime's message.
[[noreturn]] void fail(const std::string& message, const Stop* stop) {
  if (stop != nullptr && stop->requested()) {
    throw RequestError(Code::kCancelled, "the computation was stopped");
  }
  for (const char* sign :
       {"Failed to allocate memory", "bad_alloc", "bad allocation", "out of memory"}) {
    if (message.find(sign) != std::string::npos) {
      throw RequestError(Code::kResourceExhausted,
                         "memory: ONNX Runtime could not allocate what the computation needs");
    }
  }
  throw std::runtime_error(message);
}

// On CUDA too all tensors are the host's here: ONNX Runtime copies feeds to the device and outputs
// to where they are wanted, and what is not fetched never leaves the device.
void OrtSession::run(std::span<const Feed> feeds, std::span<Fetch> fetches, Stop* stop) {
  const ort::Interface& api = runtime_->api();
  const auto* stopping = static_cast<const OrtStop*>(stop);
  std::vector<Bytes> copies;  // outlives the values, which view it
  Values inputs(api), outputs(api);
  inputs.reserve(inputs_.size());
  for (const Port& port : inputs_) {
    const auto feed =
        std::ranges::find_if(feeds, [&](const Feed& each) { return each.name == port.name; });
    if (feed == feeds.end() || feed->tensor.data == nullptr) {
      throw std::logic_error(text("the graph takes ", port.name, ", which was not given"));
    }
    Tensor tensor = feed->tensor;
    if (!tensor.aligned()) {
      Bytes& copy = copies.emplace_back(Bytes::allocate(tensor.byte_size()));
      copy_bytes(copy.data(), tensor.data, tensor.byte_size());
      tensor.data = copy.data();
    }
    view(tensor, inputs.add());
  }

  std::vector<const char*> output_names;
  output_names.reserve(fetches.size());
  outputs.reserve(fetches.size());
  for (const Fetch& fetch : fetches) {
    output_names.push_back(output_name(fetch.name));
    ort::Value*& value = outputs.add();
    if (fetch.into.data == nullptr) continue;
    Tensor tensor = fetch.into;
    if (!tensor.aligned()) {
      tensor.data = copies.emplace_back(Bytes::allocate(tensor.byte_size())).data();
    }
    view(tensor, value);
  }

  if (stop != nullptr && stop->requested()) fail("", stop);
  {
    const StopScope scope(*runtime_, stopping);
    ort::Status* failed = api.run(
        session_.get(), stopping != nullptr ? stopping->options() : nullptr, input_names_.data(),
        inputs.data(), inputs_.size(), output_names.data(), fetches.size(), outputs.data());
    if (failed != nullptr) fail(runtime_->message_of(failed), stop);
  }
  for (std::size_t i = 0; i < fetches.size(); ++i) {
    Fetch& fetch = fetches[i];
    if (fetch.into.data == nullptr) {
      fetch.made = own(outputs.take(i));
    } else if (!fetch.into.aligned()) {
      void* data = nullptr;
      runtime_->check(api.tensor_data(outputs.data()[i], &data));
      copy_bytes(fetch.into.data, static_cast<const std::byte*>(data), fetch.into.byte_size());
    }
  }
}

}  // namespace

bool Session::takes(std::string_view name) const {
  return std::ranges::any_of(inputs(), [&](const Port& port) { return port.name == name; });
}

bool Session::gives(std::string_view name) const {
  return std::ranges::any_of(outputs(), [&](const Port& port) { return port.name == name; });
}

std::unique_ptr<Session> Session::load(std::shared_ptr<Runtime> loaded, const std::string& path,
                                       const SessionOptions& wanted) {
  auto runtime = std::static_pointer_cast<OnnxRuntime>(std::move(loaded));
  const Handle<ort::SessionOptions> options = session_options(*runtime, wanted);
  auto session = runtime->make<ort::Session>([&](auto out) {
    return runtime->api().create_session(runtime->env(), path.c_str(), options.get(), out);
  });
  return std::make_unique<OrtSession>(std::move(runtime), std::move(session));
}

}  // namespace attnserve::engine
