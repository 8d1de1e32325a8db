#include "services/exchange.h"

#include <algorithm>
#include <utility>

#include "base/text.h"

namespace attnserve::services {
namespace {

// Tensors of a stream's answer larger than this travel in chunks.
constexpr std::size_t kInlineBytes = 64U << 10;

std::uint64_t microseconds(Duration duration) {
  const auto count = std::chrono::duration_cast<std::chrono::microseconds>(duration).count();
  return count > 0 ? static_cast<std::uint64_t>(count) : 0;
}

Tensor result_tensor(const wire::ResultSpec& spec, std::byte* at) {
  return {spec.dtype, spec.shape, at};
}

Tensor& slot(requests::PreparedAttend& prepared, wire::Output output) {
  return prepared.work.results[static_cast<std::size_t>(output)];
}

// Computed where it is sent from: in one message that holds its tensors. On a stream, large ones
// are computed in memory of their own, and sent in chunks that are views of it.
class InMessages final : public Answer {
 public:
  InMessages(Core& core, ByteBudget& budget, std::optional<std::uint64_t> stream_id)
      : core_(core), budget_(budget), stream_id_(stream_id) {}

  void place(requests::PreparedAttend& prepared) override {
    const requests::AttendPlan& plan = prepared.plan;
    answer_.emplace(plan.model->facts.name, plan.model->version_text, plan.variant->name(),
                    plan.results, stream_id_, stream_id_ ? kInlineBytes : SIZE_MAX);
    answer_->bytes().lease = Lease(budget_);
    for (std::size_t index = 0; index < plan.results.size(); ++index) {
      const wire::ResultSpec& spec = plan.results[index];
      std::byte* place = answer_->places[index];
      chunked_.emplace_back();
      if (place) {
        answer_->bytes().lease.grow_or_throw(spec.byte_size);
      } else {
        Lease lease(budget_);
        lease.grow_or_throw(spec.byte_size);
        chunked_.back() = std::make_shared<Bytes>(Bytes::allocate(spec.byte_size));
        chunked_.back()->lease = std::move(lease);
        place = chunked_.back()->data();
      }
      slot(prepared, spec.output) = result_tensor(spec, place);
    }
  }

  std::vector<OutMessage> finish(requests::PreparedAttend& prepared, const Spans& spans) override {
    std::vector<OutMessage> messages;
    messages.push_back(OutMessage::of(std::move(*answer_).finish(timings_of(spans, Clock::now()))));
    for (std::size_t index = 0; index < chunked_.size(); ++index) {
      if (!chunked_[index]) continue;
      append_chunks(messages, *stream_id_, prepared.plan.results[index].output, chunked_[index],
                    core_.limits.chunk_bytes);
    }
    return messages;
  }

 private:
  Core& core_;
  ByteBudget& budget_;
  const std::optional<std::uint64_t> stream_id_;
  std::optional<wire::AttendAnswer> answer_;
  std::vector<std::shared_ptr<Bytes>> chunked_;  // by result; empty for those in the message
};

// Computed in the caller's shared memory; the message says where each tensor lies.
class InRegion final : public Answer {
 public:
  explicit InRegion(std::optional<std::uint64_t> stream_id) : stream_id_(stream_id) {}

  void place(requests::PreparedAttend& prepared) override {
    const requests::AttendPlan& plan = prepared.plan;
    starts_ = requests::offsets(plan.results);
    for (std::size_t index = 0; index < plan.results.size(); ++index) {
      slot(prepared, plan.results[index].output) =
          result_tensor(plan.results[index], prepared.output_region->bytes.data() + starts_[index]);
    }
  }

  std::vector<OutMessage> finish(requests::PreparedAttend& prepared, const Spans& spans) override {
    const requests::AttendPlan& plan = prepared.plan;
    std::vector<wire::SharedPlace> places;
    for (std::size_t index = 0; index < plan.results.size(); ++index) {
      places.push_back({plan.output_region->name, plan.output_region->offset + starts_[index]});
    }
    std::vector<OutMessage> messages;
    messages.push_back(OutMessage::of(wire::encode_attend_response(
        plan.model->facts.name, plan.model->version_text, plan.variant->name(), plan.results,
        places, timings_of(spans, Clock::now()), stream_id_)));
    return messages;
  }

 private:
  const std::optional<std::uint64_t> stream_id_;
  std::vector<std::uint64_t> starts_;
};

}  // namespace

Delivery delivery_of(OutMessage message) {
  Delivery delivery;
  delivery.messages.push_back(std::move(message));
  return delivery;
}

Exchange::Exchange(Core& core, ExchangeParts parts) : core_(core), parts_(std::move(parts)) {
  requests::PreparedAttend& prepared = *parts_.prepared;
  parts_.answer->place(prepared);
  parts_.request->priority = prepared.plan.priority;
  request = parts_.request;
  key = prepared.work.key;
  joinable = prepared.work.joinable;
  sequences = prepared.plan.dims.batch;
  tensor_bytes = prepared.plan.request_bytes;
  working_bytes = prepared.plan.working_bytes;
  validated_ = Clock::now();
}

void Exchange::run(std::span<schedule::Job* const> batch, engine::Stop* stop) {
  if (batch.size() == 1) {
    engine::AttendWork* work = &static_cast<Exchange*>(batch.front())->parts_.prepared->work;
    engine::attend_together(std::span(&work, 1), stop);
    return;
  }
  std::vector<engine::AttendWork*> works;
  works.reserve(batch.size());
  for (schedule::Job* job : batch) {
    works.push_back(&static_cast<Exchange*>(job)->parts_.prepared->work);
  }
  engine::attend_together(works, stop);
}

std::unique_ptr<engine::Stop> Exchange::make_stop() {
  return parts_.prepared->work.variant->session->make_stop();
}

void Exchange::done(const schedule::Outcome& outcome) noexcept {
  Delivery delivery;
  try {
    requests::PreparedAttend& prepared = *parts_.prepared;
    prepared.check_intact();
    const Spans spans{parts_.arrived, validated_,        outcome.started,
                      outcome.ended,  outcome.sequences, outcome.leads};
    delivery.messages = parts_.answer->finish(prepared, spans);
    if (outcome.leads) core_.admission.computed(outcome.ended - outcome.started);
    core_.statistics.ran(prepared.plan.model->facts.name, prepared.plan.variant->name(), spans,
                         prepared.plan.dims.batch);
    note_run(*request, prepared.plan);
    parts_.answer->answered(prepared, spans);
    parts_.admitted.answered();
  } catch (...) {
    delivery.status = status_of(std::current_exception());
    delivery.messages.clear();
  }
  parts_.admitted.release();
  parts_.deliver(std::move(delivery));
}

void Exchange::failed(Status status) noexcept {
  parts_.admitted.release();
  parts_.deliver({std::move(status), {}});
}

std::string Exchange::what() const {
  return engine::name_of(*parts_.prepared->plan.model, *parts_.prepared->plan.variant);
}

void begin_exchange(Core& core, ExchangeParts parts) {
  core.scheduler.submit(std::make_shared<Exchange>(core, std::move(parts)), true);
}

void note_run(const schedule::RequestContext& request, const requests::AttendPlan& plan) {
  if (!request.recording) return;
  const engine::ModelFacts& facts = plan.model->facts;
  request.recording->ran({facts.name, facts.version, plan.variant->name(), plan.dims.batch,
                          plan.dims.query_len, plan.dims.key_len});
}

wire::Timings timings_of(const Spans& spans, TimePoint now) {
  return {microseconds(spans.validated - spans.arrived),
          microseconds(spans.started - spans.validated), microseconds(spans.ended - spans.started),
          microseconds(now - spans.ended), static_cast<std::uint32_t>(spans.sequences)};
}

std::unique_ptr<Answer> attend_answer(Core& core, const grpc::CallInfo& info,
                                      const requests::AttendPlan& plan,
                                      std::optional<std::uint64_t> stream_id) {
  if (plan.output_region) return std::make_unique<InRegion>(stream_id);
  if (!stream_id && plan.response_bytes > core.limits.max_message_bytes) {
    throw RequestError(Code::kResourceExhausted,
                       text("response size: its tensors take ", plan.response_bytes,
                            " bytes; allowed in one message: ", core.limits.max_message_bytes,
                            "; use AttendStream"));
  }
  return std::make_unique<InMessages>(core, budget_of(core, info), stream_id);
}

Delivery with_error_message(Delivery delivery, std::uint64_t request_id, EncodeError encode) {
  if (delivery.status.ok()) return delivery;
  delivery.messages.clear();
  delivery.messages.push_back(OutMessage::of(encode(request_id, delivery.status)));
  return delivery;
}

Delivery attend_delivery(std::uint64_t stream_id, Delivery delivery) {
  return with_error_message(std::move(delivery), stream_id, wire::encode_stream_error);
}

void append_chunks(std::vector<OutMessage>& messages, std::uint64_t stream_id, wire::Output output,
                   const std::shared_ptr<Bytes>& elements, std::size_t chunk_bytes) {
  for (std::size_t at = 0; at < elements->size(); at += chunk_bytes) {
    const std::size_t size = std::min(chunk_bytes, elements->size() - at);
    OutMessage message = OutMessage::of(wire::encode_chunk_head(stream_id, output, at, size));
    message.pieces.push_back({elements, ByteSpan(elements->data() + at, size)});
    messages.push_back(std::move(message));
  }
}

}  // namespace attnserve::services
