#include "services/decode.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/text.h"
#include "requests/refusal.h"
#include "services/decode_layer.h"
#include "services/decode_transfer.h"
#include "services/put_tensor.h"
#include "services/stream_state.h"
#include "services/unary.h"
#include "wire/kv_sessions.h"

namespace attnserve::services {
namespace {

// Requests that were refused by a part or chunk while others were still to come: so many are
// remembered, so that those can be thrown away.
constexpr std::size_t kMostRefused = 1024;

// Who a caller is, as far as that can be told: its name, else where it calls from, without the
// port.
std::string identity_of(std::string_view peer) {
  if (const auto name = sessions::name_of_caller(peer); !name.empty()) return std::string(name);
  try {
    return sessions::owner_of(peer);
  } catch (const RequestError&) {
    return std::string(sessions::address_of(peer));
  }
}

class DecodeHandler final : public grpc::CallHandler {
 public:
  DecodeHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core),
        call_(call),
        state_(StreamState::open(core, std::move(call), "Decode", true)),
        owner_(identity_of(state_->info().peer)) {}

  void on_message(Bytes bytes) override {
    if (over_) return;
    auto message = std::make_shared<Bytes>(std::move(bytes));
    if (!stalled_.empty() || !take(message)) stall(std::move(message));
    state_->pause_if_full();
  }

  void on_half_close() override {
    half_closed_ = true;
    if (!over_ && stalled_.empty()) end_of_requests();
  }

  void on_all_sent() override {
    state_->all_sent();
    if (over_) return;
    std::erase_if(exports_, [](const auto& each) { return each->over(); });
    for (const auto& each : exports_) each->resume();
    unstall();
  }

  void on_end(Code reason) override {
    over_ = true;
    forget();
    state_->ended(reason);
  }

 private:
  using MessagePtr = std::shared_ptr<const Bytes>;

  sessions::SessionOwner owner() const {
    const auto& caller = state_->info().caller;
    if (!caller) return {owner_, 0, 0, state_->number()};
    return {owner_, caller->most_sessions(), caller->most_session_bytes(), state_->number()};
  }

  void fail(Status status) {
    over_ = true;
    forget();
    state_->fail(std::move(status));
  }

  // Steps that are not ended are abandoned once no layer of theirs runs.
  void forget() {
    for (const auto& each : exports_) each->abandon();
    for (auto& [id, each] : imports_) each->abandon();
    exports_.clear();
    imports_.clear();
    layers_.clear();
    steps_.clear();
    stalled_.clear();
  }

  void end_of_requests() {
    forget_failed_imports();
    if (!layers_.empty() || !imports_.empty()) {
      const std::uint64_t id = layers_.empty() ? imports_.begin()->first : layers_.begin()->first;
      fail(invalid_argument("stream", text("its end, with parts of request ", id, " missing"),
                            "all parts"));
      return;
    }
    state_->read_all();
  }

  void stall(MessagePtr message) {
    if (stalled_.empty()) call_->pause();
    stalled_.push_back(std::move(message));
  }

  void unstall() {
    if (stalled_.empty()) return;
    while (!stalled_.empty()) {
      const MessagePtr message = stalled_.front();
      if (!take(message)) return;
      if (over_) return;
      stalled_.pop_front();
    }
    call_->resume();
    if (half_closed_) end_of_requests();
  }

  // False: it has to wait for what is computed.
  bool take(const MessagePtr& message) {
    try {
      const wire::DecodeRequest decoded = wire::decode_decode(message->span());
      if (must_wait(decoded)) return false;
      begin(decoded, message);
    } catch (...) {
      fail(status_of(std::current_exception()));
    }
    return true;
  }

  void begin(const wire::DecodeRequest& decoded, const MessagePtr& message) {
    const std::uint64_t id = decoded.request_id;
    if (continues(decoded, message)) return;
    // What breaks the protocol ends the stream: nobody could tell which request an error is for.
    if (id <= last_id_) {
      requests::refuse("request_id", std::to_string(id),
                       text("more than ", last_id_, ", the last one"));
    }
    if (std::holds_alternative<std::monostate>(decoded.action)) {
      requests::refuse("action", "nothing", "one of them");
    }
    last_id_ = id;
    state_->begun();
    try {
      if (state_->draining()) {
        throw RequestError(schedule::shutting_down());
      }
      std::visit([&](const auto& action) { act(id, action, message); }, decoded.action);
    } catch (const sessions::SessionLeavesError& leaves) {
      if (more_to_come(decoded)) remember_refused(id);
      answer_once_known(id, leaves.session_id());
    } catch (const sessions::SessionMovedError& moved) {
      if (more_to_come(decoded)) remember_refused(id);
      state_->answer(nullptr, moved_delivery(id, moved));
    } catch (...) {
      if (more_to_come(decoded)) remember_refused(id);
      state_->answer(nullptr, decode_delivery(id, {status_of(std::current_exception()), {}}));
    }
  }

  // Of a request that names a session on its way. Like one that computes it takes room.
  void answer_once_known(std::uint64_t id, const std::string& session_id) {
    const auto waiting = request_context(state_->info());
    state_->started(waiting);
    core_.departures.wait(
        session_id, [this_core = &core_, state = state_, waiting, session_id, id, owner = owner_] {
          if (const auto to = this_core->kv.moved_to(session_id, owner)) {
            state->answer(waiting, moved_delivery(id, {session_id, *to}));
          } else {
            state->answer(waiting, decode_delivery(id, {schedule::shutting_down(), {}}));
          }
        });
    if (!core_.kv.leaves(session_id)) core_.departures.known(session_id);  // since it was asked
  }

  static Delivery moved_delivery(std::uint64_t id, const sessions::SessionMovedError& moved) {
    const sessions::MovedTo& to = moved.to();
    const wire::MovedSession told{moved.session_id(), to.address, to.authority, to.session_id,
                                  to.length};
    Delivery delivery{moved.status(), {}};
    delivery.messages.push_back(
        OutMessage::of(wire::encode_decode_error(id, moved.status(), told)));
    return delivery;
  }

  // What brings sessions.
  void check_takes_sessions() const {
    if (core_.moving) throw RequestError(schedule::shutting_down());
  }

  // The second part of a layer, a further chunk of an import, or what was refused already.
  bool continues(const wire::DecodeRequest& decoded, const MessagePtr& message) {
    const std::uint64_t id = decoded.request_id;
    if (id > last_id_) return false;
    const auto* layer = std::get_if<wire::AttendLayer>(&decoded.action);
    const auto* import = std::get_if<wire::ImportSession>(&decoded.action);
    if (const auto found = layers_.find(id); layer != nullptr && found != layers_.end()) {
      LayerRequest request = std::move(found->second);
      layers_.erase(found);
      const auto context = request.request;
      try {
        add_part(std::move(request), *layer, message);
      } catch (...) {
        state_->answer(context, decode_delivery(id, {status_of(std::current_exception()), {}}));
      }
      return true;
    }
    if (const auto found = imports_.find(id); import != nullptr && found != imports_.end()) {
      const wire::SessionChunk& chunk = import->chunk;
      if (!found->second->over()) {
        found->second->add(chunk.index, chunk.data, chunk.last, message);
      }
      if (chunk.last) imports_.erase(found);
      return true;
    }
    const auto refused = std::ranges::find(refused_, id);
    if (refused == refused_.end() || (layer == nullptr && import == nullptr)) return false;
    if (layer != nullptr || import->chunk.last) refused_.erase(refused);
    return true;
  }

  static bool more_to_come(const wire::DecodeRequest& decoded) {
    if (const auto* layer = std::get_if<wire::AttendLayer>(&decoded.action)) {
      return !layer->hidden_states && (!layer->query || !layer->key);
    }
    const auto* import = std::get_if<wire::ImportSession>(&decoded.action);
    return import != nullptr && !import->chunk.last;
  }

  void remember_refused(std::uint64_t id) {
    if (refused_.size() == kMostRefused) refused_.pop_front();
    refused_.push_back(id);
  }

  bool is_busy(std::string_view session_id) const {
    return std::ranges::any_of(steps_, [&](const auto& each) {
      return each.second->computing &&
             std::ranges::binary_search(each.second->session_ids, session_id, std::less<>{});
    });
  }

  bool is_computing(std::uint64_t step_id) const {
    const auto step = steps_.find(step_id);
    return step != steps_.end() && step->second->computing;
  }

  bool names_busy(const auto& action) const {
    if constexpr (requires { action.step_id; }) {
      if (is_computing(action.step_id)) return true;
    }
    if constexpr (requires { action.session_id; }) return is_busy(action.session_id);
    if constexpr (requires { action.sessions[0].session_id; }) {
      return std::ranges::any_of(action.sessions,
                                 [&](const auto& each) { return is_busy(each.session_id); });
    }
    if constexpr (requires { action.begin; }) return action.begin && names_busy(*action.begin);
    return false;
  }

  // What a request names is being computed.
  bool must_wait(const wire::DecodeRequest& decoded) {
    const auto computing = [](const auto& each) { return each.second->computing.load(); };
    if (std::ranges::none_of(steps_, computing)) return false;
    return std::visit([&](const auto& action) { return names_busy(action); }, decoded.action);
  }

  void answer(Bytes message) {
    Delivery delivery;
    delivery.messages.push_back(OutMessage::of(std::move(message)));
    state_->answer(nullptr, std::move(delivery));
  }

  void act(std::uint64_t, const std::monostate&, const MessagePtr&) {}

  void act(std::uint64_t id, const wire::OpenSessions& asked, const MessagePtr&) {
    check_takes_sessions();
    const requests::OpenPlan plan =
        requests::plan_open(asked, core_.context(), core_.kv.config().page_tokens);
    const auto opened = core_.kv.open(plan.spec, plan.opened, lease_of(asked.lease), owner());
    std::vector<wire::SessionState> states;
    states.reserve(opened.size());
    for (const sessions::SessionState& session : opened) states.push_back(wire_state(session));
    answer(wire::encode_opened(id, states));
  }

  void act(std::uint64_t id, const wire::BeginStep& asked, const MessagePtr&) {
    const std::shared_ptr<OpenStep> step = begin_step(requests::plan_step(asked, core_.limits));
    answer(wire::encode_begun(id, asked.step_id, step->step->lengths()));
  }

  std::shared_ptr<OpenStep> begin_step(const requests::StepPlan& plan) {
    std::erase_if(steps_, [](const auto& each) { return each.second->ended.load(); });
    if (steps_.contains(plan.step_id)) {
      requests::refuse("step_id", std::to_string(plan.step_id),
                       "one that no other step open on this stream has");
    }
    auto step = std::make_shared<OpenStep>();
    step->step = core_.kv.begin_step(plan.sessions, owner(), plan.queries_only);
    step->models = requests::kv_models(step->step->spec(), core_.context());
    if (plan.queries_only) requests::check_queries_only(step->step->spec(), step->models);
    step->tokens = plan.tokens;
    step->cross_tokens = plan.cross_tokens;
    step->priority = plan.priority;
    step->session_ids.reserve(plan.sessions.size());
    for (const auto& session : plan.sessions) step->session_ids.emplace_back(session.id);
    std::ranges::sort(step->session_ids);
    steps_.emplace(plan.step_id, step);
    return step;
  }

  const std::shared_ptr<OpenStep>& open_step(std::uint64_t step_id) {
    const auto found = steps_.find(step_id);
    if (found == steps_.end() || found->second->ended) {
      throw RequestError(Code::kNotFound,
                         text("step_id: given ", step_id,
                              "; no such step is open on this stream: never begun, ended with its "
                              "last layer, or abandoned"));
    }
    return found->second;
  }

  void act(std::uint64_t id, const wire::AttendLayer& asked, const MessagePtr& message) {
    const auto request = stream_request(state_->info(), std::to_string(id));
    const TraceScope scope(request->trace);
    try {
      begin_request(id, asked, message, request);
    } catch (const RequestError& error) {
      if (request->recording) request->recording->status(error.status().code);
      throw;  // as it is: it may say that a session moves
    } catch (...) {
      const Status status = status_of(std::current_exception());
      if (request->recording) request->recording->status(status.code);
      throw RequestError(status);  // a fault has been logged: once
    }
  }

  void begin_request(std::uint64_t id, const wire::AttendLayer& asked, const MessagePtr& message,
                     const std::shared_ptr<schedule::RequestContext>& request) {
    LayerRequest layer;
    layer.request_id = id;
    layer.arrived = request->arrived;
    std::optional<requests::StepPlan> begun;
    if (asked.begin) {
      begun = requests::plan_begun_step(asked, core_.limits);
    } else {
      layer.step = open_step(asked.step_id);
    }
    layer.request = request;
    layer.request->priority = begun ? begun->priority : layer.step->priority;
    if (auto refused = core_.scheduler.check_room(*layer.request)) {
      throw RequestError(std::move(*refused));
    }
    auto admitted =
        Admitted::admit_next(core_, state_->info(), layer.arrived, layer.request->deadline);
    if (auto* refused = std::get_if<Status>(&admitted)) throw RequestError(std::move(*refused));
    layer.admitted = std::move(std::get<Admitted>(admitted));
    if (request->recording) request->recording->mark(tracing::Mark::kAdmitted, Clock::now());
    if (begun) layer.step = begin_step(*begun);
    layer.begins = begun.has_value();
    add_part(std::move(layer), asked, message);
  }

  void add_part(LayerRequest layer, const wire::AttendLayer& asked, const MessagePtr& message) {
    const std::shared_ptr<OpenStep> begun = layer.begins ? layer.step : nullptr;
    try {
      add_to(std::move(layer), asked, message);
    } catch (...) {
      if (begun) begun->give_up();
      throw;
    }
  }

  void add_to(LayerRequest layer, const wire::AttendLayer& asked, const MessagePtr& message) {
    open_step(asked.step_id);
    layer.add(asked, core_.limits, message);
    if (layer.complete()) {
      layer.admitted.received();
      if (const auto& recording = layer.request->recording) {
        recording->mark(tracing::Mark::kReceived, Clock::now());
      }
      begin_layer(core_, state_, std::move(layer));
      return;
    }
    if (layers_.size() >= core_.limits.max_stream_requests) {
      throw RequestError(
          Code::kResourceExhausted,
          text("requests open on this stream: ", layers_.size(),
               " wait for their other part; allowed: ", core_.limits.max_stream_requests));
    }
    layers_.emplace(layer.request_id, std::move(layer));
  }

  void act(std::uint64_t id, const wire::AbandonStep& asked, const MessagePtr&) {
    open_step(asked.step_id);
    for (auto at = layers_.begin(); at != layers_.end();) {
      if (at->second.step_id != asked.step_id) {
        ++at;
        continue;
      }
      const Status status{
          Code::kCancelled, text("step_id: step ", asked.step_id, " was abandoned"), {}};
      state_->answer(nullptr, decode_delivery(at->first, {status, {}}));
      remember_refused(at->first);
      at = layers_.erase(at);
    }
    steps_.erase(asked.step_id);
    answer(wire::encode_done(id));
  }

  void act(std::uint64_t id, const wire::CommitTree& asked, const MessagePtr&) {
    answer(session_message(id, core_.kv.commit(asked.session_id, asked.accepted, owner())));
  }

  void act(std::uint64_t id, const wire::TruncateSession& asked, const MessagePtr&) {
    answer(session_message(id, core_.kv.truncate(asked.session_id, asked.length, owner())));
  }

  void act(std::uint64_t id, const wire::ForkSession& asked, const MessagePtr&) {
    const sessions::Growth growth{asked.max_tokens, asked.reserved_tokens};
    const Duration lease = lease_of(asked.lease);
    if (core_.moving && !core_.kv.moved_to(asked.session_id, owner_)) check_takes_sessions();
    const sessions::SessionState forked =
        asked.length ? core_.kv.fork(asked.session_id, *asked.length, growth, lease, owner())
                     : core_.kv.fork(asked.session_id, growth, lease, owner());
    answer(session_message(id, forked));
  }

  void act(std::uint64_t id, const wire::RenewSession& asked, const MessagePtr&) {
    answer(session_message(id, core_.kv.renew(asked.session_id, lease_of(asked.lease), owner())));
  }

  void act(std::uint64_t id, const wire::CloseSession& asked, const MessagePtr&) {
    core_.kv.close(asked.session_id, owner());
    answer(wire::encode_done(id));
  }

  // Callers may stop sending when an import has failed; chunks that still come are thrown away.
  void forget_failed_imports() {
    for (auto at = imports_.begin(); at != imports_.end();) {
      if (!at->second->over()) {
        ++at;
        continue;
      }
      remember_refused(at->first);
      at = imports_.erase(at);
    }
  }

  void check_transfers() {
    forget_failed_imports();
    std::erase_if(exports_, [](const auto& each) { return each->over(); });
    const std::size_t open = exports_.size() + imports_.size();
    if (open < core_.limits.max_stream_requests) return;
    throw RequestError(Code::kResourceExhausted,
                       text("requests open on this stream: ", open,
                            " exports and imports; allowed: ", core_.limits.max_stream_requests));
  }

  void act(std::uint64_t id, const wire::ExportSession& asked, const MessagePtr&) {
    check_transfers();
    // Its caller may well do so by a stream for this alone: it is not the one to be told of a move.
    sessions::SessionOwner asking = owner();
    asking.stream = 0;
    const auto leaving = std::make_shared<SessionExport>(
        core_, state_, id, core_.kv.export_session(asked.session_id, asking));
    exports_.push_back(leaving);
    leaving->resume();
  }

  void act(std::uint64_t id, const wire::ImportSession& asked, const MessagePtr& message) {
    requests::check_import(asked);
    check_takes_sessions();
    const sessions::Growth growth{asked.max_tokens, asked.reserved_tokens};
    check_transfers();
    const sessions::ExportedSession exported = sessions::read_exported(asked.chunk.data);
    requests::kv_models(exported.spec, core_.context());
    const auto coming = std::make_shared<SessionImport>(
        core_, call_, core_.kv.import_session(exported, growth, lease_of(asked.lease), owner()),
        [state = state_, id](Status status, const sessions::SessionState& session) {
          Delivery delivery{std::move(status), {}};
          if (delivery.status.ok()) {
            delivery.messages.push_back(OutMessage::of(session_message(id, session)));
          }
          state->answer(nullptr, decode_delivery(id, std::move(delivery)));
        });
    if (!asked.chunk.last) imports_.emplace(id, coming);
    coming->add(asked.chunk.index, asked.chunk.data, asked.chunk.last, message);
  }

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const std::shared_ptr<StreamState> state_;
  const std::string owner_;
  std::unordered_map<std::uint64_t, std::shared_ptr<OpenStep>> steps_;  // by step_id
  std::map<std::uint64_t, LayerRequest> layers_;  // that wait for a part, by request_id
  std::vector<std::shared_ptr<SessionExport>> exports_;
  std::map<std::uint64_t, std::shared_ptr<SessionImport>> imports_;  // by request_id
  std::deque<std::uint64_t> refused_;  // requests of which parts may still come
  std::deque<MessagePtr> stalled_;
  std::uint64_t last_id_ = 0;
  bool half_closed_ = false, over_ = false;
};

}  // namespace

std::unique_ptr<grpc::CallHandler> decode_handler(Core& core, std::shared_ptr<grpc::Call> call) {
  return std::make_unique<DecodeHandler>(core, std::move(call));
}

}  // namespace attnserve::services
