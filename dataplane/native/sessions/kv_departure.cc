#include "sessions/kv_departure.h"

#include "base/text.h"
#include "sessions/kv_state.h"

namespace attnserve::sessions {

SessionLeavesError::SessionLeavesError(std::string_view id)
    : RequestError(Code::kUnavailable, text("session_id: given ", quoted(id),
                                            ", which is on its way to another server")),
      session_id_(id) {}

SessionMovedError::SessionMovedError(std::string_view id, MovedTo to)
    : RequestError(Code::kUnavailable,
                   text("session_id: given ", quoted(id), ", which is at ", to.address,
                        " now; allowed: ", quoted(to.session_id), ", there")),
      session_id_(id),
      to_(std::move(to)) {}

void KvSessions::take_no_more() {
  const std::scoped_lock lock(state_->mutex);
  state_->takes_no_more = true;
}

std::vector<std::string> KvSessions::ids() {
  const std::scoped_lock lock(state_->mutex);
  state_->expire(Clock::now());
  std::vector<std::string> ids;
  ids.reserve(state_->sessions.size());
  for (const auto& [id, session] : state_->sessions) ids.push_back(id);
  return ids;
}

std::optional<KvDeparture> KvSessions::depart(std::string_view id) {
  const std::scoped_lock lock(state_->mutex);
  state_->expire(Clock::now());
  const auto found = state_->sessions.find(id);
  if (found == state_->sessions.end()) KvState::refuse_unknown(id, "session_id");
  const KvSessionPtr& session = found->second;
  session->leaving = true;
  if (session->users > 0 || !session->idle()) return std::nullopt;
  ++session->users;
  return KvDeparture(*this, session);
}

void KvSessions::stay(std::string_view id) {
  const std::scoped_lock lock(state_->mutex);
  const auto found = state_->sessions.find(id);
  if (found != state_->sessions.end()) found->second->leaving = false;
}

bool KvSessions::leaves(std::string_view id) {
  const std::scoped_lock lock(state_->mutex);
  const auto found = state_->sessions.find(id);
  return found != state_->sessions.end() && found->second->leaves();
}

std::optional<MovedTo> KvSessions::moved_to(std::string_view id, std::string_view owner) {
  const std::scoped_lock lock(state_->mutex);
  const auto found = state_->moved.find(id);
  if (found == state_->moved.end() || found->second.owner != owner) return std::nullopt;
  return found->second.to;
}

KvDeparture::KvDeparture(KvSessions& store, std::shared_ptr<KvSession> session)
    : store_(&store), session_(std::move(session)) {
  again();
}

void KvDeparture::again() {
  export_.reset();
  export_.emplace(KvExport(*store_, session_, session_->reserved_tokens, false));
}

KvDeparture::KvDeparture(KvDeparture&&) noexcept = default;

KvDeparture::~KvDeparture() {
  if (!session_) return;
  const std::scoped_lock lock(store_->state_->mutex);
  session_->leaving = false;
  store_->state_->leave(*session_);
}

std::string_view KvDeparture::owner() const { return session_->owner; }
std::uint64_t KvDeparture::length() const { return session_->length; }

std::chrono::microseconds KvDeparture::lease() const {
  return std::chrono::round<std::chrono::microseconds>(session_->lease);
}

const std::vector<PageHash>& KvDeparture::prefix_hashes() const { return session_->chain; }

std::uint64_t KvDeparture::moved(MovedTo to) {
  const KvSessionPtr session = std::exchange(session_, nullptr);
  KvState& state = *store_->state_;
  const std::scoped_lock lock(state.mutex);
  to.length = session->length;
  state.moved.insert_or_assign(session->id, KvState::Moved{session->owner, std::move(to)});
  state.forget(*session);
  state.expiries.erase(session->expiry);
  session->gone = true;
  state.leave(*session);
  return session->stream;
}

}  // namespace attnserve::sessions
