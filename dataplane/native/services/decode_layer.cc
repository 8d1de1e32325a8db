#include "services/decode_layer.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "base/text.h"
#include "engine/paged.h"
#include "requests/refusal.h"
#include "requests/tensor_spec.h"

namespace attnserve::services {
namespace {

using requests::LayerPart;

Tensor tensor_of(const requests::TensorSpec& spec, ByteSpan elements) {
  return {spec.dtype, spec.shape, const_cast<std::byte*>(elements.data())};
}

// Its place in the queue, its pages, its memory: all given back by destruction.
class LayerJob final : public schedule::Job {
 public:
  LayerJob(Core& core, std::shared_ptr<StreamState> stream, LayerRequest asked)
      : core_(core), stream_(std::move(stream)), asked_(std::move(asked)) {
    view_inputs();
    place_results();
    layer_.emplace(core_.kv.begin_layer(asked_.step->step, asked_.part.layer));
    for (const sessions::LayerSequence& sequence : layer_->sequences()) {
      work_.add(sequence.length, sequence.table);
    }
    request = asked_.request;
    key = engine::batch_key(work_);
    joinable = work_.joinable();
    sequences = static_cast<std::int64_t>(asked_.step->step->size());
    units = engine::units(work_);
    const Tensor& given = asked_.part.query ? work_.query : work_.hidden_states;
    tensor_bytes = given.byte_size() + asked_.part.response_bytes;
    working_bytes = engine::working_bytes(work_);
    asked_.step->computing = true;
    validated_ = Clock::now();
  }

  void run(std::span<schedule::Job* const> batch, engine::Stop* stop) override {
    if (batch.size() == 1) {
      engine::PagedWork* work = &static_cast<LayerJob*>(batch.front())->work_;
      engine::attend_paged_together(std::span(&work, 1), stop);
      return;
    }
    std::vector<engine::PagedWork*> works;
    works.reserve(batch.size());
    for (schedule::Job* job : batch) works.push_back(&static_cast<LayerJob*>(job)->work_);
    engine::attend_paged_together(works, stop);
  }

  std::unique_ptr<engine::Stop> make_stop() override { return work_.variant->session->make_stop(); }

  void done(const schedule::Outcome& outcome) noexcept override {
    Delivery delivery;
    try {
      // A step whose stream has ended was given up, though its last layer was on its way.
      if (asked_.request->cancelled) {
        throw RequestError(Code::kCancelled, "the caller cancelled the request");
      }
      for (const sessions::RegionView& region : regions_) region.check_intact();
      const bool ended = layer_->done();
      if (ended) {
        core_.statistics.decoded(asked_.step->tokens);
        asked_.step->ended = true;
      }
      const Spans spans{asked_.arrived, validated_,        outcome.started,
                        outcome.ended,  outcome.sequences, outcome.leads};
      delivery.messages.push_back(OutMessage::of(finish(ended, spans)));
      if (outcome.leads) core_.admission.computed(outcome.ended - outcome.started);
      const requests::KvModel& model = asked_.step->models.of(asked_.part.layer);
      core_.statistics.ran(model.facts().name, work_.variant->name(), spans, sequences);
      if (request->recording) note_run(model.facts());
      asked_.admitted.answered();
    } catch (...) {
      delivery.status = status_of(std::current_exception());
      delivery.messages.clear();
    }
    layer_.reset();
    deliver(std::move(delivery));
  }

  void failed(Status status) noexcept override {
    layer_.reset();  // not done: it may be sent again
    deliver({std::move(status), {}});
  }
  // The pages are its run's until that has ended.
  void abandoned(Status status) noexcept override { deliver({std::move(status), {}}); }
  std::string what() const override {
    return engine::name_of(*asked_.step->models.of(asked_.part.layer).model, *work_.variant);
  }

 private:
  void note_run(const engine::ModelFacts& facts) const {
    std::int64_t query_len = 0, key_len = 0;
    for (std::size_t index = 0; index + 1 < work_.starts.size(); ++index) {
      query_len = std::max(query_len, work_.starts[index + 1] - work_.starts[index]);
    }
    for (const std::int64_t length : work_.lengths) key_len = std::max(key_len, length);
    request->recording->ran(
        {facts.name, facts.version, work_.variant->name(), sequences, query_len, key_len});
  }

  void view_inputs() {
    const OpenStep& step = *asked_.step;
    const sessions::SessionSpec& spec = step.step->spec();
    const sessions::LayerSpec& layer = spec.layers[asked_.part.layer];
    const requests::KvModel& model = step.models.of(asked_.part.layer);
    const engine::ModelFacts& facts = model.facts();
    const bool causal = !layer.cross && !step.step->queries_only();
    work_.variant = model.paged;
    work_.spec = {static_cast<std::int64_t>(spec.layout.page_tokens),
                  static_cast<std::int64_t>(spec.layout.type),
                  layer.window,
                  layer.kept_first,
                  causal,
                  spec.layout.latent};
    work_.cache = core_.kv.cache();
    // Equal specs are one object, and so are the sinks in them.
    const std::vector<float>& sinks = layer.sinks.empty() ? facts.sinks : layer.sinks;
    if (engine::takes_sinks(*model.paged)) {
      work_.sinks = {DataType::kFp32,
                     {std::ssize(sinks)},
                     reinterpret_cast<std::byte*>(const_cast<float*>(sinks.data()))};
    }
    work_.starts = step.step->starts();
    work_.key_starts = step.step->key_starts(asked_.part.layer);
    if (causal) work_.parents = step.step->parents();
    work_.query = {facts.dtype, {step.tokens, facts.num_heads, facts.head_dim}, nullptr};
    work_.key = {facts.dtype, {0, facts.num_kv_heads, facts.head_dim}, nullptr};
    work_.value = {facts.dtype, {0, facts.num_kv_heads, facts.value_head_dim}, nullptr};
    const auto view = [&](const std::optional<requests::TensorSpec>& given, ByteSpan sent,
                          Tensor& tensor) {
      if (!given) return;
      tensor = tensor_of(*given, requests::elements_of(*given, sent, core_.regions,
                                                       stream_->info().peer, regions_));
    };
    view(asked_.part.query, asked_.elements[0], work_.query);
    view(asked_.part.key, asked_.elements[1], work_.key);
    view(asked_.part.value, asked_.elements[2], work_.value);
    view(asked_.part.hidden_states, asked_.elements[3], work_.hidden_states);
    work_.weights_of = asked_.part.weights_of;
  }

  // The results are computed where they are sent from, or in the caller's shared memory.
  void place_results() {
    const LayerPart& part = asked_.part;
    std::vector<std::byte*> places;
    if (part.output_region) {
      const sessions::RegionView& region = regions_.emplace_back(
          requests::view_of(*part.output_region, core_.regions, stream_->info().peer));
      std::vector<std::size_t> sizes;
      for (const wire::LayerResult& result : part.results) sizes.push_back(result.byte_size);
      for (const std::uint64_t offset : requests::offsets(sizes)) {
        shared_.push_back({part.output_region->name, part.output_region->offset + offset});
        places.push_back(region.bytes.data() + offset);
      }
    } else {
      if (part.response_bytes > core_.limits.max_message_bytes) {
        throw RequestError(Code::kResourceExhausted,
                           text("response size: its tensors take ", part.response_bytes,
                                " bytes; allowed in one message: ", core_.limits.max_message_bytes,
                                "; take fewer tokens at once"));
      }
      Lease lease(budget_of(core_, stream_->info()));
      lease.grow_or_throw(part.response_bytes);
      answer_.emplace(asked_.request_id, part.results, lengths());
      answer_->bytes().lease = std::move(lease);
      places = answer_->places;
    }
    for (std::size_t index = 0; index < part.results.size(); ++index) {
      const wire::LayerResult& result = part.results[index];
      const Tensor tensor{result.dtype, result.shape, places[index]};
      switch (result.output) {
        case wire::LayerOutput::kOutput:
          work_.output = tensor;
          break;
        case wire::LayerOutput::kLogSumExp:
          work_.log_sum_exp = tensor;
          break;
        case wire::LayerOutput::kEntropy:
          work_.entropy = tensor;
          break;
        case wire::LayerOutput::kWeights:
          work_.weights.push_back(tensor);
          break;
      }
    }
  }

  // Of the sessions before the step, where it is this that tells them.
  std::span<const std::int64_t> lengths() const {
    if (!asked_.begins) return {};
    return asked_.step->step->lengths();
  }

  Bytes finish(bool ended, const Spans& spans) {
    const wire::Timings timings = timings_of(spans, Clock::now());
    if (answer_) return std::move(*answer_).finish(ended, timings);
    return wire::encode_attended_layer(asked_.request_id, asked_.part.results, shared_, lengths(),
                                       ended, timings);
  }

  void deliver(Delivery delivery) noexcept {
    if (asked_.begins && delivery.status.code != Code::kOk) asked_.step->give_up();
    asked_.admitted.release();
    asked_.step->computing = false;
    stream_->answer(asked_.request, decode_delivery(asked_.request_id, std::move(delivery)));
  }

  Core& core_;
  const std::shared_ptr<StreamState> stream_;
  LayerRequest asked_;
  std::vector<sessions::RegionView> regions_;  // of inputs, and of the output region, if any
  std::optional<wire::LayerAnswer> answer_;
  std::vector<wire::SharedPlace> shared_;
  engine::PagedWork work_;
  std::optional<sessions::KvLayer> layer_;
  TimePoint validated_{};
};

}  // namespace

void LayerRequest::add(const wire::AttendLayer& message, const requests::Limits& limits,
                       std::shared_ptr<const Bytes> bytes) {
  if (!messages.empty() && (message.step_id != step_id || message.layer != part.layer)) {
    requests::refuse("step_id and layer", text(message.step_id, ", ", message.layer),
                     text(step_id, ", ", part.layer, ", as the request's first part has"));
  }
  if (!messages.empty() && message.begin) {
    requests::refuse("begin", "a step in the layer's second part", "it in the first part");
  }
  LayerPart more = requests::check_layer(message, step->shape(), limits);
  if (more.has_query() && part.has_query()) requests::refuse("query", "it again", "once");
  if (more.has_key() && part.has_key()) requests::refuse("key", "it again", "once");
  if (more.has_query()) {
    if (message.query) elements[0] = message.query->data;
    if (message.hidden_states) elements[3] = message.hidden_states->data;
    part.query = std::move(more.query);
    part.hidden_states = std::move(more.hidden_states);
    part.results = std::move(more.results);
    part.weights_of = std::move(more.weights_of);
    part.output_region = std::move(more.output_region);
    part.response_bytes = more.response_bytes;
  }
  if (more.has_key()) {
    elements[1] = message.key->data;
    if (message.value) elements[2] = message.value->data;
    part.key = std::move(more.key);
    part.value = std::move(more.value);
  }
  part.layer = more.layer;
  step_id = message.step_id;
  messages.push_back(std::move(bytes));
}

bool LayerRequest::complete() const {
  const requests::StepShape shape = step->shape();
  return part.has_query() &&
         (part.has_key() || !requests::takes_key(shape, shape.layers[part.layer]));
}

Delivery decode_delivery(std::uint64_t request_id, Delivery delivery) {
  return with_error_message(std::move(delivery), request_id, wire::encode_decode_error);
}

void begin_layer(Core& core, const std::shared_ptr<StreamState>& stream, LayerRequest layer) {
  const std::shared_ptr<schedule::RequestContext> request = layer.request;
  auto job = std::make_shared<LayerJob>(core, stream, std::move(layer));
  // Once it has started it is answered by its job alone.
  stream->started(request);
  core.scheduler.submit(std::move(job), true);
}

}  // namespace attnserve::services
