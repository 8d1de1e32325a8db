// What a load program counts, and the line of JSON that it prints of it.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

using Clock = std::chrono::steady_clock;

inline double milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

inline Clock::duration of_seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(seconds));
}

struct Figures {
  std::map<int, long> statuses; // by gRPC's number
  // The first message of each that is no answer.
  std::map<int, std::string> messages;
  std::vector<double> answers, refusals, starts; // milliseconds
  long good = 0;
  double first = -1; // milliseconds from the start until the first answer
  double seconds = 0;

  void add(const Figures &other) {
    for (const auto &[code, count] : other.statuses)
      statuses[code] += count;
    messages.insert(other.messages.begin(), other.messages.end());
    answers.insert(answers.end(), other.answers.begin(), other.answers.end());
    refusals.insert(refusals.end(), other.refusals.begin(),
                    other.refusals.end());
    good += other.good;
    if (first < 0 || (other.first >= 0 && other.first < first))
      first = other.first;
  }
};

inline double quantile(std::vector<double> &values, double share) {
  if (values.empty())
    return -1;
  const auto index =
      static_cast<std::size_t>(share * static_cast<double>(values.size()));
  const auto at =
      values.begin() + static_cast<long>(std::min(values.size() - 1, index));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

// JSON on standard output; messages on standard error.
inline void print(Figures &figures) {
  long calls = 0;
  std::string statuses;
  for (const auto &[code, count] : figures.statuses) {
    calls += count;
    statuses += (statuses.empty() ? "\"" : ", \"") + std::to_string(code) +
                "\": " + std::to_string(count);
  }
  for (const auto &[code, message] : figures.messages) {
    std::fprintf(stderr, "status %d: %s\n", code, message.c_str());
  }
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const double cpu =
      static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
      static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
  std::printf("{\"seconds\": %.3f, \"offered\": %.1f, \"goodput\": %.1f, "
              "\"statuses\": {%s}, ",
              figures.seconds, static_cast<double>(calls) / figures.seconds,
              static_cast<double>(figures.good) / figures.seconds,
              statuses.c_str());
  std::printf(
      "\"first_ms\": %.3f, \"cpu_seconds\": %.3f, \"late_p99_ms\": %.3f",
      figures.first, cpu, quantile(figures.starts, 0.99));
  for (const auto &[name, values] :
       {std::pair{"answers", &figures.answers},
        std::pair{"refusals", &figures.refusals}}) {
    std::printf(
        ", \"%s\": {\"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f}",
        name, quantile(*values, 0.5), quantile(*values, 0.9),
        quantile(*values, 0.99));
  }
  std::printf("}\n");
}
