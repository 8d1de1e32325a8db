// A whole data plane: what the control plane makes, starts, feeds and drains.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/tokens.h"
#include "grpc/server.h"
#include "schedule/job.h"
#include "services/core.h"
#include "services/router.h"

namespace attnserve::services {

struct DataPlaneOptions {
  CoreOptions core;
  grpc::ServerOptions server;
  engine::SessionOptions session;
  std::string onnxruntime_library;
  std::string operators_library;  // empty: none
};

// What came of a run of a token model.
struct TokensOutcome {
  std::vector<engine::OwnedTensor> results;  // see engine::TokensWork
  std::int64_t padded_source = 0, padded_target = 0;
  Spans spans;
};

// A run goes on though its caller was told that it failed: what it was given is read still.
class AbandonedError final : public RequestError {
 public:
  using RequestError::RequestError;
};

// Any thread.
class DataPlane {
 public:
  // Throws std::runtime_error if ONNX Runtime does not load.
  explicit DataPlane(DataPlaneOptions options);
  ~DataPlane();

  // Listens and serves. Throws std::runtime_error that names the address.
  void start();
  std::vector<std::string> addresses() const;
  // Takes nothing new but what belongs to the KV sessions that are there, so that they can be moved
  // (Departure) before `drain`.
  void begin_moving();
  // Refuses new requests, answers those under way, and stops listening; false if some were not
  // answered in time. Then nothing is served any more.
  bool drain(Duration timeout);

  engine::ModelPtr load(engine::ModelFacts facts, std::vector<engine::VariantFacts> variants,
                        std::vector<engine::Pick> picks);
  // Stops what still runs. False: some of it has not ended in time.
  bool stop_running(Duration timeout) { return core.scheduler.stop_running(timeout); }
  // Runs sequences of one request, batched with others', and waits for it. Throws RequestError;
  // AbandonedError: what `work` views must be there for as long as the process.
  TokensOutcome attend_tokens(engine::TokensWork work,
                              std::shared_ptr<schedule::RequestContext> request, TimePoint arrived,
                              std::size_t working_bytes);
  std::size_t connections() const { return server_ ? server_->connections() : 0; }
  // See grpc::Server::replace_tls. Throws std::runtime_error before `start` too.
  void replace_tls(const grpc::TlsOptions& options);

  Core core;

 private:
  DataPlaneOptions options_;
  std::shared_ptr<engine::Runtime> runtime_;
  Router router_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace attnserve::services
