// Sessions on their way out of the server, or in, chunk by chunk: copied and summed by the thread
// of chores.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "services/core.h"
#include "services/stream_state.h"
#include "sessions/kv_transfer.h"
#include "wire/kv_sessions.h"

namespace attnserve::services {

// An export. Chunks follow one another as the caller takes them.
class SessionExport : public std::enable_shared_from_this<SessionExport> {
 public:
  SessionExport(Core& core, std::shared_ptr<StreamState> stream, std::uint64_t request_id,
                sessions::KvExport from)
      : core_(core), stream_(std::move(stream)), request_id_(request_id), from_(std::move(from)) {}

  void resume();  // the caller has taken what was sent, or it is to begin
  void abandon() { over_ = true; }
  bool over() const { return over_; }

 private:
  void schedule();
  void send_next();
  void end(Delivery delivery);

  Core& core_;
  const std::shared_ptr<StreamState> stream_;
  const std::uint64_t request_id_;
  sessions::KvExport from_;  // one chore at a time
  std::uint32_t index_ = 0;
  std::atomic<bool> idle_{true}, over_{false};
};

// What came of an import: a status that is not OK, or the session.
using ImportEnded = std::function<void(Status status, const sessions::SessionState& session)>;

// An import. The thread of the connection calls `add`, chunk by chunk; any may call `ended`, once.
class SessionImport : public std::enable_shared_from_this<SessionImport> {
 public:
  SessionImport(Core& core, std::shared_ptr<grpc::Call> call, sessions::KvImport into,
                ImportEnded ended)
      : core_(core), call_(std::move(call)), ended_(std::move(ended)), into_(std::move(into)) {}

  // `message` holds the chunk's data.
  void add(std::uint32_t index, ByteSpan data, bool last, std::shared_ptr<const Bytes> message);
  void abandon() { over_ = true; }
  bool over() const { return over_; }

 private:
  void take(std::uint32_t index, ByteSpan data, bool last);
  void end(Status status, const sessions::SessionState& session);

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;  // is paused while a chunk is being taken
  const ImportEnded ended_;
  std::optional<sessions::KvImport> into_;  // chores alone
  std::uint32_t next_ = 0;                  // likewise
  std::atomic<bool> over_{false};
};

Bytes session_message(std::uint64_t request_id, const sessions::SessionState& session);
wire::SessionState wire_state(const sessions::SessionState& session);

}  // namespace attnserve::services
