// Where a call belongs in a trace, as callers say it: https://www.w3.org/TR/trace-context/
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace attnserve {

struct TraceContext {
  std::array<std::uint8_t, 16> trace_id{};
  std::array<std::uint8_t, 8> span_id{};
  bool sampled = false;  // whoever began the trace records it

  bool present() const { return trace_id != std::array<std::uint8_t, 16>{}; }
};

// The value of a `traceparent`. Nothing where the specification says that it is not to be used: not
// of its length, upper case, version ff, a trace or span of zeros. Of versions to come the part
// that this one knows is taken. Takes no memory.
std::optional<TraceContext> parse_traceparent(std::string_view value);

// Whether the values of all `tracestate` fields, joined by commas, are a list as the specification
// has it: at most 32 members, each key once.
bool is_tracestate(std::string_view value);

// What `tracestate` may be kept: as many characters as everybody must pass on.
constexpr std::size_t kMostTraceState = 512;

std::string hex_of(const std::array<std::uint8_t, 16>& id);
std::string hex_of(const std::array<std::uint8_t, 8>& id);

// While it lives, what this thread logs carries the context's `trace_id` and `span_id`. The context
// must outlive it; while one that is not present is the innermost, nothing is added.
class TraceScope {
 public:
  explicit TraceScope(const TraceContext& context);
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

  // Of the innermost scope of this thread; nullptr: there is none, or it is not present.
  static const TraceContext* current();

 private:
  const TraceContext* outer_;
};

}  // namespace attnserve
