// Whose body comes next, while bodies come by turns: see Http2Connection::narrow.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "grpc/stream.h"

namespace attnserve::grpc {

// One connection's, on its thread. As many bodies come at once as keep the connection busy; the
// others have hardly begun, take no memory and delay no headers behind them.
class BodyTurns {
 public:
  using StreamRef = std::shared_ptr<Stream>;

  void ask(const StreamRef& stream, TimePoint now);
  // The next call whose turn has come; nullptr: none's. A turn ends with the body, or when it has
  // lasted so long that its caller must be slow, which shall not keep others waiting.
  StreamRef next(TimePoint now);
  bool anyone_waits() const { return !waiting_.empty(); }
  // When the first of the turns ends at the latest; kNever: there are none.
  TimePoint due() const;
  void end(TimePoint now);  // all may send

 private:
  std::deque<StreamRef> waiting_;
  std::vector<StreamRef> sending_;
};

}  // namespace attnserve::grpc
