// The binding: all that Python knows of the data plane. Calls that wait do so without the
// interpreter; no thread of the data plane ever takes it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/log.h"
#include "python/log_queue.h"
#include "python/models.h"
#include "python/moving.h"
#include "python/options.h"
#include "python/traces.h"
#include "services/dataplane.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace attnserve::python {
namespace {

using services::DataPlane;
using services::HandledRequest;

Duration seconds_of(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

Bytes bytes_of(const nb::bytes& given) {
  Bytes bytes = Bytes::allocate(given.size());
  if (given.size() > 0) std::memcpy(bytes.data(), given.c_str(), given.size());
  return bytes;
}

LogQueue& log_queue() {
  static auto* queue = new LogQueue();  // outlives every thread that may still log at exit
  return *queue;
}

nb::dlpack::dtype dlpack_of(DataType dtype) {
  const auto code = [](nb::dlpack::dtype_code value) { return static_cast<std::uint8_t>(value); };
  switch (dtype) {
    case DataType::kFp32:
      return {code(nb::dlpack::dtype_code::Float), 32, 1};
    case DataType::kFp16:
      return {code(nb::dlpack::dtype_code::Float), 16, 1};
    case DataType::kBf16:  // NumPy has no such type: its bits
      return {code(nb::dlpack::dtype_code::UInt), 16, 1};
    case DataType::kInt64:
      return {code(nb::dlpack::dtype_code::Int), 64, 1};
    case DataType::kInt32:
      return {code(nb::dlpack::dtype_code::Int), 32, 1};
    default:
      return {code(nb::dlpack::dtype_code::UInt), 8, 1};
  }
}

nb::object array_of(engine::OwnedTensor& made) {
  auto* owner = new std::shared_ptr<void>(made.owner);
  nb::capsule capsule(owner, [](void* held) noexcept {
    delete static_cast<std::shared_ptr<void>*>(held);  // the capsule is its one owner
  });
  std::vector<std::size_t> shape;
  for (const std::int64_t size : made.tensor.shape.sizes()) {
    shape.push_back(static_cast<std::size_t>(size));
  }
  return nb::cast(nb::ndarray<nb::numpy>(made.tensor.data, shape.size(), shape.data(), capsule,
                                         nullptr, dlpack_of(made.tensor.dtype)));
}

engine::TokenSequences sequences_of(const std::vector<std::vector<std::int64_t>>& given) {
  engine::TokenSequences sequences;
  for (const auto& ids : given) {
    sequences.ids.insert(sequences.ids.end(), ids.begin(), ids.end());
    sequences.starts.push_back(sequences.ids.size());
  }
  return sequences;
}

// NumPy has no bfloat16: such elements come as their bits, and `dtype` says what they are.
engine::TensorInput input_of(const nb::dict& given) {
  engine::TensorInput input;
  if (given.size() == 0) return input;
  const auto array = nb::cast<nb::ndarray<nb::c_contig, nb::device::cpu, nb::ro>>(given["array"]);
  std::vector<std::int64_t> shape;
  for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
    shape.push_back(static_cast<std::int64_t>(array.shape(axis)));
  }
  input.name = nb::cast<std::string>(given["name"]);
  // Feeds are read, never written.
  input.tensor = {data_type_of(nb::cast<std::string>(given["dtype"])), Shape(shape),
                  const_cast<std::byte*>(static_cast<const std::byte*>(array.data()))};
  input.lengths = nb::cast<std::vector<std::int64_t>>(given["lengths"]);
  input.mask_name = nb::cast<std::string>(given["mask_name"]);
  input.tokens = nb::cast<std::int64_t>(given["tokens"]);
  return input;
}

double since_epoch(TimePoint time) { return seconds(time.time_since_epoch()); }

TimePoint time_of(double since) { return TimePoint(seconds_of(since)); }

nb::dict attend_tokens(DataPlane& self, const std::shared_ptr<HandledRequest>& request,
                       std::shared_ptr<engine::Model> model, const std::string& variant,
                       const std::vector<std::vector<std::int64_t>>& source,
                       const std::vector<std::vector<std::int64_t>>& source_types,
                       const nb::dict& given, const std::vector<std::vector<std::int64_t>>& target,
                       std::vector<std::string> outputs, std::uint32_t priority,
                       std::uint64_t timeout, std::size_t working_bytes) {
  engine::TokensWork work;
  work.variant = model->named(variant);
  if (!work.variant) throw nb::key_error(variant.c_str());
  work.model = std::move(model);
  work.source = sequences_of(source);
  work.given = input_of(given);  // whose elements the caller holds until this returns
  if (!source_types.empty()) work.source_types = sequences_of(source_types).ids;
  work.target = sequences_of(target);
  work.outputs = outputs;
  request->request->priority = priority;
  request->request->shorten(timeout, request->request->arrived);
  services::TokensOutcome outcome;
  try {
    const nb::gil_scoped_release released;
    outcome = self.attend_tokens(std::move(work), request->request, request->request->arrived,
                                 working_bytes);
  } catch (const services::AbandonedError&) {
    // The run reads the elements still, and nobody is told when it ends.
    if (given.size() > 0) nb::object(given["array"]).release();
    throw;
  }
  nb::dict arrays;
  for (std::size_t index = 0; index < outputs.size(); ++index) {
    arrays[outputs[index].c_str()] = array_of(outcome.results[index]);
  }
  nb::dict result;
  result["arrays"] = arrays;
  result["arrived"] = since_epoch(outcome.spans.arrived);
  result["validated"] = since_epoch(outcome.spans.validated);
  result["started"] = since_epoch(outcome.spans.started);
  result["ended"] = since_epoch(outcome.spans.ended);
  result["sequences"] = outcome.spans.sequences;
  result["leads"] = outcome.spans.leads;
  return result;
}

using Bound = std::tuple<std::uint64_t, std::uint64_t>;
Bound sum_of(const services::Sum& sum) { return {sum.count, sum.nanoseconds}; }

template <std::size_t N>
std::tuple<std::vector<std::uint64_t>, double> histogram_of(const services::Histogram<N>& from) {
  return {std::vector<std::uint64_t>(from.counts.begin(), from.counts.end()), from.sum};
}

nb::dict infer_counts(DataPlane& self, const std::string& model, std::int64_t version) {
  const services::InferCounts counts = self.core.statistics.of(model, version);
  nb::dict result;
  result["last_inference"] = counts.last_milliseconds;
  result["inferences"] = counts.inferences;
  result["success"] = sum_of(counts.success);
  result["fail"] = sum_of(counts.fail);
  result["queue"] = sum_of(counts.queue);
  result["input"] = sum_of(counts.input);
  result["infer"] = sum_of(counts.infer);
  result["output"] = sum_of(counts.output);
  nb::dict batches;
  for (const auto& [size, batch] : counts.batches) {
    batches[nb::int_(size)] =
        nb::make_tuple(sum_of(batch.input), sum_of(batch.infer), sum_of(batch.output));
  }
  result["batches"] = batches;
  return result;
}

void bind_requests(nb::module_& module) {
  nb::class_<HandledRequest>(module, "Request",
                             "One message for the control plane, to be answered exactly once.")
      .def_prop_ro("path", [](const HandledRequest& self) { return self.path; })
      .def_prop_ro("peer", [](const HandledRequest& self) { return self.peer; })
      .def_prop_ro("message",
                   [](const HandledRequest& self) {
                     return nb::bytes(reinterpret_cast<const char*>(self.message.data()),
                                      self.message.size());
                   })
      .def_prop_ro("arrived",
                   [](const HandledRequest& self) { return since_epoch(self.request->arrived); })
      .def_prop_ro("trace",
                   [](const HandledRequest& self) {
                     std::optional<std::pair<std::string, std::string>> ids;
                     const TraceContext& trace = self.request->trace;
                     if (trace.present()) ids = {hex_of(trace.trace_id), hex_of(trace.span_id)};
                     return ids;
                   })
      .def("answer",
           [](HandledRequest& self, const nb::bytes& message) {
             Bytes bytes = bytes_of(message);
             const nb::gil_scoped_release released;
             self.answer({}, std::move(bytes));
           })
      .def(
          "fail",
          [](HandledRequest& self, int code, const std::string& message, double retry_after) {
            const nb::gil_scoped_release released;
            const Status status{
                static_cast<Code>(code), message,
                std::chrono::microseconds(static_cast<std::int64_t>(retry_after * 1e6))};
            self.answer(status, {});
          },
          "code"_a, "message"_a, "retry_after"_a = 0.0);
}

void bind_identity(nb::module_& module) {
  nb::class_<identity::Known>(module, "Known", "One credential of the file of callers.")
      .def(
          "__init__",
          [](identity::Known* self, std::string name, identity::Roles roles, std::string kind,
             const nb::bytes& value, double requests_per_second, std::size_t bytes_in_flight,
             std::size_t stored_bytes, std::size_t sessions, std::size_t session_bytes,
             std::size_t calls) {
            new (self) identity::Known{
                std::move(name), roles, std::move(kind), std::string(value.c_str(), value.size()),
                identity::Bounds{requests_per_second, bytes_in_flight, stored_bytes, sessions,
                                 session_bytes, calls}};
          },
          "name"_a, "roles"_a, "kind"_a, "value"_a, "requests_per_second"_a, "bytes_in_flight"_a,
          "stored_bytes"_a, "sessions"_a, "session_bytes"_a, "calls"_a)
      .def_prop_ro("kind", [](const identity::Known& self) { return self.kind; })
      .def_prop_ro("value", [](const identity::Known& self) {
        return nb::bytes(self.value.data(), self.value.size());
      });
  module.attr("INFER") = identity::kInfer;
  module.attr("SESSIONS") = identity::kSessions;
  module.attr("ADMIN") = identity::kAdmin;
  module.attr("MOVE") = identity::kMove;
}

void bind_plane(nb::module_& module) {
  nb::class_<DataPlane>(module, "DataPlane", "See services/dataplane.h.")
      .def("__init__", [](DataPlane* self,
                          const nb::kwargs& given) { new (self) DataPlane(options_of(given)); })
      .def(
          "start", [](DataPlane& self) { self.start(); }, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("addresses", [](DataPlane& self) { return self.addresses(); })
      .def("begin_moving", &DataPlane::begin_moving, nb::call_guard<nb::gil_scoped_release>())
      .def("session_ids", [](DataPlane& self) { return self.core.kv.ids(); })
      .def(
          "depart",
          [](DataPlane& self, const std::string& session_id) {
            return services::Departure::begin(self.core, session_id);
          },
          "session_id"_a, nb::keep_alive<0, 1>())
      .def(
          "stay",
          [](DataPlane& self, const std::string& session_id) {
            services::Departure::give_up(self.core, session_id);
          },
          "session_id"_a)
      .def(
          "drain", [](DataPlane& self, double timeout) { return self.drain(seconds_of(timeout)); },
          "timeout"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "replace_tls",
          [](DataPlane& self, const std::string& certificate_chain, const std::string& private_key,
             const std::string& client_authorities) {
            self.replace_tls({certificate_chain, private_key, client_authorities});
          },
          "certificate_chain"_a, "private_key"_a, "client_authorities"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "set_callers",
          [](DataPlane& self, const std::vector<identity::Known>& known,
             const std::vector<std::string>& web_keys) {
            self.core.callers.replace(known, web_keys);
          },
          "known"_a, "web_keys"_a = std::vector<std::string>())
      .def(
          "admit_web_token",
          [](DataPlane& self, const nb::bytes& token, const std::string& name,
             identity::Roles roles, double until, const std::string& key) {
            self.core.callers.admit({token.c_str(), token.size()}, name, roles, until, key);
          },
          "token"_a, "name"_a, "roles"_a, "until"_a, "key"_a)
      .def(
          "look_up",
          [](DataPlane& self, const std::string& authorization) {
            std::optional<std::tuple<std::string, identity::Roles>> who;
            if (const auto found = self.core.callers.look_up(authorization)) {
              who = {found->caller->name, found->roles};
            }
            return who;
          },
          "authorization"_a)
      .def_prop_ro(
          "draining",
          [](DataPlane& self) { return self.core.moving || self.core.scheduler.draining(); })
      .def_prop_ro("wedged_runs", [](DataPlane& self) { return self.core.scheduler.wedged(); })
      .def(
          "stop_running",
          [](DataPlane& self, double timeout) { return self.stop_running(seconds_of(timeout)); },
          "timeout"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "load",
          [](DataPlane& self, const engine::ModelFacts& facts,
             std::vector<engine::VariantFacts> variants, std::vector<engine::Pick> picks) {
            return std::const_pointer_cast<engine::Model>(
                self.load(facts, std::move(variants), std::move(picks)));
          },
          "facts"_a, "variants"_a, "picks"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "put_models",
          [](DataPlane& self, const std::string& name,
             const std::vector<std::shared_ptr<engine::Model>>& models, std::string reason) {
            self.core.models.put(name, {models.begin(), models.end()}, std::move(reason));
          },
          "name"_a, "models"_a, "reason"_a)
      .def(
          "get_model",
          [](DataPlane& self, const std::string& name, const std::string& version) {
            return std::const_pointer_cast<engine::Model>(self.core.models.get(name, version));
          },
          "name"_a, "version"_a)
      .def(
          "next_request",
          [](DataPlane& self, const std::string& queue, double timeout) {
            services::HandlerQueue& from = queue == "tokens"       ? self.core.tokens
                                           : queue == "loading"    ? self.core.loading
                                           : queue == "web_tokens" ? self.core.web_tokens
                                                                   : self.core.control;
            return from.pop(seconds_of(timeout));
          },
          // What a request holds is the plane's.
          "queue"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>(), nb::keep_alive<0, 1>())
      .def("attend_tokens", &attend_tokens, "request"_a, "model"_a, "variant"_a, "source"_a,
           "source_types"_a, "given"_a, "target"_a, "outputs"_a, "priority"_a, "timeout"_a,
           "working_bytes"_a)
      .def("requests",
           [](DataPlane& self) {
             std::vector<std::tuple<std::string, std::string, std::uint64_t>> rows;
             for (const auto& [key, count] : self.core.statistics.requests()) {
               rows.emplace_back(key.first, std::string(name_of(key.second)), count);
             }
             return rows;
           })
      .def("variants",
           [](DataPlane& self) {
             nb::list rows;
             for (const auto& [key, counts] : self.core.statistics.variants()) {
               rows.append(nb::make_tuple(key.first, key.second, histogram_of(counts.deserialize),
                                          histogram_of(counts.queue), histogram_of(counts.compute),
                                          histogram_of(counts.batches), counts.sequences));
             }
             return rows;
           })
      .def(
          "take_records",
          [](DataPlane& self, std::size_t most, double timeout) {
            return self.core.recorder.take(most, seconds_of(timeout));
          },
          "most"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("records",
           [](DataPlane& self) {
             const tracing::RecorderCounts counts = self.core.recorder.counts();
             return std::make_tuple(counts.recorded, counts.refused, counts.dropped);
           })
      .def("infer_counts", &infer_counts, "model"_a, "version"_a)
      .def("count_inference",
           [](DataPlane& self, const std::string& model, std::int64_t version,
              std::int64_t sequences, double arrived, double validated, double started,
              double ended, std::int64_t together, bool leads) {
             const services::Spans spans{time_of(arrived), time_of(validated), time_of(started),
                                         time_of(ended),   together,           leads};
             self.core.statistics.inferred(model, version, spans, sequences, Clock::now());
           })
      .def("count_failed_inference",
           [](DataPlane& self, const std::string& model, std::int64_t version, double arrived) {
             self.core.statistics.infer_failed(model, version, Clock::now() - time_of(arrived));
           })
      .def("gauges",
           [](DataPlane& self) {
             services::Core& core = self.core;
             return std::map<std::string, double>{
                 {"waiting", static_cast<double>(core.scheduler.waiting())},
                 {"running", static_cast<double>(core.scheduler.running())},
                 {"inside", static_cast<double>(core.admission.inside())},
                 {"arriving", static_cast<double>(core.admission.arriving())},
                 {"bytes_in_flight", static_cast<double>(core.budget.lent())},
                 {"stored_bytes", static_cast<double>(core.stored.bytes())},
                 {"shared_bytes", static_cast<double>(core.regions.mapped_bytes())},
                 {"connections", static_cast<double>(self.connections())},
                 {"wedged", static_cast<double>(core.scheduler.wedged())},
             };
           })
      .def(
          "kv_sessions",
          [](DataPlane& self) {
            services::Core& core = self.core;
            const sessions::KvStatistics now = core.kv.statistics();
            const auto number = [](std::uint64_t value) { return static_cast<double>(value); };
            return std::map<std::string, double>{
                {"sessions", number(now.sessions)},
                {"pages_in_use", number(now.pages_in_use)},
                {"pages_cached", number(now.pages_cached)},
                {"bytes_in_use", number(now.bytes_in_use)},
                {"bytes_cached", number(now.bytes_cached)},
                {"bytes_promised", number(now.bytes_promised)},
                {"bytes_memory", number(now.bytes_memory)},
                {"max_bytes", number(now.max_bytes)},
                {"opened", number(now.opened)},
                {"expired", number(now.expired)},
                {"prefix_pages_asked", number(now.prefix_pages_asked)},
                {"prefix_pages_found", number(now.prefix_pages_found)},
                {"evicted_pages", number(now.evicted_pages)},
                {"tokens", number(core.statistics.decoded_tokens())},
            };
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "add_region",
          [](DataPlane& self, const std::string& name, const std::string& key, std::uint64_t offset,
             std::uint64_t byte_size, const std::string& peer) {
            self.core.regions.add(name, key, offset, byte_size, sessions::owner_of(peer));
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("region_view",
           [](DataPlane& self, const std::string& name, std::uint64_t offset,
              std::uint64_t byte_size, const std::string& peer) {
             auto* view = new sessions::RegionView(
                 self.core.regions.view(name, offset, byte_size, sessions::owner_of(peer)));
             nb::capsule owner(view, [](void* held) noexcept {
               delete static_cast<sessions::RegionView*>(held);  // the capsule is its one owner
             });
             return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(view->bytes.data(),
                                                                      {view->bytes.size()}, owner);
           })
      .def("remove_region",
           [](DataPlane& self, const std::string& name, const std::string& peer) {
             self.core.regions.remove(name, sessions::owner_of(peer));
           })
      .def("remove_regions",
           [](DataPlane& self, const std::string& peer) {
             self.core.regions.remove_all(sessions::owner_of(peer));
           })
      .def("regions", [](DataPlane& self, const std::string& name, const std::string& peer) {
        std::vector<std::tuple<std::string, std::string, std::uint64_t, std::uint64_t>> rows;
        for (const sessions::RegionStatus& region :
             self.core.regions.status(name, sessions::owner_of(peer))) {
          rows.emplace_back(region.name, region.key, region.offset, region.byte_size);
        }
        return rows;
      });
}

}  // namespace
}  // namespace attnserve::python

NB_MODULE(_core, module) {
  using namespace attnserve;
  // Threads of Python may hold a data plane until the process ends: no fault of the binding.
  nanobind::set_leak_warnings(false);
  module.doc() = "The data plane of attnserve; attnserve_dataplane says more.";
  module.attr("SECONDS_BUCKETS") = nb::cast(
      std::vector<double>(services::kSecondsBuckets.begin(), services::kSecondsBuckets.end()));
  module.attr("BATCH_BUCKETS") =
      nb::cast(std::vector<double>(services::kBatchBuckets.begin(), services::kBatchBuckets.end()));

  // Raised for a request that cannot be answered: args are (code, message, retry_after in seconds).
  static nb::object request_error = nb::exception<RequestError>(module, "RequestError");
  nb::register_exception_translator(
      [](const std::exception_ptr& error, void*) {
        try {
          std::rethrow_exception(error);
        } catch (const RequestError& refused) {
          const Status& status = refused.status();
          const nb::tuple arguments =
              nb::make_tuple(static_cast<int>(status.code), status.message,
                             static_cast<double>(status.retry_after.count()) * 1e-6);
          PyErr_SetObject(request_error.ptr(), arguments.ptr());
        }
      },
      nullptr);

  python::bind_models(module);
  python::bind_records(module);
  python::bind_requests(module);
  python::bind_identity(module);
  python::bind_moving(module);
  python::bind_plane(module);
  module.def(
      "collect_logs",
      [] { set_log_sink([](const LogRecord& record) { python::log_queue().add(record); }); },
      "From now on events go to next_log instead of standard error.");
  module.def(
      "next_log",
      [](double timeout) {
        using Event =
            std::tuple<std::string, std::string, std::vector<std::pair<std::string, std::string>>>;
        std::optional<python::LogEvent> event;
        {
          const nb::gil_scoped_release released;
          event = python::log_queue().next(python::seconds_of(timeout));
        }
        std::optional<Event> result;
        if (event) result = Event{std::string(name_of(event->level)), event->event, event->fields};
        return result;
      },
      "timeout"_a);
}
