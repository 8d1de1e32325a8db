#include "python/traces.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "tracing/recorder.h"

namespace nb = nanobind;

namespace attnserve::python {
namespace {

using tracing::Record;

template <class Id>
nb::bytes bytes_of(const Id& id) {
  return nb::bytes(reinterpret_cast<const char*>(id.data()), id.size());
}

// Callers' texts may hold any bytes.
nb::str text_of(const std::string& text) {
  PyObject* made =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (made == nullptr) throw nb::python_error();
  return nb::steal<nb::str>(made);
}

std::vector<std::int64_t> nanoseconds_of(const Record& record) {
  std::vector<std::int64_t> marks;
  marks.reserve(record.marks.size());
  for (const TimePoint mark : record.marks) {
    marks.push_back(
        std::chrono::duration_cast<std::chrono::nanoseconds>(mark.time_since_epoch()).count());
  }
  return marks;
}

}  // namespace

void bind_records(nb::module_& module) {
  nb::class_<Record>(module, "CallRecord", "A call, or one request of a stream; see recorder.h.")
      .def_prop_ro("trace_id", [](const Record& self) { return bytes_of(self.context.trace_id); })
      .def_prop_ro("span_id", [](const Record& self) { return bytes_of(self.context.span_id); })
      .def_prop_ro("parent_id", [](const Record& self) { return bytes_of(self.parent); })
      .def_ro("of_stream", &Record::of_stream)
      .def_prop_ro("trace_state", [](const Record& self) { return text_of(self.trace_state); })
      .def_prop_ro("path", [](const Record& self) { return text_of(self.path); })
      .def_prop_ro("peer", [](const Record& self) { return text_of(self.peer); })
      .def_prop_ro("caller", [](const Record& self) { return text_of(self.caller); })
      .def_prop_ro("request_id", [](const Record& self) { return text_of(self.request_id); })
      .def_prop_ro("model", [](const Record& self) { return text_of(self.model); })
      .def_ro("version", &Record::version)
      .def_prop_ro("variant", [](const Record& self) { return text_of(self.variant); })
      .def_ro("sequences", &Record::sequences)
      .def_ro("together", &Record::together)
      .def_ro("query_len", &Record::query_len)
      .def_ro("key_len", &Record::key_len)
      .def_prop_ro("code", [](const Record& self) { return static_cast<int>(self.code); })
      .def_prop_ro("marks", &nanoseconds_of);
}

}  // namespace attnserve::python
