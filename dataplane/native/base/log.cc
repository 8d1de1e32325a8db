#include "base/log.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <ctime>
#include <memory>
#include <mutex>
#include <vector>

#include "base/never_destroyed.h"
#include "base/text.h"
#include "base/trace_context.h"

namespace attnserve {

namespace {

constexpr std::size_t kMostValueCharacters = 4096;

// Guards the pointer alone: the sink runs outside it, so that one that hangs keeps no other thread
// from changing the sink, and one that logs does not lock itself out.
std::mutex sink_mutex;

std::shared_ptr<const LogSink>& current_sink() {
  static NeverDestroyed<std::shared_ptr<const LogSink>> sink;
  return *sink;
}

void append_escaped(std::string& to, std::uint32_t unit) {
  char digits[7];
  std::snprintf(digits, sizeof digits, "\\u%04x", unit & 0xFFFFU);
  to += digits;
}

void append_json(std::string& to, std::string_view value) {
  const std::string_view kept = first_characters(value, kMostValueCharacters);
  to += '"';
  for (std::size_t at = 0; at < kept.size();) {
    const Character character = character_at(kept, at);
    at += character.bytes;
    const std::uint32_t point = character.point;
    if (!character.valid) {
      to += "\\ufffd";
    } else if (point == '"' || point == '\\') {
      to += '\\';
      to += static_cast<char>(point);
    } else if (point == '\n') {
      to += "\\n";
    } else if (point >= 0x20 && point < 0x7F) {
      to += static_cast<char>(point);
    } else if (point <= 0xFFFF) {
      append_escaped(to, point);
    } else {
      append_escaped(to, 0xD800 + ((point - 0x10000) >> 10));
      append_escaped(to, 0xDC00 + ((point - 0x10000) & 0x3FF));
    }
  }
  if (kept.size() < value.size()) to += " ...";
  to += '"';
}

void append_entry(std::string& to, std::string_view name, std::string_view value) {
  to += to.empty() ? "{" : ", ";
  append_json(to, name);
  to += ": ";
  append_json(to, value);
}

std::string utc(std::chrono::system_clock::time_point time) {
  using std::chrono::milliseconds;
  const auto since_epoch = std::chrono::floor<milliseconds>(time.time_since_epoch());
  const auto whole = std::chrono::floor<std::chrono::seconds>(since_epoch);
  const std::time_t stamp = static_cast<std::time_t>(whole.count());
  std::tm parts{};
  gmtime_r(&stamp, &parts);
  char date[32];
  const std::size_t size = std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &parts);
  char fraction[16];
  std::snprintf(fraction, sizeof fraction, ".%03dZ",
                static_cast<int>((since_epoch - whole).count()));
  return std::string(date, size) + fraction;
}

// In one write, so that lines of several threads and processes do not mix.
void write_to_standard_error(const LogRecord& record) {
  const std::string line = json_line(record) + '\n';
  for (std::string_view rest = line; !rest.empty();) {
    const ssize_t written = write(STDERR_FILENO, rest.data(), rest.size());
    if (written < 0 && errno != EINTR) return;
    if (written > 0) rest.remove_prefix(static_cast<std::size_t>(written));
  }
}

}  // namespace

std::string_view name_of(Level level) {
  switch (level) {
    case Level::kDebug:
      return "debug";
    case Level::kInfo:
      return "info";
    case Level::kWarning:
      return "warning";
    case Level::kError:
      break;
  }
  return "error";
}

std::string json_line(const LogRecord& record) {
  std::string line;
  append_entry(line, "time", utc(record.time));
  append_entry(line, "level", name_of(record.level));
  append_entry(line, "logger", "attnserve_dataplane");
  append_entry(line, "message", record.event);
  for (const auto& [name, value] : record.fields) append_entry(line, name, value);
  return line + '}';
}

void set_log_sink(LogSink sink) {
  std::shared_ptr<const LogSink> replaced;
  if (sink) replaced = std::make_shared<const LogSink>(std::move(sink));
  const std::scoped_lock lock(sink_mutex);
  current_sink().swap(replaced);
}

void log(Level level, std::string_view event, std::initializer_list<LogField> fields) noexcept {
  try {
    std::shared_ptr<const LogSink> sink;
    {
      const std::scoped_lock lock(sink_mutex);
      sink = current_sink();
    }
    std::vector<LogField> all(fields);
    if (const TraceContext* trace = TraceScope::current()) {
      all.emplace_back("trace_id", hex_of(trace->trace_id));
      all.emplace_back("span_id", hex_of(trace->span_id));
    }
    const LogRecord record{std::chrono::system_clock::now(), level, event, all};
    if (sink) {
      (*sink)(record);
    } else {
      write_to_standard_error(record);
    }
  } catch (...) {
    // An event that cannot be written is lost; what it tells of goes on.
  }
}

}  // namespace attnserve
