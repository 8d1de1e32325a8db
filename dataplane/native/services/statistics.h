// What the data plane counts. The control plane turns snapshots of it into Prometheus's metrics and
// the Open Inference Protocol's ModelStatistics.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace attnserve::services {

// Upper bounds of the buckets; what is beyond the last one is counted too.
constexpr std::array<double, 15> kSecondsBuckets = {
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0};
constexpr std::array<double, 9> kBatchBuckets = {1, 2, 4, 8, 16, 32, 64, 128, 256};

template <std::size_t N>
struct Histogram {
  std::array<std::uint64_t, N + 1> counts{};  // by bucket, not cumulative
  double sum = 0.0;

  void observe(const std::array<double, N>& bounds, double value) {
    std::size_t bucket = 0;
    while (bucket < N && value > bounds[bucket]) ++bucket;
    ++counts[bucket];
    sum += value;
  }
};

// When what happened to one request that was answered. The spans add up to its time in the server.
struct Spans {
  TimePoint arrived{};    // its message was there, or began to come in chunks
  TimePoint validated{};  // and was checked
  TimePoint started{};    // to run
  TimePoint ended{};
  std::int64_t sequences = 1;  // that ran together
  bool leads = true;           // whether it counts for the execution
};

struct VariantCounts {
  Histogram<kSecondsBuckets.size()> deserialize, queue, compute;
  Histogram<kBatchBuckets.size()> batches;
  std::uint64_t sequences = 0;
};

// A number of times, and nanoseconds in sum.
struct Sum {
  std::uint64_t count = 0, nanoseconds = 0;
  void add(Duration duration) {
    ++count;
    const auto more = std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
    nanoseconds += static_cast<std::uint64_t>(more > 0 ? more : 0);
  }
};

// Of the requests of the Open Inference Protocol, for one version of a model.
struct InferCounts {
  std::int64_t last_milliseconds = 0;  // since the epoch
  std::uint64_t inferences = 0;        // sequences
  Sum success, fail, queue, input, infer, output;
  struct Batches {
    Sum input, infer, output;
  };
  std::map<std::int64_t, Batches> batches;  // by sequences that ran together, one entry a run
};

// Any thread.
class Statistics {
 public:
  void count(std::string_view method, Code code);
  void ran(const std::string& model, const std::string& variant, const Spans& spans,
           std::int64_t sequences);
  void inferred(const std::string& model, std::int64_t version, const Spans& spans,
                std::int64_t sequences, TimePoint answered);
  void decoded(std::int64_t tokens);  // added to KV sessions
  void infer_failed(const std::string& model, std::int64_t version, Duration after);

  std::map<std::pair<std::string, Code>, std::uint64_t> requests() const;
  std::map<std::pair<std::string, std::string>, VariantCounts> variants() const;
  std::uint64_t decoded_tokens() const { return decoded_.load(std::memory_order_relaxed); }
  InferCounts of(const std::string& model, std::int64_t version) const;

 private:
  std::atomic<std::uint64_t> decoded_{0};
  mutable std::mutex mutex_;  // guards what follows; held for some additions
  std::map<std::pair<std::string, Code>, std::uint64_t, std::less<>> requests_;
  std::map<std::pair<std::string, std::string>, VariantCounts> variants_;
  std::map<std::pair<std::string, std::int64_t>, InferCounts> infers_;
};

}  // namespace attnserve::services
