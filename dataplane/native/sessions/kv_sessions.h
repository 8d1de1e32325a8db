// KV sessions: keys and values that stay in the server, layer by layer, while a caller generates.
//
// A session is opened, takes steps, and is closed or expires. A step adds tokens to one or many
// sessions: begin_step plans it, and each layer is then computed once, in any order, between
// begin_layer and KvLayer::done. With the last layer the tokens are in the session; if the step is
// let go before, they never were. Between steps a session can be truncated, forked, exported. After
// a step with a tree it must be committed first.
//
// While a step is under way `length` is what it was before. Every layer's table grows when that
// layer begins, and only then, so layers of a step may be at different lengths.
//
// Pages. Full pages may be shared, by forks and by sessions with the same prefix, and are never
// written to while they are. The last page of a fork, which is not full, is copied by whoever
// writes to it first.
//
// Windows. At the end of a step a layer with a window gives back the pages that no later query can
// see, but keeps the kTruncatable tokens before them: the last so many tokens can always be
// truncated (before a prefix's end: as far as its pages were still there). Published pages among
// them stay cached.
//
// Promises. A session that was opened can take steps up to its reserved tokens without finding the
// store full. Beyond that, up to max_tokens, begin_step claims what is needed, or refuses. For
// layers with a window only the window and a step of Config::promised_step tokens are promised:
// longer steps claim more, or are refused, at begin_step. Full pages that are shared are promised
// once; truncating to before the end of what is shared claims the session's own pages, or refuses.
// What an owner is promised, its sessions together and shared pages once, has a bound of its own.
//
// Errors. Calls throw RequestError and leave every session as it was: NOT_FOUND, no such session,
// or it expired or is of another owner; INVALID_ARGUMENT; FAILED_PRECONDITION, it is in a step or
// waits for commit, or its window has gone on; RESOURCE_EXHAUSTED, nothing is left to promise (with
// retry_after unless it never fits), or the step exceeds max_tokens.
//
// Any thread, one lock, which is never held while keys and values are computed, moved by commit, or
// exported. (The copy of a page that is written to after a fork is made under it, one at a time.)
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "sessions/kv_departure.h"
#include "sessions/kv_spec.h"
#include "sessions/kv_step.h"
#include "sessions/kv_transfer.h"

namespace attnserve::sessions {

// Tokens that a layer with a window keeps besides, so that they can be truncated.
constexpr std::uint64_t kTruncatable = 64;
constexpr std::uint64_t kMostTokens = std::uint64_t{1} << 24;  // of a session
constexpr std::size_t kMostLayers = 1024;
constexpr std::size_t kMostSessions = std::size_t{1} << 16;

struct KvConfig {
  std::size_t max_bytes = 0;     // of all pages
  std::size_t page_tokens = 16;  // a multiple of 4
  std::size_t slab_bytes = std::size_t{2} << 20;
  std::uint64_t promised_step = 512;
  Duration default_lease = std::chrono::minutes(5);
  Duration max_lease = std::chrono::hours(1);
};

struct KvStatistics {
  std::size_t sessions = 0;
  std::size_t pages_in_use = 0, pages_cached = 0, pages_promised = 0;
  std::size_t bytes_in_use = 0, bytes_cached = 0;
  std::size_t bytes_promised = 0;  // in use or to be used
  std::size_t bytes_memory = 0;    // taken from the system
  std::size_t max_bytes = 0;
  // Ever:
  std::uint64_t opened = 0, expired = 0;
  std::uint64_t prefix_pages_asked = 0, prefix_pages_found = 0;  // a token page counts once
  std::uint64_t evicted_pages = 0;
};

// Whose sessions: the caller's identity, how many of its sessions may be open at once, how many
// bytes they may be promised together (0: no bound of its own), and by which stream it asks, a
// number above 0 (0: none is to be told if the session moves).
struct SessionOwner {
  template <std::convertible_to<std::string_view> Name>
  SessionOwner(const Name& name_, std::size_t sessions = 0, std::size_t bytes = 0,
               std::uint64_t stream_ = 0)
      : name(name_), most_sessions(sessions), most_bytes(bytes), stream(stream_) {}

  std::string_view name;
  std::size_t most_sessions;
  std::size_t most_bytes;
  std::uint64_t stream;
};

struct KvState;

class KvSessions {
 public:
  // Throws RequestError RESOURCE_EXHAUSTED if the address space cannot be had.
  explicit KvSessions(KvConfig config);
  ~KvSessions();  // no step, layer, export or import is left

  const KvConfig& config() const;
  // What tables count from: the operator's `cache`. Only pages of a KvLayer may be touched.
  MutableByteSpan cache();

  // All of them or none, in order: at least one, as requests::plan_open checks them, layers above
  // all. `owner` is the caller's identity. The layout's page_tokens are the store's. A lease is
  // what a caller asks for, the default if that is not above zero, and never longer than max_lease.
  // Fields in messages: sessions[i].
  std::vector<SessionState> open(const SessionSpec& spec, std::span<const NewSession> sessions,
                                 Duration lease, const SessionOwner& owner);

  // Sessions of equal spec, each once: at least one, as requests::plan_step checks what needs no
  // session. Takes their lease anew, as every use does, layers included.
  // Fields in messages: sessions[i].
  std::shared_ptr<KvStep> begin_step(std::span<const SessionStep> sessions,
                                     const SessionOwner& owner, bool queries_only = false);
  // A layer that there is. INVALID_ARGUMENT: computed already, or being computed. NOT_FOUND: a
  // session of the step was closed or expired meanwhile; the others are unharmed, and the step to
  // be given up.
  KvLayer begin_layer(const std::shared_ptr<KvStep>& step, std::size_t layer);

  // Keeps the tokens of one path of the tree, indices of the last step's new tokens from the root
  // on, and ends the tree. None: keeps nothing of it.
  SessionState commit(std::string_view id, std::span<const std::uint32_t> accepted,
                      const SessionOwner& owner);
  SessionState truncate(std::string_view id, std::uint64_t length, const SessionOwner& owner);
  // `length`: tokens to begin with; at most what the other one holds.
  SessionState fork(std::string_view id, std::uint64_t length, Growth growth, Duration lease,
                    const SessionOwner& owner);
  SessionState fork(std::string_view id, Growth growth, Duration lease, const SessionOwner& owner);
  // Another lease if that is above zero.
  SessionState renew(std::string_view id, Duration lease, const SessionOwner& owner);
  // A step that it is in cannot go on; its pages are back once no layer is being computed.
  void close(std::string_view id, const SessionOwner& owner);

  // A snapshot, to be read chunk by chunk while the session goes on. See kv_transfer.h.
  KvExport export_session(std::string_view id, const SessionOwner& owner);
  // The session is there once `KvImport::finish` has returned. `exported` as read from chunk 0;
  // `prefix_hashes`: of its first full pages.
  KvImport import_session(const ExportedSession& exported, Growth growth, Duration lease,
                          const SessionOwner& owner, std::span<const PageHash> prefix_hashes = {});

  // From now on none is opened, forked or imported: UNAVAILABLE.
  void take_no_more();
  // Of all sessions, in no order.
  std::vector<std::string> ids();
  // From now on the session takes no other step, and once nothing of it is under way, all that is
  // asked of it is refused with SessionLeavesError, until it has moved or stays. Nothing: something
  // is under way still, a step, or a tree that waits for commit; to be asked again, or it is to
  // `stay`. NOT_FOUND: it is gone.
  std::optional<KvDeparture> depart(std::string_view id);
  void stay(std::string_view id);
  bool leaves(std::string_view id);  // whether it would be refused so
  std::optional<MovedTo> moved_to(std::string_view id, std::string_view owner);

  KvStatistics statistics();
  // Forgets what has expired and gives idle memory back: to be called every second or so.
  void tidy();
  void drop_cached();  // evicts all pages that no session holds

 private:
  friend class KvStep;
  friend class KvLayer;
  friend class KvExport;
  friend class KvImport;
  friend class KvDeparture;

  SessionState fork_at(std::string_view id, const std::uint64_t* length, Growth growth,
                       Duration lease, const SessionOwner& owner);
  static std::string new_id();
  static void check_length(const KvSession& session, std::uint64_t length);

  std::unique_ptr<KvState> state_;
};

}  // namespace attnserve::sessions
