#include "sessions/kv_state.h"

#include <algorithm>
#include <utility>

#include "base/text.h"

namespace attnserve::sessions {

namespace {

constexpr std::size_t kMostNamed = 80;  // characters of a wrong id that are repeated
constexpr std::chrono::milliseconds kLeastRetry{1};

std::chrono::microseconds retry_after(const std::multimap<TimePoint, KvSessionPtr>& expiries,
                                      TimePoint now) {
  if (expiries.empty()) return kLeastRetry;
  const Duration left = expiries.begin()->first - now;
  return std::max<std::chrono::microseconds>(kLeastRetry,
                                             std::chrono::round<std::chrono::microseconds>(left));
}

}  // namespace

KvState::KvState(const KvConfig& given)
    : config(given),
      store(given.max_bytes, given.slab_bytes,
            [this](PageClass& pages, PageIndex page) { prefixes.withdraw(pages, page); }) {}

Duration KvState::lease(Duration asked_for) const {
  return std::min(asked_for <= Duration::zero() ? config.default_lease : asked_for,
                  config.max_lease);
}

void KvState::expire(TimePoint now) {
  while (!expiries.empty() && expiries.begin()->first <= now) {
    auto node = expiries.extract(expiries.begin());
    const KvSessionPtr session = node.mapped();
    if (session->users > 0) touch(*session, now);
    if (session->expires > now) {
      node.key() = session->expires;
      session->expiry = expiries.insert(std::move(node));
      continue;
    }
    ++expired;
    forget(*session);
    session->gone = true;
    session->release();
  }
}

KvPlanPtr KvState::plan_of(const SessionSpec& spec) {
  std::erase_if(plans, [](const auto& plan) { return plan.expired(); });
  for (const auto& plan : plans) {
    const KvPlanPtr kept = plan.lock();
    if (kept && kept->spec == spec) return kept;
  }
  KvPlanPtr plan = make_plan(spec, config.promised_step);
  plans.push_back(plan);
  return plan;
}

KvSessionPtr KvState::make(const KvPlanPtr& plan, const SessionOwner& owner) {
  auto own = accounts.find(owner.name);
  if (own == accounts.end()) {
    own = accounts.emplace(owner.name, std::make_shared<PageAccount>()).first;
  }
  auto session = std::make_shared<KvSession>(plan, store, prefixes, own->second);
  session->owner = owner.name;
  session->most_of_owner = owner.most_sessions;
  session->stream = owner.stream;
  session->root = prefixes.root_of(*plan, owner.name);
  return session;
}

void KvState::promise(KvSession& session, std::string_view field, const SessionOwner& owner,
                      TimePoint now) {
  const std::size_t charge = session.charge(session.length, session.added);
  claim(session, static_cast<std::int64_t>(charge - session.charged()), field, owner, now);
  session.set_charged(charge);
}

void KvState::claim(KvSession& session, std::int64_t more, std::string_view field,
                    const SessionOwner& owner, TimePoint now) {
  const PageClass& of = session.pages();
  const auto pages = static_cast<std::size_t>(std::max<std::int64_t>(more, 0));
  const std::size_t bytes = pages * of.page_bytes();
  const std::size_t together = session.account().bytes + bytes;
  const bool grows = more > 0 || session.id.empty();  // a new one, by what it shares, too
  if (owner.most_bytes > 0 && together > owner.most_bytes && grows) {
    throw RequestError(
        {Code::kResourceExhausted,
         text(field, ": ", together, " bytes of all sessions of this caller, with ", bytes,
              " more; allowed: ", owner.most_bytes, " (--caller-kv-mib)"),
         bytes <= owner.most_bytes ? retry_after(expiries, now) : std::chrono::microseconds{0}});
  }
  if (session.promise(more)) return;
  const std::size_t most = config.max_bytes / of.page_bytes();
  throw RequestError({Code::kResourceExhausted,
                      text(field, ": ", pages, " pages of ", of.page_bytes(),
                           " bytes to promise; allowed: ", store.free_pages(of),
                           " that are free, of ", most, " (--max-kv-mib)"),
                      pages <= most ? retry_after(expiries, now) : std::chrono::microseconds{0}});
}

void KvState::check_count(std::size_t more, const SessionOwner& owner, TimePoint now) const {
  const auto own = accounts.find(owner.name);
  const std::size_t before = own == accounts.end() ? 0 : own->second->sessions;
  if (owner.most_sessions > 0 && before + more > owner.most_sessions) {
    throw RequestError(
        {Code::kResourceExhausted,
         text("sessions: ", more, " beside ", before, " of this caller that are open; allowed: ",
              owner.most_sessions, " (--caller-sessions)"),
         more <= owner.most_sessions ? retry_after(expiries, now) : std::chrono::microseconds{0}});
  }
  if (sessions.size() + more <= kMostSessions) return;
  throw RequestError({Code::kResourceExhausted,
                      text("sessions: ", more, " beside ", sessions.size(),
                           " that are open; allowed: ", kMostSessions),
                      retry_after(expiries, now)});
}

void KvState::add(const KvSessionPtr& session, std::string id, Duration asked_for, TimePoint now) {
  if (takes_no_more) {
    throw RequestError(Code::kUnavailable, "the server is shutting down; try another one");
  }
  session->id = std::move(id);
  session->lease = lease(asked_for);
  touch(*session, now);
  session->expiry = expiries.emplace(session->expires, session);
  try {
    sessions.emplace(session->id, session);
  } catch (...) {
    expiries.erase(session->expiry);
    throw;
  }
  ++session->account().sessions;
  ++opened;
}

bool KvState::forget(KvSession& session) {
  if (sessions.erase(session.id) == 0) return false;
  --session.account().sessions;
  return true;
}

void KvState::forget_accounts() {
  std::erase_if(accounts, [](const auto& each) { return each.second.use_count() == 1; });
}

KvSessionPtr KvState::find_idle(std::string_view id, const SessionOwner& owner, TimePoint now) {
  const KvSessionPtr session = find(id, owner, [] { return std::string("session_id"); });
  touch(*session, now);
  check_idle(*session, false, "session_id");
  return session;
}

void KvState::refuse_moved(std::string_view id, std::string_view owner) const {
  const auto found_at = moved.find(id);
  if (found_at == moved.end() || found_at->second.owner != owner) return;
  throw SessionMovedError(id, found_at->second.to);
}

void KvState::refuse_unknown(std::string_view id, const std::string& field) {
  if (id.empty()) {
    throw RequestError(invalid_argument(field, "nothing", "an id that a session was opened with"));
  }
  throw RequestError(Code::kNotFound,
                     text(field, ": given ", quoted(first_characters(id, kMostNamed)),
                          "; no such session is open: never opened here, closed, "
                          "or its lease ran out"));
}

void KvState::check_idle(const KvSession& session, bool tree_allowed, std::string_view field) {
  const auto refuse_state = [&](std::string_view state, std::string_view until) {
    throw RequestError(Code::kFailedPrecondition, text(field, ": given ", quoted(session.id), ", ",
                                                       state, "; allowed: ", until));
  };
  if (session.in_step) {
    refuse_state("which is in a step",
                 "once all layers of the step are computed, or it is "
                 "abandoned");
  }
  if (!session.tree.empty() && !tree_allowed) {
    refuse_state("whose last step was a tree", "once that is committed");
  }
}

void KvState::leave(KvSession& session) {
  if (--session.users == 0 && session.gone) session.release();
}

SessionState KvState::state_of(const KvSession& session) {
  return {session.id, session.length, session.max_tokens, session.reserved_tokens,
          std::chrono::round<std::chrono::microseconds>(session.lease)};
}

Growth checked_growth(Growth asked, std::uint64_t default_max, std::uint64_t length,
                      const std::string& prefix) {
  if (asked.max_tokens == 0) asked.max_tokens = default_max;
  const std::uint64_t least = std::max<std::uint64_t>(length, 1);
  if (asked.max_tokens < least || asked.max_tokens > kMostTokens) {
    throw RequestError(invalid_argument(prefix + "max_tokens", text(asked.max_tokens),
                                        text(least, " to ", kMostTokens)));
  }
  if (asked.reserved_tokens == 0) asked.reserved_tokens = asked.max_tokens;
  if (asked.reserved_tokens > asked.max_tokens) {
    throw RequestError(invalid_argument(prefix + "reserved_tokens", text(asked.reserved_tokens),
                                        text("at most max_tokens, ", asked.max_tokens)));
  }
  return asked;
}

}  // namespace attnserve::sessions
