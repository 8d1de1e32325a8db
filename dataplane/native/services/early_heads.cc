#include "services/early_heads.h"

#include <algorithm>
#include <utility>

namespace attnserve::services {
namespace {

// A request is computed in so many parts at the most, unless the answer's chunks hold less each.
constexpr std::int64_t kMostParts = 4;
constexpr std::size_t kCore = 3;  // query, key and value are the first three inputs

}  // namespace

// Some heads.
class EarlyHeads::Part final : public schedule::Job {
 public:
  Part(std::shared_ptr<EarlyHeads> whole, std::int64_t first, std::int64_t last)
      : heads_(last - first),
        whole_(std::move(whole)),
        work_(engine::part_of(whole_->prepared_->work, first, last)) {
    request = whole_->request_;
    key = work_.key;
    sequences = 1;
    const requests::AttendPlan& plan = whole_->prepared_->plan;
    tensor_bytes = plan.request_bytes;
    working_bytes = plan.working_bytes / static_cast<std::size_t>(whole_->num_kv_heads_) *
                    static_cast<std::size_t>(heads_);
  }

  void run(std::span<schedule::Job* const>, engine::Stop* stop) override {
    engine::AttendWork* work = &work_;
    engine::attend_together(std::span(&work, 1), stop);
  }
  std::unique_ptr<engine::Stop> make_stop() override { return work_.variant->session->make_stop(); }
  void done(const schedule::Outcome& outcome) noexcept override {
    whole_->core_.admission.computed(outcome.ended - outcome.started);
    whole_->part_done(heads_, outcome);
  }
  void failed(Status status) noexcept override { whole_->part_failed(std::move(status)); }
  std::string what() const override {
    return engine::name_of(*whole_->prepared_->plan.model, *whole_->prepared_->plan.variant);
  }

 private:
  const std::int64_t heads_;
  const std::shared_ptr<EarlyHeads> whole_;
  engine::AttendWork work_;
};

bool EarlyHeads::possible(const requests::AttendPlan& plan) {
  for (std::size_t index = 0; index < plan.specs.size(); ++index) {
    if (plan.specs[index] && (index < kCore) != plan.specs[index]->chunked) return false;
  }
  return plan.specs[0] && plan.query_factor == 1.0 && !plan.output_region &&
         plan.results.size() == 1 && plan.results.front().output == wire::Output::kOutput;
}

std::shared_ptr<EarlyHeads> EarlyHeads::of(Core& core, std::shared_ptr<StreamState> stream,
                                           std::uint64_t request_id,
                                           std::shared_ptr<schedule::RequestContext> request,
                                           TimePoint arrived,
                                           std::unique_ptr<requests::PreparedAttend>& prepared) {
  const requests::AttendPlan& plan = prepared->plan;
  if (!engine::divisible(prepared->work, plan.request_bytes)) return nullptr;
  const std::int64_t kv_heads = plan.model->facts.num_kv_heads;
  const auto output_head_bytes =
      static_cast<std::int64_t>(plan.results.front().byte_size) / kv_heads;
  const auto chunk_bytes = static_cast<std::int64_t>(core.limits.chunk_bytes);
  if (output_head_bytes > chunk_bytes) return nullptr;
  const std::shared_ptr<EarlyHeads> early(
      new EarlyHeads(core, std::move(stream), request_id, std::move(request), arrived));
  early->num_kv_heads_ = kv_heads;
  early->most_ = std::max<std::int64_t>(1, chunk_bytes / output_head_bytes);
  early->least_ = std::min(early->most_, (kv_heads + kMostParts - 1) / kMostParts);
  for (std::size_t index = 0; index < kCore; ++index) {
    early->head_bytes_[index] = plan.specs[index]->byte_size / static_cast<std::size_t>(kv_heads);
  }
  early->answer_ = attend_answer(core, early->stream_->info(), plan, request_id);
  early->request_->priority = plan.priority;
  early->prepared_ = std::move(prepared);
  return early;
}

void EarlyHeads::take(const std::array<std::size_t, 3>& received) {
  while (true) {
    std::int64_t there = num_kv_heads_;
    for (std::size_t index = 0; index < kCore; ++index) {
      there = std::min(there, static_cast<std::int64_t>(received[index] / head_bytes_[index]));
    }
    const std::int64_t count = std::min(there - taken_, most_);
    const bool last = taken_ + count == num_kv_heads_;
    if (count <= 0 || (count < least_ && !last)) return;
    {
      const std::lock_guard lock(mutex_);
      if (failed_) return;
    }
    if (taken_ == 0) {
      answer_->place(*prepared_);  // not before: what is only announced takes nothing
      stream_->started_early(request_);
    }
    const std::int64_t first = taken_;
    taken_ += count;
    core_.scheduler.submit(std::make_shared<Part>(shared_from_this(), first, taken_), true);
  }
}

void EarlyHeads::arrived_all(Admitted admitted) {
  admitted.received();
  {
    const std::lock_guard lock(mutex_);
    complete_ = Clock::now();
    if (request_->recording) request_->recording->mark(tracing::Mark::kReceived, *complete_);
    if (failed_) return;
    stream_->started(request_);
    admitted_ = std::move(admitted);
    if (computed_ < num_kv_heads_) return;
  }
  deliver();
}

bool EarlyHeads::fail() {
  Admitted released;
  const std::lock_guard lock(mutex_);
  released = std::move(admitted_);
  return !std::exchange(failed_, true);
}

void EarlyHeads::part_done(std::int64_t heads, const schedule::Outcome& outcome) {
  {
    const std::lock_guard lock(mutex_);
    computed_ += heads;
    first_start_ = std::min(first_start_, outcome.started);
    last_end_ = std::max(last_end_, outcome.ended);
    if (failed_ || computed_ < num_kv_heads_ || !complete_) return;
  }
  deliver();
}

void EarlyHeads::part_failed(Status status) {
  if (fail()) stream_->answer(request_, attend_delivery(request_id_, {std::move(status), {}}));
}

// Called once: by whoever saw the last part computed and all chunks there.
void EarlyHeads::deliver() {
  {
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    failed_ = true;  // nothing more is to be said of it
  }
  const requests::AttendPlan& plan = prepared_->plan;
  // What was computed while chunks were still coming is time of the arrival.
  const TimePoint started = std::max(*complete_, first_start_);
  const Spans spans{arrived_, *complete_, started, std::max(started, last_end_), 1, true};
  Delivery delivery;
  try {
    prepared_->check_intact();
    delivery.messages = answer_->finish(*prepared_, spans);
    core_.statistics.ran(plan.model->facts.name, plan.variant->name(), spans, plan.dims.batch);
    note_run(*request_, plan);
    admitted_.answered();
  } catch (...) {
    delivery.status = status_of(std::current_exception());
  }
  admitted_.release();
  stream_->answer(request_, attend_delivery(request_id_, std::move(delivery)));
}

}  // namespace attnserve::services
