// A session that leaves for another server: nothing else happens to it until it has moved, or
// stays.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "sessions/kv_spec.h"
#include "sessions/kv_transfer.h"

namespace attnserve::sessions {

class KvSession;
class KvSessions;

// Where a session went.
struct MovedTo {
  std::string address;     // of the server, as its callers take it
  std::string authority;   // the name that it goes by, if not that
  std::string session_id;  // there
  std::uint64_t length = 0;
};

// A request names a session that is on its way: it is not known yet where it will be.
class SessionLeavesError : public RequestError {
 public:
  explicit SessionLeavesError(std::string_view id);
  const std::string& session_id() const { return session_id_; }

 private:
  std::string session_id_;
};

// A request names a session that is at another server.
class SessionMovedError : public RequestError {
 public:
  SessionMovedError(std::string_view id, MovedTo to);
  const std::string& session_id() const { return session_id_; }
  const MovedTo& to() const { return to_; }

 private:
  std::string session_id_;
  MovedTo to_;
};

// By KvSessions::depart. Owned by one thread at a time. KvSessions outlives it. Let go before
// `moved`: the session stays.
class KvDeparture {
 public:
  KvDeparture(KvDeparture&&) noexcept;
  KvDeparture& operator=(KvDeparture&&) = delete;
  ~KvDeparture();

  std::string_view owner() const;
  std::uint64_t length() const;
  std::chrono::microseconds lease() const;
  const std::vector<PageHash>& prefix_hashes() const;  // what stands for its first full pages
  // Its chunks, as KvExport has them.
  Bytes next(std::size_t most) { return export_->next(most); }
  bool ended() const { return export_->ended(); }
  void again();  // from chunk 0, as another export

  // It is there now, and no more here. The stream that used it last: see SessionOwner. Once.
  std::uint64_t moved(MovedTo to);

 private:
  friend class KvSessions;
  KvDeparture(KvSessions& store, std::shared_ptr<KvSession> session);

  KvSessions* store_;
  std::shared_ptr<KvSession> session_;
  std::optional<KvExport> export_;  // always
};

}  // namespace attnserve::sessions
