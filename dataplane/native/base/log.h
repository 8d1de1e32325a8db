// What the data plane has to say to whoever runs it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace attnserve {

enum class Level : std::uint8_t { kDebug, kInfo, kWarning, kError };

std::string_view name_of(Level level);  // "debug", "info", "warning", "error"

using LogField = std::pair<std::string_view, std::string>;

// One event, as a sink sees it while it is called.
struct LogRecord {
  std::chrono::system_clock::time_point time;
  Level level;
  std::string_view event;
  std::span<const LogField> fields;
};

// One JSON object without a line break, as the control plane writes its own: time (UTC), level,
// logger, message, then the fields. All but printable ASCII is escaped, and values are cut to a few
// thousand bytes: nothing that a caller sent can begin a line, end one, or fill the disk.
std::string json_line(const LogRecord& record);

// Where events go from now on; an empty function: JSON lines on standard error, as at the start. A
// sink is called by the thread that logs, by several at once if several do. One that throws loses
// that event.
using LogSink = std::function<void(const LogRecord&)>;
void set_log_sink(LogSink sink);

// Hands one event to the sink, with the trace that this thread works for (TraceScope). Any thread;
// never fails.
void log(Level level, std::string_view event, std::initializer_list<LogField> fields = {}) noexcept;

}  // namespace attnserve
