#include "services/statistics.h"

#include <algorithm>

namespace attnserve::services {

void Statistics::count(std::string_view method, Code code) {
  const std::lock_guard lock(mutex_);
  ++requests_[{std::string(method), code}];
}

void Statistics::ran(const std::string& model, const std::string& variant, const Spans& spans,
                     std::int64_t sequences) {
  const std::lock_guard lock(mutex_);
  VariantCounts& counts = variants_[{model, variant}];
  counts.deserialize.observe(kSecondsBuckets, seconds(spans.validated - spans.arrived));
  counts.queue.observe(kSecondsBuckets, seconds(spans.started - spans.validated));
  counts.compute.observe(kSecondsBuckets, seconds(spans.ended - spans.started));
  counts.sequences += static_cast<std::uint64_t>(sequences);
  if (spans.leads) counts.batches.observe(kBatchBuckets, static_cast<double>(spans.sequences));
}

void Statistics::inferred(const std::string& model, std::int64_t version, const Spans& spans,
                          std::int64_t sequences, TimePoint answered) {
  const Duration input = spans.validated - spans.arrived;
  const Duration infer = spans.ended - spans.started;
  const Duration output = answered - spans.ended;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::lock_guard lock(mutex_);
  InferCounts& counts = infers_[{model, version}];
  counts.last_milliseconds = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  counts.inferences += static_cast<std::uint64_t>(sequences);
  counts.success.add(answered - spans.arrived);
  counts.queue.add(spans.started - spans.validated);
  counts.input.add(input);
  counts.infer.add(infer);
  counts.output.add(output);
  if (!spans.leads) return;
  InferCounts::Batches& batches = counts.batches[spans.sequences];
  batches.input.add(input);
  batches.infer.add(infer);
  batches.output.add(output);
}

void Statistics::decoded(std::int64_t tokens) {
  decoded_.fetch_add(static_cast<std::uint64_t>(tokens), std::memory_order_relaxed);
}

void Statistics::infer_failed(const std::string& model, std::int64_t version, Duration after) {
  const std::lock_guard lock(mutex_);
  infers_[{model, version}].fail.add(after);
}

std::map<std::pair<std::string, Code>, std::uint64_t> Statistics::requests() const {
  const std::lock_guard lock(mutex_);
  return {requests_.begin(), requests_.end()};
}

std::map<std::pair<std::string, std::string>, VariantCounts> Statistics::variants() const {
  const std::lock_guard lock(mutex_);
  return variants_;
}

InferCounts Statistics::of(const std::string& model, std::int64_t version) const {
  const std::lock_guard lock(mutex_);
  const auto found = infers_.find({model, version});
  return found == infers_.end() ? InferCounts{} : found->second;
}

}  // namespace attnserve::services
