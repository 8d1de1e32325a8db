#include "services/infer.h"

#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "requests/infer.h"
#include "services/handled.h"
#include "services/stream_state.h"
#include "wire/open_inference.h"

namespace attnserve::services {
namespace {

const std::string kPath = "/inference.GRPCInferenceService/ModelInfer";
const std::string kStreamPath = "/inference.GRPCInferenceService/ModelStreamInfer";

// The answer of one request of the protocol.
class InferResponse final : public Answer {
 public:
  // `message` is what the views in `decoded` and `plan` look into.
  InferResponse(Core& core, ByteBudget& budget, const wire::InferRequest& decoded,
                requests::InferPlan& plan, bool stream)
      : core_(core),
        budget_(budget),
        model_(plan.attend.model),
        results_(requests::answer_outputs(plan, core.limits)),
        outputs_(std::move(plan.outputs)),
        id_(decoded.id),
        stream_(stream) {}

  void place(requests::PreparedAttend& prepared) override {
    std::size_t size = 0;
    for (const wire::InferResult& result : results_) size += result.shared ? 0 : result.byte_size;
    Lease lease(budget_);
    lease.grow_or_throw(size);
    // As views they live in the model, which the request holds.
    const wire::Parameters parameters{
        {"variant", std::string_view(prepared.plan.variant->facts.name)}};
    answer_.emplace(model_->facts.name, model_->version_text, id_, results_, stream_, parameters);
    answer_->bytes().lease = std::move(lease);
    for (std::size_t index = 0; index < outputs_.size(); ++index) {
      const wire::ResultSpec& spec = prepared.plan.results[outputs_[index].result];
      Tensor& tensor = prepared.work.results[static_cast<std::size_t>(spec.output)];
      tensor.dtype = spec.dtype;
      tensor.shape = spec.shape;
      tensor.data = outputs_[index].region ? outputs_[index].place.data() : answer_->places[index];
    }
    // What is computed along with what was asked for goes nowhere that is sent.
    for (const wire::ResultSpec& spec : prepared.plan.results) {
      Tensor& tensor = prepared.work.results[static_cast<std::size_t>(spec.output)];
      if (tensor.data) continue;
      prepared.copies.push_back(Bytes::allocate(spec.byte_size));
      tensor = {spec.dtype, spec.shape, prepared.copies.back().data()};
    }
  }

  std::vector<OutMessage> finish(requests::PreparedAttend&, const Spans&) override {
    std::vector<OutMessage> messages;
    messages.push_back(OutMessage::of(std::move(*answer_).finish()));
    return messages;
  }

  void answered(const requests::PreparedAttend& prepared, const Spans& spans) override {
    core_.statistics.inferred(model_->facts.name, model_->facts.version, spans,
                              prepared.plan.dims.batch, Clock::now());
  }

 private:
  Core& core_;
  ByteBudget& budget_;
  const engine::ModelPtr model_;
  const std::vector<wire::InferResult> results_;
  const std::vector<requests::AskedOutput> outputs_;
  const std::string_view id_;
  const bool stream_;
  std::optional<wire::InferAnswer> answer_;
};

// Answers in the order of the requests, whichever is done first. Any thread.
class InOrder {
 public:
  explicit InOrder(std::shared_ptr<StreamState> stream) : stream_(std::move(stream)) {}

  // Takes a place in the order.
  std::uint64_t begin(const std::shared_ptr<schedule::RequestContext>& request) {
    stream_->begun();
    stream_->started(request);
    const std::lock_guard lock(mutex_);
    waiting_.push_back({request, std::nullopt});
    return first_ + waiting_.size() - 1;
  }

  // The lock is held until all are sent, so that none overtakes another.
  void answer(std::uint64_t place, Delivery delivery) {
    const std::lock_guard lock(mutex_);
    if (place < first_) return;
    waiting_[place - first_].delivery = std::move(delivery);
    while (!waiting_.empty() && waiting_.front().delivery) {
      stream_->answer(waiting_.front().request, std::move(*waiting_.front().delivery));
      waiting_.pop_front();
      ++first_;
    }
  }

 private:
  struct Waiting {
    std::shared_ptr<schedule::RequestContext> request;
    std::optional<Delivery> delivery;  // once it is answered
  };

  const std::shared_ptr<StreamState> stream_;
  std::mutex mutex_;  // guards what follows
  std::deque<Waiting> waiting_;
  std::uint64_t first_ = 0;  // the place of the first that waits
};

class InferStreamHandler final : public grpc::CallHandler {
 public:
  InferStreamHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core),
        state_(StreamState::open(core, std::move(call), "ModelStreamInfer")),
        answers_(std::make_shared<InOrder>(state_)) {}

  void on_message(Bytes message) override {
    if (state_->draining()) return;
    const auto request = stream_request(state_->info(), "");
    const TraceScope scope(request->trace);
    const auto names = std::make_shared<InferNames>();
    const auto deliver = [answers = answers_, place = answers_->begin(request),
                          names](Delivery delivery) {
      if (!delivery.status.ok()) {
        delivery.messages.clear();
        delivery.messages.push_back(OutMessage::of(
            wire::encode_infer_error(delivery.status.message, names->id, names->model_name)));
      }
      answers->answer(place, std::move(delivery));
    };
    try {
      auto admitted =
          Admitted::admit_next(core_, state_->info(), request->arrived, request->deadline);
      if (auto* refused = std::get_if<Status>(&admitted)) throw RequestError(std::move(*refused));
      std::get<Admitted>(admitted).received();
      if (request->recording) request->recording->mark(tracing::Mark::kAdmitted, Clock::now());
      begin_infer(core_, std::move(message), state_->info(), request,
                  std::move(std::get<Admitted>(admitted)), names.get(), deliver);
    } catch (...) {
      deliver({status_of(std::current_exception()), {}});
    }
    state_->pause_if_full();
  }

  void on_half_close() override { state_->read_all(); }
  void on_all_sent() override { state_->all_sent(); }
  void on_end(Code reason) override { state_->ended(reason); }

 private:
  Core& core_;
  const std::shared_ptr<StreamState> state_;
  const std::shared_ptr<InOrder> answers_;
};

}  // namespace

UnaryBehaviour model_infer(Core& core) {
  return [&core](Bytes message, const std::shared_ptr<Reply>& reply,
                 const std::shared_ptr<schedule::RequestContext>& request, Admitted admitted) {
    begin_infer(core, std::move(message), reply->info(), request, std::move(admitted), nullptr,
                [reply](Delivery delivery) { reply->deliver(std::move(delivery)); });
  };
}

std::unique_ptr<grpc::CallHandler> model_stream_infer_handler(Core& core,
                                                              std::shared_ptr<grpc::Call> call) {
  return std::make_unique<InferStreamHandler>(core, std::move(call));
}

void begin_infer(Core& core, Bytes bytes, const grpc::CallInfo& info,
                 const std::shared_ptr<schedule::RequestContext>& request, Admitted admitted,
                 InferNames* names, Deliver deliver) {
  const bool stream = names != nullptr;
  const auto message = std::make_shared<Bytes>(std::move(bytes));
  ByteBudget& budget = budget_of(core, info);
  wire::InferRequest decoded =
      wire::decode_infer(message->span(), stream ? "ModelStreamInfer" : "ModelInfer", &budget);
  if (names) *names = {std::string(decoded.id), std::string(decoded.model_name)};
  if (request->recording && !decoded.id.empty()) request->recording->request_id(decoded.id);
  const engine::ModelPtr model = core.models.get(decoded.model_name, decoded.model_version);
  const std::string name = model->facts.name;
  const std::int64_t version = model->facts.version;
  if (model->facts.kind == engine::Kind::kTransformer) {
    hand_over(core.tokens, stream ? kStreamPath : kPath, info.peer, std::move(*message), request,
              std::move(admitted), std::move(deliver));
    return;
  }
  const auto failing = [&core, name, version, arrived = request->arrived] {
    core.statistics.infer_failed(name, version, Clock::now() - arrived);
  };
  try {
    const requests::Context context = core.context();
    requests::InferPlan plan = requests::plan_infer(decoded, model, context, info.peer);
    request->shorten(plan.timeout, request->arrived);
    auto answer = std::make_unique<InferResponse>(core, budget, decoded, plan, stream);
    auto prepared = requests::prepare(std::move(plan.attend), plan.elements, context, info.peer);
    prepared->owners.push_back(message);
    for (Bytes& elements : plan.memory) prepared->copies.push_back(std::move(elements));
    for (sessions::RegionView& region : plan.regions) {
      prepared->regions.push_back(std::move(region));
    }
    begin_exchange(core, {request, std::move(admitted), request->arrived, std::move(prepared),
                          std::move(answer), [deliver, failing](Delivery delivery) {
                            if (!delivery.status.ok()) failing();
                            deliver(std::move(delivery));
                          }});
  } catch (...) {
    failing();
    throw;
  }
}

}  // namespace attnserve::services
