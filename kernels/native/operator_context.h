// What the operators share: a kernel's inputs, outputs and threads as ONNX Runtime gives them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "onnxruntime_abi.h"

namespace attnserve {

// Multiplications that are worth another thread: waking one takes about 7 us, and what it then does
// should take longer. Double, since sizes multiplied may be more than an integer holds.
constexpr double kWorthThread = 1.5e6;

// Carries a status out of nested calls.
struct Failure {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw Failure{status};
}

struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> shape;
};

class Context {
 public:
  Context(const ort::Interface& api, ort::KernelContext* context) : api_(api), context_(context) {
    check(api.input_count(context, &count_));
  }

  // An input; without data if it is absent.
  Tensor input(std::size_t index) const {
    Tensor tensor;
    const ort::Value* value = nullptr;
    if (index >= count_) return tensor;
    check(api_.input(context_, index, &value));
    if (value == nullptr) return tensor;
    ort::TensorInfo* info = nullptr;
    check(api_.tensor_info(value, &info));
    std::size_t rank = 0;
    check(api_.dimension_count(info, &rank));
    tensor.shape.resize(rank);
    check(api_.dimensions(info, tensor.shape.data(), rank));
    api_.release_tensor_info(info);
    void* data = nullptr;
    check(api_.tensor_data(value, &data));
    tensor.data = data;
    return tensor;
  }

  // Null if it is optional and not asked for.
  template <typename T>
  T* output(std::size_t index, const std::vector<std::int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(api_.output(context_, index, shape.data(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(api_.tensor_data(value, &data));
    return static_cast<T*>(data);
  }

  [[noreturn]] void refuse(const std::string& message) const {
    throw Failure{api_.create_status(ort::kInvalidArgument, message.c_str())};
  }

  void require(bool condition, const char* message) const {
    if (!condition) refuse(message);
  }

  std::size_t output_count() const {
    std::size_t count = 0;
    check(api_.output_count(context_, &count));
    return count;
  }

  // As many threads as may run at once.
  static std::int64_t cores() {
    // Asked once: the answer is read from files.
    static const std::int64_t count = std::max(1u, std::thread::hardware_concurrency());
    return count;
  }

  // Call `body(task)` for every task, on ONNX Runtime's own threads. Threads take tasks one by one,
  // since some are much longer than others. `multiplications`: of all tasks, about.
  template <typename Body>
  void run(const Body& body, const std::atomic<bool>* stop, std::int64_t tasks,
           double multiplications) const {
    struct Shared {
      const Body& body;
      const std::atomic<bool>* stop;
      std::int64_t tasks;
      std::atomic<std::int64_t> next{0};
      std::atomic<bool> failed{false};
    } shared{body, stop, tasks};
    const auto work = [](void* data, std::size_t) {
      auto& all = *static_cast<Shared*>(data);
      try {
        for (std::int64_t task; (task = all.next.fetch_add(1)) < all.tasks;) {
          if (all.stop != nullptr && all.stop->load(std::memory_order_relaxed)) return;
          all.body(task);
        }
      } catch (...) {  // out of memory; nothing may pass through ONNX Runtime's threads
        all.failed = true;
      }
    };
    const std::int64_t most = std::min(tasks, cores());
    const double worth = 1.0 + multiplications / kWorthThread;
    const std::int64_t workers =
        worth < static_cast<double>(most) ? static_cast<std::int64_t>(worth) : most;
    if (workers <= 1) {
      work(&shared, 0);
    } else {
      check(api_.parallel_for(context_, work, static_cast<std::size_t>(workers), 0, &shared));
    }
    if (shared.failed) throw std::bad_alloc();
    if (stop != nullptr && stop->load())
      throw Failure{api_.create_status(ort::kFail, "attnserve: stopped")};
  }

 private:
  const ort::Interface& api_;
  ort::KernelContext* context_;
  std::size_t count_ = 0;
};

}  // namespace attnserve
