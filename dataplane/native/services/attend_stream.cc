#include "services/attend_stream.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/copy.h"
#include "base/text.h"
#include "services/attend.h"
#include "services/early_heads.h"
#include "services/stream_state.h"
#include "services/unary.h"

namespace attnserve::services {
namespace {

// A request whose chunks are coming.
struct Incoming {
  explicit Incoming(const PaceRule& rule) : pace(rule) {}

  std::shared_ptr<schedule::RequestContext> request;
  Admitted admitted;
  TimePoint arrived{};
  std::optional<requests::AttendPlan> plan;      // until it is prepared
  std::array<ByteSpan, wire::kInputs> elements;  // of all inputs; chunked ones as they will be
  std::array<std::shared_ptr<Bytes>, wire::kInputs> arriving;  // of chunked inputs
  std::array<std::size_t, wire::kInputs> received{};
  std::size_t missing = 0;  // bytes
  bool touched = false;     // a chunk has come
  Pace pace;
  sessions::Upload upload;
  std::vector<std::shared_ptr<const void>> owners;  // of inline elements
  std::shared_ptr<EarlyHeads> early;
};

std::uint64_t chunked_bytes(const wire::AttendRequest& message) {
  std::uint64_t sum = 0;
  for (const auto& tensor : message.tensors) {
    if (tensor && tensor->content == wire::TensorMessage::Content::kChunked) {
      sum += tensor->chunked_bytes;
    }
  }
  return sum;
}

class AttendStreamHandler final : public grpc::CallHandler {
 public:
  AttendStreamHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core), state_(StreamState::open(core, std::move(call), "AttendStream")) {}

  void on_message(Bytes bytes) override {
    if (over_) return;
    try {
      const auto message = std::make_shared<Bytes>(std::move(bytes));
      const wire::AttendStreamRequest decoded = wire::decode_attend_stream(message->span());
      if (decoded.chunk) {
        take_chunk(decoded.request_id, *decoded.chunk);
      } else {
        take_request(decoded, message);
      }
    } catch (...) {
      fail(status_of(std::current_exception()));
    }
    state_->pause_if_full();
  }

  void on_half_close() override {
    if (over_) return;
    if (!incoming_.empty()) {
      const auto first = std::min_element(incoming_.begin(), incoming_.end(),
                                          [](auto& a, auto& b) { return a.first < b.first; });
      fail(invalid_argument("stream",
                            text("its end, with chunks of request ", first->first, " missing"),
                            "all chunks"));
      return;
    }
    state_->read_all();
  }

  void on_all_sent() override { state_->all_sent(); }

  void on_end(Code reason) override {
    forget_incoming();
    state_->ended(reason);
  }

  TimePoint due() const override {
    TimePoint first = kNever;
    for (const auto& [id, incoming] : incoming_) first = std::min(first, due(incoming));
    return first;
  }

  void on_due(TimePoint now) override {
    for (auto each = incoming_.begin(); each != incoming_.end();) {
      const auto late = each++;
      if (now < due(late->second)) continue;
      Status status = late->second.pace.late("chunks");
      if (now >= late->second.request->deadline) {
        status.message = "the deadline passed before all chunks had come";
      }
      give_up(late, late->second.missing, std::move(status));
    }
  }

  void on_held(Duration held) override {
    for (auto& [id, incoming] : incoming_) incoming.pace.forgive(held);
  }

 private:
  using Incomings = std::unordered_map<std::uint64_t, Incoming>;

  static TimePoint due(const Incoming& incoming) {
    return std::min(incoming.pace.due(), incoming.request->deadline);
  }

  void answer(std::uint64_t id, const std::shared_ptr<schedule::RequestContext>& request,
              Delivery delivery) {
    state_->answer(request, attend_delivery(id, std::move(delivery)));
  }

  void fail(Status status) {
    over_ = true;
    forget_incoming();
    state_->fail(std::move(status));
  }

  void forget_incoming() {
    for (auto& [id, incoming] : incoming_) {
      if (incoming.early) incoming.early->fail();
    }
    incoming_.clear();
  }

  void take_request(const wire::AttendStreamRequest& decoded,
                    const std::shared_ptr<Bytes>& message) {
    if (!decoded.request) {
      throw RequestError(invalid_argument("body", "nothing", "request or chunk"));
    }
    const std::uint64_t id = decoded.request_id;
    if (id <= last_id_) {
      throw RequestError(invalid_argument("request_id", std::to_string(id),
                                          text("more than ", last_id_, ", the last one")));
    }
    last_id_ = id;
    state_->begun();
    const auto request = stream_request(state_->info(), std::to_string(id));
    const TraceScope scope(request->trace);
    try {
      begin(decoded, message, request);
    } catch (...) {
      incoming_.erase(id);
      const std::uint64_t coming = chunked_bytes(*decoded.request);
      if (coming > 0) discarded_[id] = coming;
      answer(id, request, {status_of(std::current_exception()), {}});
    }
  }

  void begin(const wire::AttendStreamRequest& decoded, const std::shared_ptr<Bytes>& message,
             const std::shared_ptr<schedule::RequestContext>& request) {
    const std::uint64_t id = decoded.request_id;
    if (state_->draining()) {
      throw RequestError(schedule::shutting_down());
    }
    Incoming incoming(core_.upload_pace);
    incoming.arrived = request->arrived;
    incoming.request = request;
    incoming.request->shorten(decoded.timeout, incoming.arrived);
    incoming.plan =
        requests::plan_attend(*decoded.request, core_.context(), state_->info().peer, true);
    incoming.request->priority = incoming.plan->priority;
    if (auto refused = core_.scheduler.check_room(*incoming.request)) {
      throw RequestError(std::move(*refused));
    }
    auto admitted =
        Admitted::admit_next(core_, state_->info(), incoming.arrived, incoming.request->deadline);
    if (auto* refused = std::get_if<Status>(&admitted)) throw RequestError(std::move(*refused));
    incoming.admitted = std::move(std::get<Admitted>(admitted));
    if (request->recording) request->recording->mark(tracing::Mark::kAdmitted, Clock::now());
    if (incoming_.size() >= core_.limits.max_stream_requests) {
      throw RequestError(Code::kResourceExhausted,
                         text("requests open on this stream: ", incoming_.size(),
                              " wait for chunks; allowed: ", core_.limits.max_stream_requests));
    }
    incoming.elements = inline_elements(*decoded.request);
    incoming.owners.push_back(message);
    for (std::size_t index = 0; index < wire::kInputs; ++index) {
      const auto& spec = incoming.plan->specs[index];
      if (!spec || !spec->chunked) continue;
      incoming.arriving[index] = std::make_shared<Bytes>(Bytes::allocate(spec->byte_size));
      // Charged as the bytes come: an announcement alone takes nothing.
      incoming.arriving[index]->lease = Lease(budget_of(core_, state_->info()));
      incoming.elements[index] = incoming.arriving[index]->span();
      incoming.owners.push_back(incoming.arriving[index]);
      incoming.missing += spec->byte_size;
    }
    if (incoming.missing > 0 && EarlyHeads::possible(*incoming.plan)) begin_early(id, incoming);
    if (incoming.missing == 0) {
      submit(id, std::move(incoming));
    } else {
      incoming.pace.begin(incoming.arrived);
      incoming.upload = core_.stream_uploads.begin(state_->info().peer);
      incoming_.emplace(id, std::move(incoming));
    }
  }

  void begin_early(std::uint64_t id, Incoming& incoming) {
    requests::AttendPlan plan = *incoming.plan;
    std::unique_ptr<requests::PreparedAttend> prepared;
    try {
      prepared = requests::prepare(std::move(plan), incoming.elements, core_.context(),
                                   state_->info().peer);
    } catch (const RequestError&) {
      return;  // it will be said once the request has arrived
    }
    prepared->owners = incoming.owners;
    incoming.early =
        EarlyHeads::of(core_, state_, id, incoming.request, incoming.arrived, prepared);
  }

  void submit(std::uint64_t id, Incoming incoming) {
    const auto request = incoming.request;
    incoming.admitted.received();
    if (request->recording) request->recording->mark(tracing::Mark::kReceived, Clock::now());
    std::unique_ptr<Answer> answer = attend_answer(core_, state_->info(), *incoming.plan, id);
    auto prepared = requests::prepare(std::move(*incoming.plan), incoming.elements, core_.context(),
                                      state_->info().peer);
    prepared->owners = std::move(incoming.owners);
    auto exchange = std::make_shared<Exchange>(
        core_,
        ExchangeParts{request, std::move(incoming.admitted), incoming.arrived, std::move(prepared),
                      std::move(answer), [state = state_, id, request](Delivery delivery) {
                        state->answer(request, attend_delivery(id, std::move(delivery)));
                      }});
    // Once it has started it is answered by its exchange alone.
    state_->started(request);
    core_.scheduler.submit(std::move(exchange), true);
  }

  void take_chunk(std::uint64_t id, const wire::TensorChunk& chunk) {
    const TimePoint now = Clock::now();
    // Those of one request after those of another: what has not begun is not slow.
    for (auto& [other, incoming] : incoming_) {
      if (!incoming.touched) incoming.pace.begin(now);
    }
    const auto found = incoming_.find(id);
    if (found == incoming_.end()) {
      throw_away(id, chunk);
      return;
    }
    Incoming& incoming = found->second;
    const std::size_t size = chunk.data.size();
    const std::size_t still_to_come = incoming.missing - std::min(incoming.missing, size);
    try {
      add(incoming, chunk);
      if (incoming.early) {
        incoming.early->take({incoming.received[0], incoming.received[1], incoming.received[2]});
      }
    } catch (...) {
      Status status = status_of(std::current_exception());
      if (status.code == Code::kResourceExhausted) incoming.upload.lacks_room();
      give_up(found, still_to_come, std::move(status));
      return;
    }
    incoming.touched = true;
    incoming.pace.took(size, now);
    if (incoming.missing > 0) return;
    Incoming complete = std::move(incoming);
    incoming_.erase(found);
    const auto request = complete.request;
    const TraceScope scope(request->trace);
    if (complete.early) {
      complete.early->arrived_all(std::move(complete.admitted));
      return;
    }
    try {
      submit(id, std::move(complete));
    } catch (...) {
      answer(id, request, {status_of(std::current_exception()), {}});
    }
  }

  // Its answer is this error; of its chunks `still_to_come` bytes are thrown away.
  void give_up(Incomings::iterator found, std::size_t still_to_come, Status status) {
    const std::uint64_t id = found->first;
    const Incoming incoming = std::move(found->second);
    incoming_.erase(found);
    if (still_to_come > 0) discarded_[id] = still_to_come;
    // Before its parts are told that they are cancelled: the first to fail says why.
    const bool unsaid = !incoming.early || incoming.early->fail();
    core_.scheduler.cancel(incoming.request);
    if (unsaid) answer(id, incoming.request, {std::move(status), {}});
  }

  void add(Incoming& incoming, const wire::TensorChunk& chunk) {
    const auto input = wire::input_of_field(chunk.tensor);
    const auto index = static_cast<std::size_t>(input.value_or(wire::Input::kQuery));
    if (!input || !incoming.arriving[index]) {
      std::string allowed;
      for (std::size_t each = 0; each < wire::kInputs; ++each) {
        if (!incoming.arriving[each]) continue;
        const auto name = static_cast<wire::Input>(each);
        if (!allowed.empty()) allowed += ", ";
        allowed += text(wire::field_of(name), " (", wire::name_of(name), ")");
      }
      throw RequestError(invalid_argument("chunk.tensor", std::to_string(chunk.tensor), allowed));
    }
    Bytes& target = *incoming.arriving[index];
    std::size_t& received = incoming.received[index];
    const std::string_view name = wire::name_of(*input);
    if (chunk.offset != received) {
      throw RequestError(invalid_argument(text("chunk.offset of ", name),
                                          std::to_string(chunk.offset),
                                          text(received, ", the bytes already sent")));
    }
    const std::size_t left = target.size() - received;
    if (chunk.data.empty() || chunk.data.size() > left) {
      throw RequestError(
          invalid_argument(text("chunk.data of ", name), text(chunk.data.size(), " bytes"),
                           left > 0 ? text("1..", left, " bytes") : std::string("no more")));
    }
    incoming.upload.take(chunk.data.size());
    target.lease.grow_or_throw(chunk.data.size());
    copy_bytes(target.data() + received, chunk.data.data(), chunk.data.size());
    received += chunk.data.size();
    incoming.missing -= chunk.data.size();
  }

  void throw_away(std::uint64_t id, const wire::TensorChunk& chunk) {
    const auto found = discarded_.find(id);
    if (found == discarded_.end()) {
      throw RequestError(invalid_argument("chunk",
                                          text("for request_id ", id, ", which waits for none"),
                                          "chunks of a request that announced them"));
    }
    if (found->second <= chunk.data.size()) {
      discarded_.erase(found);
    } else {
      found->second -= std::max<std::uint64_t>(1, chunk.data.size());
    }
  }

  Core& core_;
  const std::shared_ptr<StreamState> state_;
  Incomings incoming_;
  // Requests that failed while chunks of theirs are still to come: bytes to throw away.
  std::unordered_map<std::uint64_t, std::uint64_t> discarded_;
  std::uint64_t last_id_ = 0;
  bool over_ = false;
};

}  // namespace

std::unique_ptr<grpc::CallHandler> attend_stream_handler(Core& core,
                                                         std::shared_ptr<grpc::Call> call) {
  return std::make_unique<AttendStreamHandler>(core, std::move(call));
}

}  // namespace attnserve::services
