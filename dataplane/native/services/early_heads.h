// A streamed request whose first heads are computed while the others are still arriving: heads do
// not see each other. Its chunks are gathered in whole tensors, of which parts are views.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "requests/attend.h"
#include "services/core.h"
#include "services/exchange.h"
#include "services/stream_state.h"

namespace attnserve::services {

class EarlyHeads : public std::enable_shared_from_this<EarlyHeads> {
 public:
  // nullptr if the request is better computed as a whole. `prepared` is taken only if not.
  static std::shared_ptr<EarlyHeads> of(Core& core, std::shared_ptr<StreamState> stream,
                                        std::uint64_t request_id,
                                        std::shared_ptr<schedule::RequestContext> request,
                                        TimePoint arrived,
                                        std::unique_ptr<requests::PreparedAttend>& prepared);
  // Whether a plan whose elements are not there yet may be computed in parts.
  static bool possible(const requests::AttendPlan& plan);

  // Submits the heads that have come; `received`: bytes of query, key and value. The thread of the
  // connection alone. Throws RequestError if there is no room for the answer.
  void take(const std::array<std::size_t, 3>& received);
  // All chunks are there.
  void arrived_all(Admitted admitted);
  // The request has failed; whether that had not been said yet.
  bool fail();

 private:
  class Part;

  EarlyHeads(Core& core, std::shared_ptr<StreamState> stream, std::uint64_t request_id,
             std::shared_ptr<schedule::RequestContext> request, TimePoint arrived)
      : core_(core),
        stream_(std::move(stream)),
        request_id_(request_id),
        request_(std::move(request)),
        arrived_(arrived) {}
  void part_done(std::int64_t heads, const schedule::Outcome& outcome);
  void part_failed(Status status);
  void deliver();

  Core& core_;
  const std::shared_ptr<StreamState> stream_;
  const std::uint64_t request_id_;
  const std::shared_ptr<schedule::RequestContext> request_;
  const TimePoint arrived_;
  std::unique_ptr<requests::PreparedAttend> prepared_;
  std::unique_ptr<Answer> answer_;
  std::int64_t num_kv_heads_ = 1, least_ = 1, most_ = 1;
  std::array<std::size_t, 3> head_bytes_{};  // of a kv head, and what belongs to it of query
  std::int64_t taken_ = 0;                   // kv heads submitted; the connection's thread alone
  std::mutex mutex_;                         // guards what follows
  std::int64_t computed_ = 0;                // kv heads
  bool failed_ = false;
  std::optional<TimePoint> complete_;  // when all chunks were there
  TimePoint first_start_ = kNever, last_end_{};
  Admitted admitted_;
};

}  // namespace attnserve::services
