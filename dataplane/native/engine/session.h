// One ONNX graph, loaded and run by ONNX Runtime through its C interface.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"

namespace attnserve::engine {

// ONNX Runtime, loaded once per process from a shared library (the one that lies in its wheel).
class Runtime {
 public:
  // Throws std::runtime_error that names the file and the reason. `operators`: the library of
  // attnserve-kernels; empty: none.
  static std::shared_ptr<Runtime> load(const std::string& library, const std::string& operators);
  virtual ~Runtime() = default;
  virtual std::string version() const = 0;
};

struct SessionOptions {
  bool cuda = false;         // CUDA first, then the CPU; else the CPU alone
  int intra_op_threads = 1;  // CPU threads of one computation
  bool spinning = false;     // whether those threads spin while idle
};

struct Port {
  std::string name;
  DataType dtype = DataType::kUnspecified;  // kUnspecified: a type that attnserve has none for
  std::vector<std::int64_t> shape;          // -1: any size
};

// Stops a run from another thread: ONNX Runtime ends it at the next node, and the operators of
// attnserve-kernels at the next tile.
class Stop {
 public:
  virtual ~Stop() = default;
  virtual void request() = 0;  // any thread, any number of times
  virtual bool requested() const = 0;
};

// Elements that a run made, in memory of ONNX Runtime's or of ours.
class OwnedTensor {
 public:
  Tensor tensor;
  std::shared_ptr<void> owner;
};

// A graph that is ready to run. Safe to use from several threads.
class Session {
 public:
  // Throws std::runtime_error with ONNX Runtime's message.
  static std::unique_ptr<Session> load(std::shared_ptr<Runtime> runtime, const std::string& path,
                                       const SessionOptions& options);
  virtual ~Session() = default;

  virtual const std::vector<Port>& inputs() const = 0;
  virtual const std::vector<Port>& outputs() const = 0;
  bool takes(std::string_view name) const;
  bool gives(std::string_view name) const;
  // Whether query, key and value take any number of heads.
  virtual bool any_heads() const = 0;

  struct Feed {
    std::string_view name;
    Tensor tensor;
  };
  struct Fetch {
    std::string_view name;
    Tensor into;  // data == nullptr: the run makes the memory and `made` holds it afterwards
    OwnedTensor made;
  };
  // Runs the graph. `feeds` may hold more than the graph takes; what it takes must be there, else
  // std::logic_error. Feeds and outputs lie in the host's memory, at any address, and are read and
  // written in place; what is not aligned to its element size is copied, and what a device
  // computes. `into` is of the right dtype and shape. `stop`, if any, is of a session of the same
  // runtime and serves for any number of runs, one after another or at once. Throws RequestError:
  // kResourceExhausted "memory: ..." when an allocation of ONNX Runtime's fails, kCancelled when
  // stopped; and std::runtime_error with ONNX Runtime's message for all else.
  virtual void run(std::span<const Feed> feeds, std::span<Fetch> fetches, Stop* stop) = 0;
  virtual std::unique_ptr<Stop> make_stop() = 0;
};

// Memory for set_bytes_source where sessions run on CUDA: pinned, so that the device reads and
// writes it without a copy between. Throws std::runtime_error with ONNX Runtime's message.
std::unique_ptr<BytesSource> pinned_memory(std::shared_ptr<Runtime> runtime);

}  // namespace attnserve::engine
