#include "engine/onnxruntime.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "base/text.h"
#include "engine/host_allocator.h"

namespace attnserve::engine {
namespace {

// A library, never closed: neither survives that, with threads and statics of its own.
void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(text(path, ": does not load: ", dlerror()));
  return library;
}

template <class Function>
Function symbol(void* library, const std::string& path, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(text(path, ": has no function ", name));
  return reinterpret_cast<Function>(found);
}

void check(const ort::Interface& api, ort::Status* status) {
  if (status == nullptr) return;
  const Handle<ort::Status> owned(status, Release<ort::Status>{&api});
  throw std::runtime_error(api.error_message(status));
}

Environment make_environment(const std::string& path) {
  void* library = open_library(path);
  Environment made;
  made.base = symbol<const ort::ApiBase* (*)()>(library, path, "OrtGetApiBase")();
  const ort::Table* table = made.base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    throw std::runtime_error(text(path, ": ONNX Runtime ", made.base->get_version(),
                                  " is too old; 1.17 or newer is needed"));
  }
  const ort::Interface api = made.api = ort::Interface(table);
  check(api, api.create_env(ort::kFatal, "attnserve", &made.env));
  check(api, api.disable_telemetry(made.env));
  check(api,
        api.create_memory_info("Cpu", ort::kDeviceAllocator, 0, ort::kDefaultMemory, &made.host));
  check(api, api.register_allocator(made.env, host_allocator(made.host)));
  return made;
}

const Environment& environment_of(const std::string& path) {
  static std::mutex mutex;  // guards `known`
  static auto& known = *new std::map<std::string, Environment>;
  const std::scoped_lock lock(mutex);
  const auto found = known.find(path);
  return found != known.end() ? found->second
                              : known.emplace(path, make_environment(path)).first->second;
}

}  // namespace

DataType data_type_of(ort::ElementType type) {
  switch (type) {
    case ort::kFloat:
      return DataType::kFp32;
    case ort::kFloat16:
      return DataType::kFp16;
    case ort::kBFloat16:
      return DataType::kBf16;
    case ort::kInt64:
      return DataType::kInt64;
    case ort::kInt32:
      return DataType::kInt32;
    case ort::kBool:
      return DataType::kBool;
    case ort::kUint8:
      return DataType::kUint8;
  }
  return DataType::kUnspecified;
}

ort::ElementType element_type_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFp32:
      return ort::kFloat;
    case DataType::kFp16:
      return ort::kFloat16;
    case DataType::kBf16:
      return ort::kBFloat16;
    case DataType::kInt64:
      return ort::kInt64;
    case DataType::kInt32:
      return ort::kInt32;
    case DataType::kBool:
      return ort::kBool;
    case DataType::kUint8:
      return ort::kUint8;
    case DataType::kUnspecified:
      break;
  }
  throw std::logic_error("a tensor without element type");
}

std::shared_ptr<Runtime> Runtime::load(const std::string& library, const std::string& operators) {
  return std::make_shared<OnnxRuntime>(library, operators);
}

OnnxRuntime::OnnxRuntime(const std::string& library, const std::string& operators)
    : environment_(environment_of(library)) {
  if (operators.empty()) return;
  void* opened = open_library(operators);
  register_operators_ =
      symbol<decltype(register_operators_)>(opened, operators, "RegisterCustomOps");
  set_stop_flag_ = symbol<decltype(set_stop_flag_)>(opened, operators, "attnserve_set_stop_flag");
}

std::string OnnxRuntime::message_of(ort::Status* status) const {
  const Handle<ort::Status> owned(status, Release<ort::Status>{&api()});
  return api().error_message(status);
}

void OnnxRuntime::register_operators(ort::SessionOptions* options) const {
  if (register_operators_ != nullptr) check(register_operators_(options, environment_.base));
}

}  // namespace attnserve::engine
