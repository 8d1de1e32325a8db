#include "services/decode_transfer.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "requests/refusal.h"
#include "services/decode_layer.h"
#include "wire/kv_sessions.h"

namespace attnserve::services {
namespace {

// Of chunks that wait for the socket.
constexpr std::size_t kMostUnsent = std::size_t{4} << 20;

}  // namespace

wire::SessionState wire_state(const sessions::SessionState& session) {
  return {session.id, session.length, session.max_tokens, session.reserved_tokens,
          static_cast<std::uint64_t>(session.lease.count())};
}

Bytes session_message(std::uint64_t request_id, const sessions::SessionState& session) {
  return wire::encode_session(request_id, wire_state(session));
}

void SessionExport::resume() {
  if (!over_ && idle_.exchange(false)) schedule();
}

void SessionExport::schedule() {
  auto refused = core_.chores.add([self = shared_from_this()] { self->send_next(); });
  if (refused) end({std::move(*refused), {}});
}

void SessionExport::send_next() {
  if (over_) return;
  try {
    Lease lease(budget_of(core_, stream_->info()));
    lease.grow_or_throw(core_.limits.chunk_bytes);
    auto chunk = std::make_shared<Bytes>(from_.next(core_.limits.chunk_bytes));
    chunk->lease = std::move(lease);
    const bool last = from_.ended();
    OutMessage message =
        OutMessage::of(wire::encode_session_chunk_head(request_id_, index_++, last, chunk->size()));
    const ByteSpan bytes = chunk->span();
    message.pieces.push_back({std::move(chunk), bytes});
    if (last) {
      Delivery delivery;
      delivery.messages.push_back(std::move(message));
      end(std::move(delivery));
      return;
    }
    stream_->send_part(std::move(message));
  } catch (...) {
    end({status_of(std::current_exception()), {}});
    return;
  }
  if (stream_->unsent() < kMostUnsent) {
    schedule();
    return;
  }
  idle_ = true;
  // All may have left before anybody could see that this waits for it.
  if (stream_->unsent() == 0) resume();
}

void SessionExport::end(Delivery delivery) {
  if (over_.exchange(true)) return;
  stream_->answer(nullptr, decode_delivery(request_id_, std::move(delivery)));
}

void SessionImport::add(std::uint32_t index, ByteSpan data, bool last,
                        std::shared_ptr<const Bytes> message) {
  call_->pause();
  auto refused = core_.chores.add(
      [self = shared_from_this(), index, data, last, message = std::move(message)] {
        self->take(index, data, last);
        self->call_->resume();
      });
  if (!refused) return;
  call_->resume();
  end(std::move(*refused), {});
}

void SessionImport::take(std::uint32_t index, ByteSpan data, bool last) {
  if (over_) {
    into_.reset();
    return;
  }
  Status status;
  sessions::SessionState session;
  try {
    if (index != next_) requests::refuse("chunk.index", text(index), text(next_));
    ++next_;
    into_->add(data);
    if (!last) return;
    session = into_->finish();
  } catch (...) {
    status = status_of(std::current_exception());
  }
  into_.reset();
  end(std::move(status), session);
}

void SessionImport::end(Status status, const sessions::SessionState& session) {
  if (!over_.exchange(true)) ended_(std::move(status), session);
}

}  // namespace attnserve::services
