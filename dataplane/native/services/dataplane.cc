#include "services/dataplane.h"

#include <algorithm>
#include <future>
#include <stdexcept>
#include <utility>

namespace attnserve::services {
namespace {

// A token model's run, whose caller waits for it.
class TokensJob final : public schedule::Job {
 public:
  TokensJob(engine::TokensWork work_, std::shared_ptr<schedule::RequestContext> request_,
            std::size_t working_bytes_)
      : work(std::move(work_)) {
    request = std::move(request_);
    key = engine::batch_key(work);
    joinable = true;
    sequences = static_cast<std::int64_t>(work.count());
    tensor_bytes = engine::hidden_bytes(work);
    working_bytes = working_bytes_;
  }

  void run(std::span<schedule::Job* const> batch, engine::Stop* stop) override {
    std::vector<engine::TokensWork*> works;
    works.reserve(batch.size());
    for (schedule::Job* job : batch) works.push_back(&static_cast<TokensJob*>(job)->work);
    engine::attend_tokens_together(works, stop);
  }
  std::unique_ptr<engine::Stop> make_stop() override { return work.variant->session->make_stop(); }
  void done(const schedule::Outcome& outcome) noexcept override { outcome_.set_value(outcome); }
  void failed(Status status) noexcept override {
    outcome_.set_exception(std::make_exception_ptr(RequestError(std::move(status))));
  }
  void abandoned(Status status) noexcept override {
    outcome_.set_exception(std::make_exception_ptr(AbandonedError(std::move(status))));
  }
  std::string what() const override { return engine::name_of(*work.model, *work.variant); }
  schedule::Outcome wait() { return outcome_.get_future().get(); }

  engine::TokensWork work;

 private:
  std::promise<schedule::Outcome> outcome_;
};

}  // namespace

DataPlane::DataPlane(DataPlaneOptions options)
    : core(options.core),
      options_(std::move(options)),
      runtime_(engine::Runtime::load(options_.onnxruntime_library, options_.operators_library)),
      router_(core) {}

DataPlane::~DataPlane() {
  core.control.close();
  core.loading.close();
  core.tokens.close();
  core.web_tokens.close();
  server_.reset();
}

void DataPlane::start() {
  server_ = grpc::Server::create(router_, core.budget, options_.server);
  server_->start();
  core.serving = true;
}

std::vector<std::string> DataPlane::addresses() const {
  return server_ ? server_->addresses() : std::vector<std::string>{};
}

void DataPlane::replace_tls(const grpc::TlsOptions& options) {
  if (!server_) throw std::runtime_error("TLS: the server has not started");
  server_->replace_tls(options);
}

void DataPlane::begin_moving() {
  core.serving = false;
  core.moving = true;
  core.kv.take_no_more();
  core.streams.drain_without_sessions();
}

bool DataPlane::drain(Duration timeout) {
  core.serving = false;
  core.scheduler.drain();
  core.streams.drain();
  const bool answered = server_ ? server_->drain(timeout) : true;
  core.control.close();
  core.loading.close();
  core.tokens.close();
  core.web_tokens.close();
  return answered;
}

engine::ModelPtr DataPlane::load(engine::ModelFacts facts,
                                 std::vector<engine::VariantFacts> variants,
                                 std::vector<engine::Pick> picks) {
  return engine::load_model(runtime_, std::move(facts), std::move(variants), std::move(picks),
                            options_.session);
}

TokensOutcome DataPlane::attend_tokens(engine::TokensWork work,
                                       std::shared_ptr<schedule::RequestContext> request,
                                       TimePoint arrived, std::size_t working_bytes) {
  const std::string model = work.model->facts.name;
  const std::string variant = work.variant->name();
  const std::int64_t version = work.model->facts.version;
  const TimePoint validated = Clock::now();
  const auto job = std::make_shared<TokensJob>(std::move(work), std::move(request), working_bytes);
  core.scheduler.submit(job, false);
  const schedule::Outcome outcome = job->wait();
  if (outcome.leads) core.admission.computed(outcome.ended - outcome.started);
  TokensOutcome result{
      std::move(job->work.results),
      job->work.padded_source,
      job->work.padded_target,
      {arrived, validated, outcome.started, outcome.ended, outcome.sequences, outcome.leads}};
  core.statistics.ran(model, variant, result.spans, job->sequences);
  if (const auto& recording = job->request->recording) {
    const std::int64_t source = job->work.longest_source();
    const std::int64_t target = job->work.target.longest();
    recording->ran({model, version, variant, job->sequences, target > 0 ? target : source, source});
  }
  return result;
}

}  // namespace attnserve::services
