#include "python/options.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace attnserve::python {
namespace {

Duration seconds_of(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// Takes named values out of keyword arguments, and tells which are left.
class Reader {
 public:
  explicit Reader(const nb::kwargs& given) : given_(given) {}

  template <class T>
  T take(const char* name) {
    if (!given_.contains(name)) throw nb::type_error((std::string("missing: ") + name).c_str());
    taken_.insert(name);
    try {
      return nb::cast<T>(given_[name]);
    } catch (const nb::cast_error&) {
      throw nb::type_error((std::string(name) + ": of another type").c_str());
    }
  }

  void check_all_taken() const {
    for (const auto& [name, value] : given_) {
      const auto text = nb::cast<std::string>(name);
      if (!taken_.contains(text)) throw nb::type_error(("unknown: " + text).c_str());
    }
  }

 private:
  const nb::kwargs& given_;
  std::set<std::string> taken_;
};

}  // namespace

services::DataPlaneOptions options_of(const nb::kwargs& given) {
  Reader reader(given);
  const auto size = [&reader](const char* name) { return reader.take<std::size_t>(name); };
  const auto seconds = [&reader](const char* name) {
    return seconds_of(reader.take<double>(name));
  };

  services::DataPlaneOptions options;
  services::CoreOptions& core = options.core;
  core.limits.max_message_bytes = size("max_message_bytes");
  core.limits.max_request_bytes = size("max_request_bytes");
  core.limits.max_response_bytes = size("max_response_bytes");
  core.limits.max_bytes_in_flight = size("max_bytes_in_flight");
  core.limits.max_working_bytes = size("max_working_bytes");
  core.limits.max_seq_len = reader.take<std::int64_t>("max_seq_len");
  core.limits.max_batch = reader.take<std::int64_t>("max_batch");
  core.limits.max_stream_requests = size("max_stream_requests");
  core.limits.chunk_bytes = size("chunk_bytes");
  core.rules.slots = size("concurrency");
  core.rules.max_queue = size("max_queue");
  core.rules.max_queue_seconds = reader.take<double>("max_queue_seconds");
  core.rules.max_batch_size = reader.take<std::int64_t>("max_batch_size");
  core.rules.max_batch_bytes = size("max_batch_bytes");
  core.rules.max_working_bytes = core.limits.max_working_bytes;
  core.rules.batch_delay = reader.take<double>("batch_delay");
  core.rules.max_run_seconds = reader.take<double>("max_run_seconds");
  core.rules.stop_seconds = std::min(core.rules.stop_seconds, core.rules.max_run_seconds);
  core.max_stored_bytes = size("max_stored_bytes");
  core.stored_lease = seconds("stored_lease");
  core.max_stored_lease = seconds("max_stored_lease");
  core.kv.max_bytes = size("max_kv_bytes");
  core.kv.page_tokens = size("kv_page_tokens");
  core.kv.default_lease = seconds("kv_lease");
  core.kv.max_lease = seconds("max_kv_lease");
  core.callers.required = reader.take<bool>("identity_required");
  core.callers.web_tokens = reader.take<bool>("web_tokens");
  core.callers.certificate_roles = reader.take<identity::Roles>("certificate_roles");
  core.callers.bounds = {reader.take<double>("caller_requests_per_second"),
                         size("caller_bytes_in_flight"),
                         size("caller_stored_bytes"),
                         size("caller_sessions"),
                         size("caller_session_bytes"),
                         size("caller_calls")};
  core.tracing.enabled = reader.take<bool>("tracing");
  core.tracing.sample = reader.take<double>("trace_sample");
  core.tracing.most_per_second = reader.take<double>("max_traces_per_second");
  core.max_shared_regions = size("max_shared_regions");
  core.max_shared_bytes = size("max_shared_bytes");

  grpc::ServerOptions& server = options.server;
  server.addresses = reader.take<std::vector<std::string>>("addresses");
  server.threads = size("io_threads");
  core.io_threads = server.threads;
  server.max_connections = size("max_connections");
  server.max_connections_per_address = size("max_connections_per_address");
  server.connection.idle_timeout = seconds("idle_timeout");
  server.connection.body_pace.grace = seconds("upload_grace");
  core.upload_pace = server.connection.body_pace;
  server.connection.keepalive_interval = seconds("keepalive_interval");
  server.connection.keepalive_timeout = seconds("keepalive_timeout");
  server.connection.min_ping_interval = seconds("keepalive_min_ping_interval");
  server.connection.max_age = seconds("max_connection_age");
  server.connection.max_age_grace = seconds("max_connection_age_grace");
  const auto certificate = reader.take<std::optional<std::string>>("tls_certificate_chain");
  const auto key = reader.take<std::optional<std::string>>("tls_private_key");
  const auto authorities = reader.take<std::optional<std::string>>("tls_client_authorities");
  if (certificate) {
    server.tls = grpc::TlsOptions{*certificate, key.value_or(""), authorities.value_or("")};
  }

  options.session.cuda = reader.take<bool>("cuda");
  options.session.intra_op_threads = reader.take<int>("intra_op_threads");
  options.session.spinning = reader.take<bool>("spinning");
  options.onnxruntime_library = reader.take<std::string>("onnxruntime_library");
  options.operators_library = reader.take<std::string>("operators_library");
  reader.check_all_taken();
  return options;
}

}  // namespace attnserve::python
