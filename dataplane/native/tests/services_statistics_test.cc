#include <doctest/doctest.h>

#include <numeric>

#include "services/statistics.h"

namespace attnserve::services {
namespace {

using std::chrono::milliseconds;

constexpr TimePoint kStart{std::chrono::hours(1)};

Spans spans(std::int64_t sequences, bool leads) {
  return {kStart,
          kStart + milliseconds(2),
          kStart + milliseconds(5),
          kStart + milliseconds(25),
          sequences,
          leads};
}

template <std::size_t N>
std::uint64_t total(const Histogram<N>& histogram) {
  return std::accumulate(histogram.counts.begin(), histogram.counts.end(), std::uint64_t{0});
}

}  // namespace

TEST_CASE("a value falls into the first bucket whose bound it does not exceed") {
  const std::array<double, 2> bounds{1.0, 2.0};
  Histogram<2> histogram;
  for (const double value : {0.5, 1.0, 1.5, 2.0, 2.5, 1e9}) histogram.observe(bounds, value);
  CHECK(histogram.counts == std::array<std::uint64_t, 3>{2, 2, 2});
  CHECK(histogram.sum == 1e9 + 7.5);
}

TEST_CASE("requests are counted by method and status") {
  Statistics statistics;
  statistics.count("Attend", Code::kOk);
  statistics.count("Attend", Code::kOk);
  statistics.count("Attend", Code::kCancelled);
  const auto requests = statistics.requests();
  CHECK(requests.size() == 2);
  CHECK(requests.at({"Attend", Code::kOk}) == 2);
  CHECK(requests.at({"Attend", Code::kCancelled}) == 1);
}

TEST_CASE("a batch counts once, each of its requests by its own spans") {
  Statistics statistics;
  statistics.ran("causal", "native", spans(3, true), 1);
  statistics.ran("causal", "native", spans(3, false), 2);
  const VariantCounts counts = statistics.variants().at({"causal", "native"});
  CHECK(counts.sequences == 3);
  CHECK(total(counts.batches) == 1);
  CHECK(counts.batches.sum == 3);
  CHECK(total(counts.compute) == 2);
  CHECK(counts.deserialize.sum == doctest::Approx(0.004));
  CHECK(counts.queue.sum == doctest::Approx(0.006));
  CHECK(counts.compute.sum == doctest::Approx(0.040));
}

TEST_CASE("what was inferred adds up to the whole time of its requests") {
  Statistics statistics;
  statistics.inferred("causal", 2, spans(3, true), 1, kStart + milliseconds(30));
  statistics.inferred("causal", 2, spans(3, false), 2, kStart + milliseconds(31));
  statistics.infer_failed("causal", 2, milliseconds(4));
  const InferCounts counts = statistics.of("causal", 2);
  CHECK(counts.inferences == 3);
  CHECK(counts.last_milliseconds > 0);
  CHECK(counts.success.count == 2);
  CHECK(counts.success.nanoseconds == 61'000'000);
  CHECK(counts.queue.nanoseconds + counts.input.nanoseconds + counts.infer.nanoseconds +
            counts.output.nanoseconds ==
        counts.success.nanoseconds);
  CHECK(counts.fail.count == 1);
  CHECK(counts.fail.nanoseconds == 4'000'000);
  REQUIRE(counts.batches.size() == 1);
  CHECK(counts.batches.at(3).infer.count == 1);
}

TEST_CASE("nothing is known of what never ran, and durations below zero count as none") {
  Statistics statistics;
  CHECK(statistics.of("causal", 1).success.count == 0);
  statistics.infer_failed("causal", 1, milliseconds(-4));
  CHECK(statistics.of("causal", 1).fail.count == 1);
  CHECK(statistics.of("causal", 1).fail.nanoseconds == 0);
}

}  // namespace attnserve::services
