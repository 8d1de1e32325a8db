// What a bidirectional stream shares with the computations of its requests, which may outlive its
// handler.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>

#include "grpc/call.h"
#include "services/core.h"
#include "services/exchange.h"

namespace attnserve::services {

// What sets streams of one method apart.
struct StreamMethod {
  std::string name;  // as it is counted
  Bytes (*encode_error)(std::uint64_t request_id, const Status& status);
};

// Any thread. Made by `open`, which lets a drain of the server reach it.
class StreamState : public std::enable_shared_from_this<StreamState> {
 public:
  static std::shared_ptr<StreamState> open(Core& core, std::shared_ptr<grpc::Call> call,
                                           const StreamMethod& method);

  // A request was announced: an answer is owed.
  void begun();
  // Its computation is about to start: it can be cancelled from now on, and takes room.
  void started(const std::shared_ptr<schedule::RequestContext>& request);
  // Its answer or error. `request` is null if it never started.
  void answer(std::uint64_t request_id, const std::shared_ptr<schedule::RequestContext>& request,
              Delivery delivery);
  // A message of an answer that goes on, such as a chunk.
  void send_part(OutMessage message) { call_->send(std::move(message)); }
  std::size_t unsent() const { return call_->unsent(); }
  // The caller sends no more: the call ends with the last answer.
  void read_all();
  // The stream itself is broken: it ends now, with this status.
  void fail(Status status);
  // The call is over: nobody waits for what still runs.
  void ended(Code reason);
  // All answers queued have left for the socket.
  void all_sent() { queued_ = 0; }

  bool draining() const;
  // Requests that compute, or whose answers have not left yet.
  std::size_t occupied() const { return computing_ + queued_; }
  const grpc::CallInfo& info() const { return call_->info(); }

 private:
  StreamState(Core& core, std::shared_ptr<grpc::Call> call, const StreamMethod& method)
      : core_(core), call_(std::move(call)), method_(method) {}
  void drain();
  void cancel_all();
  void finish_if_idle(const std::unique_lock<std::mutex>& held);

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const StreamMethod& method_;
  std::uint64_t number_ = 0;  // among the open streams
  std::atomic<std::size_t> computing_{0}, queued_{0};
  mutable std::mutex mutex_;  // guards what follows, and the order of messages
  std::unordered_set<std::shared_ptr<schedule::RequestContext>> started_;
  std::size_t unanswered_ = 0;
  bool read_all_ = false;
  bool draining_ = false;
  bool over_ = false;
};

}  // namespace attnserve::services
