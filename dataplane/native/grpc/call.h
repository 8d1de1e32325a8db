// What the transport and the services know of each other. The transport turns bytes into these
// events and these calls into bytes; it knows no method. The services know no socket.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/trace_context.h"

namespace attnserve::identity {
class Caller;
struct Credential;
}  // namespace attnserve::identity

namespace attnserve::tracing {
class Recording;
}  // namespace attnserve::tracing

namespace attnserve::grpc {

// What is known of a call from its headers alone.
struct CallInfo {
  std::string path;  // "/attnserve.v1.AttentionService/Attend"
  // Where it comes from, as gRPC writes it, and after an '@' the caller's name, where callers are
  // told apart by one: "ipv4:127.0.0.1:4242", "ipv6:%5B::1%5D:4242", "unix:@trainer".
  std::string peer;
  std::uint64_t connection = 0;  // number of its connection, never used again
  TimePoint arrived{};           // when its headers had come
  TimePoint deadline = kNever;   // grpc-timeout, counted from then
  std::vector<std::pair<std::string, std::string>> metadata;  // the caller's own, lower-case names
  std::string authorization;  // a secret: neither logged nor repeated
  // Names in the certificate that the connection was opened with, the most telling first.
  std::shared_ptr<const std::vector<std::string>> certificate;
  std::shared_ptr<identity::Caller> caller;                // once it is known
  std::shared_ptr<const identity::Credential> credential;  // that it is known by, if any
  TraceContext trace;                                      // that it belongs to, if it says so
  std::string trace_state;  // `tracestate`, if the trace is recorded; at most kMostTraceState bytes
  std::shared_ptr<tracing::Recording> recording;  // of this call, if it is recorded
};

// An open call, as services hold it. Every function may be called from any thread and does nothing
// once the call has ended, so that nobody needs to know whether it has.
class Call {
 public:
  virtual ~Call() = default;
  virtual const CallInfo& info() const = 0;
  // Says who calls; `name` is empty for callers that have none. On the connection's thread, before
  // the call is anybody else's. The authorization is forgotten.
  virtual void identify(std::shared_ptr<identity::Caller> caller, const std::string& name,
                        std::shared_ptr<const identity::Credential> credential) = 0;
  // Keeps what the call is recorded in. When `identify` may be called, after it.
  virtual void record(std::shared_ptr<tracing::Recording> recording) = 0;
  // Queues one message of the answer. Messages are written in the order of these calls.
  virtual void send(OutMessage message) = 0;
  // Ends the call once all that was queued before has been written: trailers with this status.
  virtual void finish(Status status) = 0;
  // Flow control towards the caller: while paused no further message is delivered and the stream's
  // window is not opened again. Counts: as many resumes as pauses.
  virtual void pause() = 0;
  virtual void resume() = 0;
  // Bytes queued by send, prefixes included, that the socket has not taken yet; 0 once ended.
  virtual std::size_t unsent() const = 0;
  virtual bool ended() const = 0;
};

// The behaviour of one method for one call. The transport calls these on the thread of the call's
// connection, one at a time, and destroys the handler there after on_end; none of them may block.
class CallHandler {
 public:
  virtual ~CallHandler() = default;
  // A whole message, decompressed, in memory of its own that is aligned and charged to the budget.
  virtual void on_message(Bytes message) = 0;
  // The caller sends no more messages.
  virtual void on_half_close() = 0;
  // The last message queued has left for the socket: unsent() is 0.
  virtual void on_all_sent() {}
  // When the handler is to hear on_due, asked after each event; kNever: not at all. While the
  // caller may not send, because of a pause or of answers that it does not read, nothing is due.
  virtual TimePoint due() const { return kNever; }
  // That time has come. Afterwards something else must be due.
  virtual void on_due(TimePoint now) { (void)now; }
  // The caller could not send for so long, and can again.
  virtual void on_held(Duration held) { (void)held; }
  // The call is over; the last event. kOk: finish() was carried out. kCancelled: the caller reset
  // it or its connection is gone. Any other: the transport has answered so itself,
  // kDeadlineExceeded for the deadline or a slow body, kResourceExhausted or kInternal for a
  // message it cannot take.
  virtual void on_end(Code reason) = 0;
};

// How to receive the messages of a call.
struct Reception {
  std::unique_ptr<CallHandler> handler;
  std::size_t max_message_bytes;  // larger ones end the call with RESOURCE_EXHAUSTED, unread
  ByteBudget* budget = nullptr;   // what messages are charged to; nullptr: the connection's
  std::shared_ptr<const void> kept = nullptr;  // until the call has ended
  bool is_known = true;  // who calls; else more than a little of bodies is not to be sent ahead
};

// All methods of a server. Called on the threads of connections.
class Service {
 public:
  virtual ~Service() = default;
  // The headers of a call have come and not a byte of its body has been looked at: a handler, or
  // the status that refuses it. UNIMPLEMENTED for an unknown path.
  virtual std::variant<Reception, Status> accept(std::shared_ptr<Call> call) = 0;
  // Whether callers must say who they are in ways that `accept` alone cannot check: connections
  // then begin as after a call that `is_known` is false of.
  virtual bool begins_unknown() { return false; }
  // Whether calls want `recheck` about once a second.
  virtual bool rechecks() { return false; }
  // Whether an accepted call may go on: nothing, or the status that ends it. `trusted`: so is the
  // certificate that its connection was opened with, still.
  virtual std::optional<Status> recheck(const CallInfo& info, bool trusted) {
    (void)info, (void)trusted;
    return std::nullopt;
  }
  // Everything that one round of reading brought has been delivered: the moment to run what is
  // short on this very thread, as one batch, before its answers are written.
  virtual void after_events() {}
  // Whether more bodies should come now; asked while bodies come by turns.
  virtual bool wants_bodies() { return true; }
  // A round of events is over: for how long its thread was busy with it, waiting for none.
  virtual void after_round(Duration busy) { (void)busy; }
  // A connection has closed, all its calls have ended before.
  virtual void connection_closed(std::uint64_t connection) { (void)connection; }
  // Counts how calls end that never came to a handler's on_end: refused, by accept too, or broken.
  virtual void count(std::string_view path, Code code) { (void)path, (void)code; }
};

}  // namespace attnserve::grpc
