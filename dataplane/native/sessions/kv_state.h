// What KvSessions keeps, and what its parts do under its lock.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "sessions/kv_departure.h"
#include "sessions/kv_prefixes.h"
#include "sessions/kv_session.h"
#include "sessions/kv_sessions.h"
#include "sessions/page_store.h"

namespace attnserve::sessions {

struct KvState {
  explicit KvState(const KvConfig& given);

  const KvConfig config;

  std::mutex mutex;  // guards all below, and all sessions
  KvPrefixes prefixes;
  PageStore store;
  struct IdHash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::unordered_map<std::string, KvSessionPtr, IdHash, std::equal_to<>> sessions;
  // By owner: those with sessions, or with pages that are only cached.
  std::unordered_map<std::string, PageAccountPtr, IdHash, std::equal_to<>> accounts;
  std::multimap<TimePoint, KvSessionPtr> expiries;  // one for each session
  struct Moved {
    std::string owner;
    MovedTo to;
  };
  // By their ids here; for as long as the server, which drains, is there.
  std::unordered_map<std::string, Moved, IdHash, std::equal_to<>> moved;
  std::vector<std::weak_ptr<const KvPlan>> plans;
  bool takes_no_more = false;  // sessions
  std::uint64_t steps = 0;
  std::uint64_t opened = 0, expired = 0, asked = 0, found = 0;

  Duration lease(Duration asked) const;
  void touch(KvSession& session, TimePoint now) const { session.expires = now + session.lease; }
  // Forgets the sessions whose lease ran out, but those that are used at this moment.
  void expire(TimePoint now);

  // The plan of a spec: the one that there is, if sessions or cached pages have it.
  KvPlanPtr plan_of(const SessionSpec& spec);
  KvSessionPtr make(const KvPlanPtr& plan, const SessionOwner& owner);
  // Makes the promise of a session that is being made what it should be. Throws RequestError
  // RESOURCE_EXHAUSTED.
  void promise(KvSession& session, std::string_view field, const SessionOwner& owner,
               TimePoint now);
  // Promises so many pages more (or fewer) to the owner of a session. Throws as `promise`.
  void claim(KvSession& session, std::int64_t more, std::string_view field,
             const SessionOwner& owner, TimePoint now);
  void check_count(std::size_t more, const SessionOwner& owner, TimePoint now) const;
  void add(const KvSessionPtr& session, std::string id, Duration asked, TimePoint now);
  bool forget(KvSession& session);  // from `sessions`; whether it was there
  void forget_accounts();           // of owners that have nothing

  // Throws RequestError NOT_FOUND, or says that the session leaves or has moved. `field` gives the
  // name of what the id came in.
  template <class Field>
  KvSessionPtr& find(std::string_view id, const SessionOwner& owner, const Field& field) {
    const auto found_at = sessions.find(id);
    if (found_at == sessions.end() || found_at->second->owner != owner.name) {
      refuse_moved(id, owner.name);
      refuse_unknown(id, field());
    }
    KvSession& session = *found_at->second;
    if (session.leaves()) throw SessionLeavesError(id);
    if (owner.stream > 0) session.stream = owner.stream;
    return found_at->second;
  }
  // As find; and it is in no step, and no tree of it waits, else FAILED_PRECONDITION.
  KvSessionPtr find_idle(std::string_view id, const SessionOwner& owner, TimePoint now);
  void refuse_moved(std::string_view id, std::string_view owner) const;  // if it has moved
  [[noreturn]] static void refuse_unknown(std::string_view id, const std::string& field);
  static void check_idle(const KvSession& session, bool tree_allowed, std::string_view field);

  void leave(KvSession& session);  // no longer used by the caller: back with its pages, if gone
  static SessionState state_of(const KvSession& session);
};

// max_tokens and reserved_tokens as they count. Throws RequestError INVALID_ARGUMENT.
Growth checked_growth(Growth asked, std::uint64_t default_max, std::uint64_t length,
                      const std::string& prefix);

}  // namespace attnserve::sessions
