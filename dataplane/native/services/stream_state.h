// What a stream of requests shares with their computations, which may outlive its handler.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "grpc/call.h"
#include "services/core.h"
#include "services/exchange.h"

namespace attnserve::services {

// Any thread, unless it says so. Made by `open`, which lets a drain of the server reach it.
class StreamState : public std::enable_shared_from_this<StreamState> {
 public:
  // `method`: as it is counted, a literal; empty: it is not.
  // `has_sessions`: of KV.
  static std::shared_ptr<StreamState> open(Core& core, std::shared_ptr<grpc::Call> call,
                                           std::string_view method, bool has_sessions = false);

  // A request was announced: an answer is owed.
  void begun();
  // Its computation is about to start: it can be cancelled from now on, and takes room.
  void started(const std::shared_ptr<schedule::RequestContext>& request);
  // Parts of it are about to, while its chunks are still to come: it takes no room yet, for a
  // stream without room is not read, and they would never come.
  void started_early(const std::shared_ptr<schedule::RequestContext>& request);
  // Its answer: the messages, whatever the status, which is counted. `request` is null if it never
  // started.
  void answer(const std::shared_ptr<schedule::RequestContext>& request, Delivery delivery);
  // The caller sends no more: the call ends with the last answer.
  void read_all();
  // The stream itself is broken: it ends now, with this status.
  void fail(Status status);
  // The call is over: nobody waits for what still runs.
  void ended(Code reason);
  // A message of an answer that goes on, such as a chunk.
  void send_part(OutMessage message) { call_->send(std::move(message)); }
  std::size_t unsent() const { return call_->unsent(); }
  bool draining() const;
  std::uint64_t number() const { return number_; }  // among the open streams, above 0
  const grpc::CallInfo& info() const { return call_->info(); }

  // The connection's thread: after each message, no more are taken while as many requests as are
  // allowed compute, or wait to be sent.
  void pause_if_full();
  // All answers queued have left for the socket.
  void all_sent();

 private:
  StreamState(Core& core, std::shared_ptr<grpc::Call> call, std::string_view method)
      : core_(core), call_(std::move(call)), method_(method) {}
  bool full() const { return computing_ + queued_ >= core_.limits.max_stream_requests; }
  void count(Code code);
  void finish(Status status);
  void drain();
  void tell(Bytes message);
  void cancel_all();
  void finish_if_idle(const std::unique_lock<std::mutex>& held);

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const std::string_view method_;
  std::uint64_t number_ = 0;
  bool paused_ = false;  // the connection's thread alone
  std::atomic<std::size_t> computing_{0}, queued_{0};
  mutable std::mutex mutex_;  // guards what follows, and the order of messages
  // Whether each takes room.
  std::unordered_map<std::shared_ptr<schedule::RequestContext>, bool> started_;
  std::size_t unanswered_ = 0;
  bool read_all_ = false;
  bool draining_ = false;
  bool over_ = false;
};

}  // namespace attnserve::services
