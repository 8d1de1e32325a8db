// One attention request between its checks and its answer, whichever protocol it came by:
// admitted, reserved, planned, run, answered; and all of it released exactly once, by destruction.
// Protocols only decode what comes before and encode what comes after.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "requests/attend.h"
#include "schedule/job.h"
#include "services/core.h"
#include "services/statistics.h"
#include "wire/attention.h"

namespace attnserve::services {

// What a request is answered with: messages, or the status of its failure.
struct Delivery {
  Status status;
  std::vector<OutMessage> messages;
};
Delivery delivery_of(OutMessage message);
using Deliver = std::function<void(Delivery)>;  // any thread, once

// How one protocol lays out an answer.
class Answer {
 public:
  virtual ~Answer() = default;
  // Makes room for the results of `prepared`: sets the `results` of its work.
  virtual void place(requests::PreparedAttend& prepared) = 0;
  // The messages, once they are computed.
  virtual std::vector<OutMessage> finish(requests::PreparedAttend& prepared,
                                         const Spans& spans) = 0;
  // It was answered, or failed, with what the model's statistics want to know.
  virtual void answered(const requests::PreparedAttend&, const Spans&) {}
};

struct ExchangeParts {
  std::shared_ptr<schedule::RequestContext> request;
  Admitted admitted;
  TimePoint arrived{};  // when its message was there, or the first of its chunks announced
  std::unique_ptr<requests::PreparedAttend> prepared;
  std::unique_ptr<Answer> answer;
  Deliver deliver;
};

class Exchange final : public schedule::Job {
 public:
  // Reserves the bytes of the answer and makes room for it. Throws RequestError.
  Exchange(Core& core, ExchangeParts parts);

  void run(std::span<schedule::Job* const> batch, engine::Stop* stop) override;
  std::unique_ptr<engine::Stop> make_stop() override;
  void done(const schedule::Outcome& outcome) noexcept override;
  void failed(Status status) noexcept override;
  std::string what() const override;

 private:
  Core& core_;
  ExchangeParts parts_;
  TimePoint validated_{};
};

// Checks, prepares and submits a request whose plan stands, on the thread of its connection.
void begin_exchange(Core& core, ExchangeParts parts);

// What a plan ran, for the record of its request, if there is one.
void note_run(const schedule::RequestContext& request, const requests::AttendPlan& plan);

wire::Timings timings_of(const Spans& spans, TimePoint now);

// An answer of attnserve.v1: in one message, in shared memory, or, on a stream, in chunks.
// `stream_id`: the request's, on a stream. `info`: of its call.
std::unique_ptr<Answer> attend_answer(Core& core, const grpc::CallInfo& info,
                                      const requests::AttendPlan& plan,
                                      std::optional<std::uint64_t> stream_id);

// A delivery of a stream on which an error is a message too, as this encodes it.
using EncodeError = Bytes (*)(std::uint64_t request_id, const Status& status);
Delivery with_error_message(Delivery delivery, std::uint64_t request_id, EncodeError encode);

// What a request of AttendStream is answered with.
Delivery attend_delivery(std::uint64_t stream_id, Delivery delivery);

// The chunks of a tensor that has been computed, and before them nothing: see encode_chunk_head.
void append_chunks(std::vector<OutMessage>& messages, std::uint64_t stream_id, wire::Output output,
                   const std::shared_ptr<Bytes>& elements, std::size_t chunk_bytes);

}  // namespace attnserve::services
