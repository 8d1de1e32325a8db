#include "sessions/kv_step.h"

#include <algorithm>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "sessions/kv_state.h"

namespace attnserve::sessions {

namespace {

std::string field_of(std::size_t index, std::string_view name) {
  return text("sessions[", index, "].", name);
}

void check_hashes(const SessionStep& asked, const KvSession& session, std::size_t index) {
  if (asked.prefix_hashes.empty()) return;
  const std::string given = text(asked.prefix_hashes.size(), " hashes");
  const auto refuse = [&](const std::string& allowed) {
    throw RequestError(invalid_argument(field_of(index, "prefix_hashes"), given, allowed));
  };
  if (!session.plan().cross.empty()) refuse("none with cross layers");
  const std::uint64_t full = (session.length + asked.new_tokens) / session.plan().page_tokens();
  const std::uint64_t wanted = full - session.chain.size();
  if (asked.prefix_hashes.size() != wanted) {
    refuse(text("none, or ", wanted, ": for pages ", session.chain.size(), " to ", full,
                ", which are full with this step and have none yet"));
  }
}

void check_holds_tokens(const SessionStep& asked, const KvSession& session, std::size_t index) {
  if (session.length > 0) return;
  throw RequestError(invalid_argument(field_of(index, "session_id"), quoted(asked.id),
                                      "with queries_only: a session that holds tokens"));
}

void check_tokens(const SessionStep& asked, const KvSession& session, std::size_t index) {
  if (asked.new_tokens > session.max_tokens - session.length) {
    throw RequestError(
        Code::kResourceExhausted,
        text(field_of(index, "new_tokens"), ": given ", asked.new_tokens, " after ", session.length,
             " that are there; allowed: ", session.max_tokens, " together (max_tokens)"));
  }
  const bool needs_cross = !session.plan().cross.empty() && session.cross_length == 0;
  const bool allowed = needs_cross
                           ? asked.cross_tokens > 0 && asked.cross_tokens <= session.cross_tokens
                           : asked.cross_tokens == 0;
  if (!allowed) {
    throw RequestError(invalid_argument(
        field_of(index, "cross_tokens"), text(asked.cross_tokens),
        needs_cross ? text("1 to ", session.cross_tokens, " in the session's first step")
                    : std::string("0: no layer is cross, or their keys are there")));
  }
}

}  // namespace

std::shared_ptr<KvStep> KvSessions::begin_step(std::span<const SessionStep> sessions,
                                               const SessionOwner& owner, bool queries_only) {
  const auto added = [&](const SessionStep& asked) { return queries_only ? 0 : asked.new_tokens; };
  std::shared_ptr<KvStep> step;
  std::vector<BlockKey> ends(sessions.size());  // of each session's chain
  {
    const std::scoped_lock lock(state_->mutex);
    const TimePoint now = Clock::now();
    state_->expire(now);
    const std::uint64_t mark = ++state_->steps;
    std::vector<KvSessionPtr> found(sessions.size());
    std::vector<std::size_t> charges(sessions.size());
    std::int64_t more = 0;
    for (std::size_t index = 0; index < sessions.size(); ++index) {
      const SessionStep& asked = sessions[index];
      const KvSessionPtr& session =
          state_->find(asked.id, owner, [&] { return field_of(index, "session_id"); });
      if (std::exchange(session->mark, mark) == mark) {
        throw RequestError(invalid_argument(field_of(index, "session_id"), quoted(asked.id),
                                            "each session once in a step"));
      }
      if (session->in_step || !session->tree.empty()) {
        KvState::check_idle(*session, false, field_of(index, "session_id"));
      }
      if (index > 0 && session->plan_ptr() != found.front()->plan_ptr()) {
        throw RequestError(invalid_argument(field_of(index, "session_id"), quoted(asked.id),
                                            "sessions of the same model, cache type and layers"));
      }
      if (queries_only) {
        check_holds_tokens(asked, *session, index);
      } else {
        check_tokens(asked, *session, index);
      }
      check_hashes(asked, *session, index);
      charges[index] = session->charge(session->length, added(asked));
      more += static_cast<std::int64_t>(charges[index] - session->charged());
      found[index] = session;
    }
    const KvPlanPtr& plan = found.front()->plan_ptr();
    step = std::make_shared<KvStep>(*this, SessionSpecPtr(plan, &plan->spec), sessions.size(),
                                    queries_only);
    for (std::size_t index = 0; index < sessions.size(); ++index) {
      step->add(*found[index], sessions[index]);
      ends[index] = found[index]->chain.empty() ? found[index]->root : found[index]->chain.back();
    }
    state_->claim(*found.front(), more, "sessions", owner, now);
    for (std::size_t index = 0; index < sessions.size(); ++index) {
      KvSession& session = *found[index];
      session.in_step = true;
      session.added = added(sessions[index]);
      session.cross_added = sessions[index].cross_tokens;
      session.set_charged(charges[index]);
      state_->touch(session, now);
    }
    step->sessions_ = std::move(found);
  }
  // Nobody else knows the step yet.
  step->add_trees(sessions);
  for (std::size_t index = 0; index < sessions.size(); ++index) {
    if (sessions[index].prefix_hashes.empty()) continue;
    if (step->chains_.empty()) step->chains_.resize(sessions.size());
    KvPrefixes::append(step->chains_[index], ends[index], sessions[index].prefix_hashes);
  }
  return step;
}

KvLayer KvSessions::begin_layer(const std::shared_ptr<KvStep>& step, std::size_t layer) {
  KvLayer running(layer);  // before the lock: lets go of the layer, if that fails, after it
  running.sequences_.reserve(step->size());
  std::unique_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  if (step->layers_[layer] != KvStep::Layer::kWaiting) {
    throw RequestError(invalid_argument("layer", text(layer),
                                        "layers of the step that are not computed yet, nor now"));
  }
  for (std::size_t index = 0; index < step->size(); ++index) {
    const KvSession& session = *step->sessions_[index];
    if (session.gone) KvState::refuse_unknown(session.id, field_of(index, "session_id"));
  }
  step->layers_[layer] = KvStep::Layer::kRunning;
  for (const KvSessionPtr& session : step->sessions_) {
    ++session->users;
    state_->touch(*session, now);
  }
  running.step_ = step;
  for (const KvSessionPtr& session : step->sessions_) {
    if (session->grow(layer)) {  // a page was copied: let others have a turn
      lock.unlock();
      lock.lock();
    }
    running.sequences_.push_back(
        {static_cast<std::int64_t>(session->keys(layer)), session->table(layer)});
  }
  return running;
}

KvStep::KvStep(KvSessions& store, SessionSpecPtr spec, std::size_t size, bool queries_only)
    : store_(&store),
      spec_(std::move(spec)),
      queries_only_(queries_only),
      layers_(spec_->layers.size(), Layer::kWaiting),
      layers_left_(layers_.size()) {
  lengths_.reserve(size);
  starts_.reserve(size + 1);
  cross_starts_.reserve(size + 1);
  keys_.reserve(size);
  cross_keys_.reserve(size);
  starts_.push_back(0);
  cross_starts_.push_back(0);
}

void KvStep::add(const KvSession& session, const SessionStep& asked) {
  lengths_.push_back(static_cast<std::int64_t>(session.length));
  starts_.push_back(starts_.back() + static_cast<std::int64_t>(asked.new_tokens));
  cross_starts_.push_back(cross_starts_.back() + static_cast<std::int64_t>(asked.cross_tokens));
  keys_.push_back(
      static_cast<std::int64_t>(session.length + (queries_only_ ? 0 : asked.new_tokens)));
  cross_keys_.push_back(static_cast<std::int64_t>(session.cross_length + asked.cross_tokens));
}

void KvStep::add_trees(std::span<const SessionStep> sessions) {
  if (std::ranges::all_of(sessions, [](const auto& asked) { return asked.parents.empty(); })) {
    return;
  }
  trees_.resize(sessions.size());
  parents_.reserve(static_cast<std::size_t>(starts_.back()));
  for (std::size_t index = 0; index < sessions.size(); ++index) {
    const SessionStep& asked = sessions[index];
    trees_[index].assign(asked.parents.begin(), asked.parents.end());
    for (std::uint64_t token = 0; token < asked.new_tokens; ++token) {
      parents_.push_back(asked.parents.empty() ? static_cast<std::int64_t>(token) - 1
                                               : asked.parents[token]);
    }
  }
}

void KvStep::end() {
  for (std::size_t index = 0; index < sessions_.size(); ++index) {
    KvSession& session = *sessions_[index];
    if (session.gone) continue;
    session.in_step = false;
    session.cross_length += std::exchange(session.cross_added, 0);
    if (!trees_.empty() && !trees_[index].empty()) {
      session.tree = std::move(trees_[index]);
    } else {
      session.length += std::exchange(session.added, 0);
      if (!chains_.empty()) session.publish(chains_[index]);
      session.slide();
    }
    session.recharge();  // to less, or as much
  }
}

void KvStep::abandon() {
  for (const KvSessionPtr& session : sessions_) {
    if (session->gone) continue;
    session->in_step = false;
    session->added = 0;
    session->cut(session->length);
    if (std::exchange(session->cross_added, 0) > 0) session->cut_cross();
    session->recharge();  // to less, or as much
  }
}

KvStep::~KvStep() {
  const std::scoped_lock lock(store_->state_->mutex);
  if (layers_left_ > 0) abandon();
}

bool KvLayer::done() {
  const std::shared_ptr<KvStep> step = std::exchange(step_, nullptr);
  KvState& state = *step->store_->state_;
  const std::scoped_lock lock(state.mutex);
  const TimePoint now = Clock::now();
  step->layers_[layer_] = KvStep::Layer::kDone;
  for (const KvSessionPtr& session : step->sessions_) {
    state.touch(*session, now);
    state.leave(*session);
  }
  if (--step->layers_left_ > 0) return false;
  step->end();
  return true;
}

KvLayer::~KvLayer() {
  if (!step_) return;
  KvState& state = *step_->store_->state_;
  const std::scoped_lock lock(state.mutex);
  step_->layers_[layer_] = KvStep::Layer::kWaiting;
  for (const KvSessionPtr& session : step_->sessions_) state.leave(*session);
}

}  // namespace attnserve::sessions
