// ONNX Runtime as the engine holds it: the loaded library, its environment, and handles that
// release what it makes. Private to engine/.
#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "base/tensor.h"
#include "engine/onnxruntime_abi.h"
#include "engine/session.h"

namespace attnserve::engine {

// Something that ONNX Runtime made, released by it. `api` lives until the process ends.
template <class T>
struct Release {
  const ort::Interface* api;
  void operator()(T* made) const { api->release(made); }
};
template <class T>
using Handle = std::unique_ptr<T, Release<T>>;

// What there is once per process of a library, made at its first use and never destroyed: values
// and threads of ONNX Runtime's may live until the process ends.
struct Environment {
  const ort::ApiBase* base = nullptr;
  ort::Interface api{nullptr};
  ort::Env* env = nullptr;
  ort::MemoryInfo* host = nullptr;  // says of memory that it is the host's
};

DataType data_type_of(ort::ElementType type);  // kUnspecified if attnserve has none for it
ort::ElementType element_type_of(DataType dtype);

class OnnxRuntime final : public Runtime {
 public:
  OnnxRuntime(const std::string& library, const std::string& operators);

  std::string version() const override { return environment_.base->get_version(); }

  const ort::Interface& api() const { return environment_.api; }
  const ort::Env* env() const { return environment_.env; }
  const ort::MemoryInfo* host() const { return environment_.host; }

  // What `create`, which takes a T** and returns a status, makes.
  template <class T, class Create>
  Handle<T> make(Create&& create) const {
    T* made = nullptr;
    check(create(&made));
    return Handle<T>(made, Release<T>{&api()});
  }

  // Throws std::runtime_error with the message of a status that is not a success, and releases it.
  void check(ort::Status* status) const {
    if (status != nullptr) throw std::runtime_error(message_of(status));
  }
  std::string message_of(ort::Status* status) const;  // and releases it

  // Adds the operators of attnserve-kernels, if they were loaded.
  void register_operators(ort::SessionOptions* options) const;
  // Lets the operators that begin on this thread end early once `flag` is true; nullptr: none does.
  void set_stop_flag(const std::atomic<bool>* flag) const {
    if (set_stop_flag_ != nullptr) set_stop_flag_(flag);
  }

 private:
  const Environment& environment_;
  ort::Status* (*register_operators_)(ort::SessionOptions*, const ort::ApiBase*) = nullptr;
  void (*set_stop_flag_)(const std::atomic<bool>*) = nullptr;
};

// Options of a session, as wanted.
Handle<ort::SessionOptions> session_options(const OnnxRuntime& runtime,
                                            const SessionOptions& wanted);

}  // namespace attnserve::engine
