// Requests of the Open Inference Protocol to check, and shared memory for them.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "requests/infer.h"
#include "requests_support.h"
#include "wire/open_inference.h"

namespace attnserve::requests {

// An object of shared memory; a region of its first 4096 bytes is registered as "r".
class SharedObject {
 public:
  static constexpr std::size_t kBytes = 8192, kRegionBytes = 4096;

  explicit SharedObject(World& world) {
    const std::string key = "attnserve-requests-" + std::to_string(getpid());
    const int descriptor = shm_open(("/" + key).c_str(), O_CREAT | O_RDWR, 0600);
    if (descriptor < 0 || ftruncate(descriptor, kBytes) != 0) throw std::runtime_error("shm_open");
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0));
    close(descriptor);
    world.regions.add("r", key, 0, kRegionBytes, sessions::owner_of(kPeer));
    shm_unlink(("/" + key).c_str());  // it lives while it is mapped
  }
  SharedObject(const SharedObject&) = delete;
  SharedObject& operator=(const SharedObject&) = delete;
  ~SharedObject() { munmap(memory_, kBytes); }

  std::byte* at(std::size_t offset) { return memory_ + offset; }

 private:
  std::byte* memory_ = nullptr;
};

class Infer {
 public:
  // query, key and value [1, 4, 3, 8], zeros, raw.
  explicit Infer(const std::vector<std::int64_t>& shape = {1, 4, 3, 8}) {
    for (const char* name : {"query", "key", "value"}) add(name, shape);
  }

  std::string model = "causal";
  std::string peer = kPeer;
  wire::InferRequest message;

  wire::InferInput& query() { return message.inputs.front(); }

  // Zeros of FP32, raw.
  void add(std::string_view name, const std::vector<std::int64_t>& shape) {
    std::size_t size = 4;
    for (const std::int64_t each : shape) size *= static_cast<std::size_t>(each);
    message.inputs.push_back({name, "FP32", shape, {}, {}});
    Bytes& bytes = memory_.emplace_back(Bytes::allocate(size));
    std::memset(bytes.data(), 0, size);
    message.raw_input_contents.push_back(bytes.span());
  }
  void add_lengths(std::int64_t length) {
    add("key_lengths", {2});
    message.inputs.back().datatype = "INT64";
    message.inputs.back().shape = {1};
    std::memcpy(memory_.back().data(), &length, sizeof length);
  }
  // query alone, [1, 4, 1, 8], its elements one by one.
  template <class Element>
  void typed(std::string_view datatype, const std::vector<std::string_view>& fields, DataType dtype,
             const std::vector<Element>& elements) {
    message.inputs.clear();
    message.raw_input_contents.clear();
    message.inputs.push_back({"query", datatype, {1, 4, 1, 8}, {}, {}});
    query().contents = contents(fields, dtype, elements);
  }
  template <class Element>
  static wire::Contents contents(const std::vector<std::string_view>& fields, DataType dtype,
                                 const std::vector<Element>& elements) {
    wire::Contents made;
    made.fields = fields;
    made.dtype = dtype;
    made.count = elements.size();
    made.elements = Bytes::allocate(elements.size() * sizeof(Element));
    if (!elements.empty()) {
      std::memcpy(made.elements.data(), elements.data(), made.elements.size());
    }
    return made;
  }
  // query's elements lie where these parameters say.
  void share(wire::Parameters parameters) {
    message.raw_input_contents.erase(message.raw_input_contents.begin());
    query().parameters = std::move(parameters);
  }
  void ask(std::string_view name, wire::Parameters parameters = {}) {
    message.outputs.push_back({name, std::move(parameters)});
  }
  void set(std::string_view name, wire::ParameterValue value) {
    message.parameters.emplace_back(name, value);
  }
  // One input, hidden_states [1, 3, 32].
  void to_layer() {
    model = "self";
    message.inputs.clear();
    message.raw_input_contents.clear();
    add("hidden_states", {1, 3, 32});
  }

  InferPlan plan(World& world) {
    return plan_infer(message, world.models.get(model, ""), world.context(), peer);
  }

 private:
  std::deque<Bytes> memory_;
};

// Parameters as clients give them, their names without "shared_memory_".
inline wire::Parameters region_parameters(
    const std::vector<std::pair<std::string_view, wire::ParameterValue>>& given) {
  wire::Parameters parameters;
  for (const auto& [name, value] : given) {
    if (name == "region") parameters.emplace_back("shared_memory_region", value);
    if (name == "byte_size") parameters.emplace_back("shared_memory_byte_size", value);
    if (name == "offset") parameters.emplace_back("shared_memory_offset", value);
  }
  return parameters;
}

constexpr std::monostate kUnset;
constexpr std::int64_t integer(std::int64_t value) { return value; }
constexpr std::string_view word(std::string_view value) { return value; }

}  // namespace attnserve::requests
