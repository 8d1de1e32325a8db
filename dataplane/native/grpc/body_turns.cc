#include "grpc/body_turns.h"

#include <algorithm>
#include <utility>

namespace attnserve::grpc {
namespace {

constexpr std::size_t kBytesAtOnce = 2U << 20;
constexpr Duration kLongestTurn = std::chrono::milliseconds(100);

// Whether nothing of its body is expected any more.
bool has_sent(const Stream& stream) {
  return stream.half_closed || stream.finishing || stream.closed || !stream.body;
}

}  // namespace

void BodyTurns::ask(const StreamRef& stream, TimePoint now) {
  stream->waits_for_turn = true;
  stream->turn_since = now;
  waiting_.push_back(stream);
}

BodyTurns::StreamRef BodyTurns::next(TimePoint now) {
  std::erase_if(sending_, [&](const StreamRef& stream) {
    return has_sent(*stream) || now - stream->turn_since >= kLongestTurn;
  });
  std::size_t coming = 0;
  for (const StreamRef& stream : sending_) coming += stream->body->missing();
  while (!waiting_.empty() && (sending_.empty() || coming < kBytesAtOnce)) {
    StreamRef stream = std::move(waiting_.front());
    waiting_.pop_front();
    stream->waits_for_turn = false;
    if (has_sent(*stream)) continue;
    stream->forgive(now - stream->turn_since);
    stream->turn_since = now;
    sending_.push_back(stream);
    return stream;
  }
  return nullptr;
}

TimePoint BodyTurns::due() const {
  TimePoint first = kNever;
  for (const StreamRef& stream : sending_) {
    first = std::min(first, stream->turn_since + kLongestTurn);
  }
  return first;
}

void BodyTurns::end(TimePoint now) {
  for (const StreamRef& stream : waiting_) {
    stream->waits_for_turn = false;
    stream->forgive(now - stream->turn_since);
  }
  waiting_.clear();
  sending_.clear();
}

}  // namespace attnserve::grpc
