#include "sessions/kv_sessions.h"

#include <algorithm>
#include <utility>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "sessions/kv_state.h"
#include "sessions/page_rows.h"

namespace attnserve::sessions {

namespace {

constexpr std::size_t kIdBytes = 16;
constexpr std::size_t kSlabsAtOnce = 8;  // whose memory goes back under one hold of the lock

// Moves the rows of tokens of the last step to where they are to stay: those of accepted[i] to i.
void move_rows(KvSession& session, std::span<const std::uint32_t> accepted) {
  const PageLayout& layout = session.plan().spec.layout;
  for (std::size_t layer = 0; layer < session.plan().spec.layers.size(); ++layer) {
    if (session.plan().spec.layers[layer].cross) continue;
    for (std::size_t index = 0; index < accepted.size(); ++index) {
      if (accepted[index] == index) continue;
      const std::size_t from = session.length + accepted[index], to = session.length + index;
      const std::byte* source = session.data(session.page(layer, from / layout.page_tokens));
      std::byte* target = session.data(session.page(layer, to / layout.page_tokens));
      copy_tokens(layout, source, from % layout.page_tokens, target, to % layout.page_tokens, 1);
    }
  }
}

void check_path(const std::vector<std::int32_t>& tree, std::span<const std::uint32_t> accepted) {
  std::int32_t parent = -1;
  for (std::size_t index = 0; index < accepted.size(); ++index) {
    const std::string field = text("accepted[", index, "]");
    if (accepted[index] >= tree.size()) {
      throw RequestError(
          invalid_argument(field, text(accepted[index]),
                           text("an index among the last step's ", tree.size(), " tokens")));
    }
    if (tree[accepted[index]] != parent) {
      throw RequestError(invalid_argument(
          field, text(accepted[index], ", whose parent is ", tree[accepted[index]]),
          text("a token whose parent is ", parent, ": each the parent of the next")));
    }
    parent = static_cast<std::int32_t>(accepted[index]);
  }
}

}  // namespace

KvSessions::KvSessions(KvConfig config) : state_(std::make_unique<KvState>(config)) {}
KvSessions::~KvSessions() = default;

std::string KvSessions::new_id() { return random_url_safe(kIdBytes); }

const KvConfig& KvSessions::config() const { return state_->config; }

MutableByteSpan KvSessions::cache() { return {state_->store.cache(), state_->store.cache_bytes()}; }

std::vector<SessionState> KvSessions::open(const SessionSpec& spec,
                                           std::span<const NewSession> sessions, Duration lease,
                                           const SessionOwner& owner) {
  if (spec.layout.page_tokens != state_->config.page_tokens) {
    throw RequestError(invalid_argument("page_tokens", text(spec.layout.page_tokens),
                                        text(state_->config.page_tokens)));
  }
  std::vector<KvSessionPtr> opened;
  std::vector<std::string> ids;
  std::vector<SessionState> states;
  for (std::size_t index = 0; index < sessions.size(); ++index) {
    ids.push_back(new_id());
  }
  KvPlanPtr plan;
  std::vector<std::vector<BlockKey>> chains(sessions.size());
  {
    const std::scoped_lock lock(state_->mutex);
    plan = state_->plan_of(spec);
  }
  const BlockKey root = state_->prefixes.root_of(*plan, owner.name);
  for (std::size_t index = 0; index < sessions.size(); ++index) {
    const std::size_t blocks = std::min<std::size_t>(
        sessions[index].prefix_hashes.size(), sessions[index].max_tokens / plan->page_tokens());
    KvPrefixes::append(chains[index], root, std::span(sessions[index].prefix_hashes).first(blocks));
  }

  std::unique_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  try {
    for (std::size_t index = 0; index < sessions.size(); ++index) {
      if (index > 0) {  // let others have a turn
        lock.unlock();
        lock.lock();
      }
      const NewSession& asked = sessions[index];
      const KvSessionPtr session = state_->make(plan, owner);
      opened.push_back(session);
      session->max_tokens = asked.max_tokens;
      session->reserved_tokens =
          asked.reserved_tokens == 0 ? asked.max_tokens : asked.reserved_tokens;
      session->cross_tokens = asked.cross_tokens;
      session->chain = std::move(chains[index]);
      state_->asked += session->chain.size();
      session->adopt(state_->prefixes.find(*plan, session->chain));
      // What is cached may lie so that it does not fit where the session alone would.
      if (session->length > 0 && !session->recharge()) {
        session->release();
        session->forget_prefix();
      }
      state_->promise(*session, text("sessions[", index, "]"), owner, now);
      state_->found += session->length / plan->page_tokens();
    }
    state_->check_count(opened.size(), owner, now);
    for (std::size_t index = 0; index < opened.size(); ++index) {
      state_->add(opened[index], std::move(ids[index]), lease, now);
      states.push_back(KvState::state_of(*opened[index]));
    }
  } catch (...) {
    for (const KvSessionPtr& session : opened) {
      if (!session->id.empty() && state_->forget(*session)) {
        state_->expiries.erase(session->expiry);
      }
      session->release();
    }
    throw;
  }
  return states;
}

SessionState KvSessions::commit(std::string_view id, std::span<const std::uint32_t> accepted,
                                const SessionOwner& owner) {
  KvSessionPtr session;
  bool moves = false;
  {
    const std::scoped_lock lock(state_->mutex);
    const TimePoint now = Clock::now();
    state_->expire(now);
    session = state_->find(id, owner, [] { return std::string("session_id"); });
    state_->touch(*session, now);
    KvState::check_idle(*session, true, "session_id");
    if (session->tree.empty()) {
      throw RequestError(Code::kFailedPrecondition,
                         text("session_id: given ", quoted(session->id),
                              ", whose last step was no tree; allowed: after a step with parents"));
    }
    check_path(session->tree, accepted);
    moves = !accepted.empty() && accepted.back() + 1 != accepted.size();
    session->in_step = true;
    ++session->users;
  }
  if (moves) move_rows(*session, accepted);

  const std::scoped_lock lock(state_->mutex);
  session->in_step = false;
  session->tree.clear();
  session->added = 0;
  session->length += accepted.size();
  if (!session->gone) {
    session->cut(session->length);
    session->slide();
    session->recharge();  // to less, or as much
  }
  state_->leave(*session);
  return KvState::state_of(*session);
}

SessionState KvSessions::truncate(std::string_view id, std::uint64_t length,
                                  const SessionOwner& owner) {
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  const KvSessionPtr session = state_->find_idle(id, owner, now);
  check_length(*session, length);
  // Pages of its own in place of common ones; those that nobody else holds are its own then.
  const std::size_t alone = session->common_alone(length);
  const auto more =
      static_cast<std::int64_t>(session->charge(length, 0) - session->charged() - alone);
  state_->claim(*session, more, "length", owner, now);
  session->promise(-more);
  session->cut(length);
  session->length = length;
  session->recharge();
  return KvState::state_of(*session);
}

SessionState KvSessions::fork(std::string_view id, std::uint64_t length, Growth growth,
                              Duration lease, const SessionOwner& owner) {
  return fork_at(id, &length, growth, lease, owner);
}

SessionState KvSessions::fork(std::string_view id, Growth growth, Duration lease,
                              const SessionOwner& owner) {
  return fork_at(id, nullptr, growth, lease, owner);
}

SessionState KvSessions::fork_at(std::string_view id, const std::uint64_t* length, Growth growth,
                                 Duration lease, const SessionOwner& owner) {
  std::string id_of_new = new_id();
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  const KvSessionPtr other = state_->find_idle(id, owner, now);
  const std::uint64_t at = length ? *length : other->length;
  check_length(*other, at);
  growth = checked_growth(growth, other->max_tokens, at, {});
  state_->check_count(1, owner, now);
  const KvSessionPtr session = state_->make(other->plan_ptr(), owner);
  session->max_tokens = growth.max_tokens;
  session->reserved_tokens = growth.reserved_tokens;
  try {
    session->adopt(*other, at);
    state_->promise(*session, "session", owner, now);
    state_->add(session, std::move(id_of_new), lease, now);
  } catch (...) {
    session->release();
    throw;
  }
  return KvState::state_of(*session);
}

void KvSessions::check_length(const KvSession& session, std::uint64_t length) {
  if (length > session.length) {
    throw RequestError(invalid_argument("length", text(length),
                                        text("at most what the session holds, ", session.length)));
  }
  if (session.window_holds(length)) return;
  throw RequestError(
      Code::kFailedPrecondition,
      text("length: given ", length,
           ", for which a window lacks keys that were given back; allowed: the last ", kTruncatable,
           " of ", session.length, " may always be truncated"));
}

SessionState KvSessions::renew(std::string_view id, Duration lease, const SessionOwner& owner) {
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  const KvSessionPtr session = state_->find(id, owner, [] { return std::string("session_id"); });
  if (lease > Duration::zero()) session->lease = state_->lease(lease);
  state_->touch(*session, now);
  auto node = state_->expiries.extract(session->expiry);
  node.key() = session->expires;
  session->expiry = state_->expiries.insert(std::move(node));
  return KvState::state_of(*session);
}

void KvSessions::close(std::string_view id, const SessionOwner& owner) {
  const std::scoped_lock lock(state_->mutex);
  state_->expire(Clock::now());
  const KvSessionPtr session = state_->find(id, owner, [] { return std::string("session_id"); });
  state_->forget(*session);
  state_->expiries.erase(session->expiry);
  session->gone = true;
  if (session->users == 0) session->release();
}

KvStatistics KvSessions::statistics() {
  const std::scoped_lock lock(state_->mutex);
  state_->expire(Clock::now());
  KvStatistics sum;
  sum.sessions = state_->sessions.size();
  for (const PageClass& pages : state_->store.classes()) {
    const PageCounts& counts = pages.counts();
    sum.pages_in_use += counts.in_use;
    sum.pages_cached += counts.cached;
    sum.pages_promised += counts.promised;
    sum.bytes_in_use += counts.in_use * pages.page_bytes();
    sum.bytes_cached += counts.cached * pages.page_bytes();
    sum.bytes_promised += counts.promised * pages.page_bytes();
  }
  sum.evicted_pages = state_->store.evictions();
  sum.bytes_memory = state_->store.memory_bytes();
  sum.max_bytes = state_->store.max_bytes();
  sum.opened = state_->opened;
  sum.expired = state_->expired;
  sum.prefix_pages_asked = state_->asked;
  sum.prefix_pages_found = state_->found;
  return sum;
}

void KvSessions::tidy() {
  for (bool more = true; more;) {
    const std::scoped_lock lock(state_->mutex);
    state_->expire(Clock::now());
    state_->forget_accounts();
    more = state_->store.give_back(kSlabsAtOnce);
  }
}

void KvSessions::drop_cached() {
  const std::scoped_lock lock(state_->mutex);
  state_->store.drop_cached();
}

}  // namespace attnserve::sessions
