// Models that are there to be checked against, and requests to check.
#pragma once

#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "fake_session.h"
#include "requests/attend.h"
#include "requests/limits.h"
#include "sessions/shared_memory.h"
#include "sessions/stored_tensors.h"
#include "wire/attention.h"

namespace attnserve::requests {

inline engine::ModelFacts core_facts(const std::string& name) {
  engine::ModelFacts facts;
  facts.name = name;
  facts.num_heads = facts.num_kv_heads = 4;
  facts.head_dim = facts.value_head_dim = 8;
  facts.mask = engine::Mask::kCausal;
  facts.scale = 0.35355339059327373;  // 1/sqrt(8)
  return facts;
}

inline void add(engine::Model& model, const std::string& name,
                const std::vector<std::string>& takes, const std::vector<std::string>& gives,
                bool native = false) {
  engine::add_variant(model, name, std::make_unique<engine::FakeSession>(takes, gives));
  engine::VariantFacts& facts = model.variants.back()->facts;
  facts.native = native;
  facts.quadratic = !native;
}

inline std::shared_ptr<engine::Model> model_of(engine::ModelFacts facts) {
  auto model = std::make_shared<engine::Model>();
  model->version_text = std::to_string(facts.version);
  model->facts = std::move(facts);
  return model;
}

// With the variants that the exporter makes.
inline engine::ModelPtr core(engine::ModelFacts facts) {
  const auto model = model_of(std::move(facts));
  const std::vector<std::string> takes{"query", "key", "value", "key_lengths", "bias"};
  const std::vector<std::string> with_softcap{"query",       "key",  "value",
                                              "key_lengths", "bias", "softcap"};
  add(*model, "native", with_softcap, {"output"}, true);
  add(*model, "fused", takes, {"output"});
  add(*model, "reference", takes, {"output", "weights"});
  add(*model, "softcap", with_softcap, {"output", "weights"});
  add(*model, "diagnostics",
      {"query", "key", "key_lengths", "bias", "softcap", "top_k", "distances"},
      {"entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights"}, true);
  return model;
}

// One of packed sequences beside the others, all of which take masks and prefixes.
inline engine::ModelPtr masked() {
  engine::ModelFacts facts = core_facts("masked");
  facts.mask = engine::Mask::kCausal;
  facts.sinks = {0.5F, -1, 0, 2};
  const auto model = model_of(std::move(facts));
  const std::vector<std::string> masks{"bias", "mask", "prefix_lengths", "softcap", "sinks"};
  std::vector<std::string> takes{"query", "key", "value", "key_lengths"};
  takes.insert(takes.end(), masks.begin(), masks.end());
  add(*model, "native", takes, {"output", "log_sum_exp"}, true);
  takes.insert(takes.end(), {"top_k", "distances"});
  add(*model, "diagnostics", takes,
      {"entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights"}, true);
  takes = {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"};
  takes.insert(takes.end(), masks.begin(), masks.end());
  add(*model, "packed", takes, {"output", "log_sum_exp"}, true);
  return model;
}

// One graph that takes and gives the least.
inline engine::ModelPtr bare() {
  const auto model = model_of(core_facts("bare"));
  add(*model, "fused", {"query", "key", "value"}, {"output"});
  return model;
}

inline engine::ModelPtr layer(const std::string& name, std::optional<std::int64_t> context_dim) {
  engine::ModelFacts facts = core_facts(name);
  facts.kind = engine::Kind::kLayer;
  facts.embed_dim = 32;
  facts.context_dim = context_dim;
  const auto model = model_of(std::move(facts));
  std::vector<std::string> takes{"hidden_states", "key_lengths"};
  if (context_dim) takes.insert(takes.begin() + 1, "context");
  add(*model, "fused", takes, {"output"});
  add(*model, "reference", takes, {"output", "weights"});
  return model;
}

inline engine::ModelPtr transformer() {
  engine::ModelFacts facts = core_facts("bert");
  facts.kind = engine::Kind::kTransformer;
  const auto model = model_of(std::move(facts));
  add(*model, "fused", {"input_ids", "attention_mask"}, {"last_hidden_state"});
  return model;
}

inline Limits small_limits() {
  Limits limits;
  limits.max_message_bytes = 4U << 20;
  limits.max_request_bytes = 32U << 20;
  limits.max_response_bytes = 16U << 20;
  limits.max_working_bytes = 384U << 20;
  limits.max_seq_len = 4096;
  limits.max_batch = 64;
  return limits;
}

// What requests are checked against.
class World {
 public:
  explicit World(const Limits& allowed = small_limits())
      : limits(allowed), stored(1U << 20, std::chrono::minutes(5), std::chrono::hours(1)) {
    put(core(core_facts("causal")));
    engine::ModelFacts grouped = core_facts("grouped");
    grouped.num_kv_heads = 2;
    grouped.value_head_dim = 6;
    const engine::ModelPtr first = core(grouped);
    grouped.version = 10;
    models.put("grouped", {first, core(grouped)});
    engine::ModelFacts facts = core_facts("half");
    facts.dtype = DataType::kFp16;
    put(core(facts));
    facts = core_facts("brain");
    facts.dtype = DataType::kBf16;
    put(core(facts));
    facts = core_facts("capped");
    facts.softcap = 5;
    put(core(facts));
    put(bare());
    put(masked());
    put(layer("self", std::nullopt));
    put(layer("cross", 24));
    put(transformer());
  }

  Context context() { return {models, limits, stored, regions}; }

  std::string store(DataType dtype, const Shape& shape) {
    sessions::StoredTensor tensor;
    tensor.dtype = dtype;
    tensor.shape = shape;
    tensor.elements = Bytes::allocate(Tensor{dtype, shape, nullptr}.byte_size());
    std::memset(tensor.elements.data(), 0, tensor.elements.size());
    sessions::Room room = stored.begin();
    room.claim(tensor.elements.size());
    return stored.put(std::move(tensor), std::move(room), Duration::zero(), {}).handle;
  }

  engine::ModelStore models;
  Limits limits;
  sessions::StoredTensors stored;
  sessions::SharedRegions regions{16, 1U << 20};

 private:
  void put(const engine::ModelPtr& model) { models.put(model->facts.name, {model}); }
};

// A request and the bytes that its views look at.
class Request {
 public:
  // query, key and value [1, 4, 3, 8], zeros.
  explicit Request(std::string_view model = "causal", DataType dtype = DataType::kFp32) {
    message.model = model;
    if (model == "self" || model == "cross") {
      hidden_states() = tensor({1, 3, 32});
    } else {
      all({1, 4, 3, 8}, dtype);
    }
  }

  wire::AttendRequest message;

  std::optional<wire::TensorMessage>& at(wire::Input input) {
    return message.tensors[static_cast<std::size_t>(input)];
  }
  std::optional<wire::TensorMessage>& query() { return at(wire::Input::kQuery); }
  std::optional<wire::TensorMessage>& key() { return at(wire::Input::kKey); }
  std::optional<wire::TensorMessage>& value() { return at(wire::Input::kValue); }
  std::optional<wire::TensorMessage>& hidden_states() { return at(wire::Input::kHiddenStates); }
  std::optional<wire::TensorMessage>& context() { return at(wire::Input::kContext); }
  std::optional<wire::TensorMessage>& key_lengths() { return at(wire::Input::kKeyLengths); }
  std::optional<wire::TensorMessage>& bias() { return at(wire::Input::kBias); }

  void all(const std::vector<std::int64_t>& shape, DataType dtype = DataType::kFp32) {
    query() = key() = value() = tensor(shape, dtype);
  }

  // Zeros.
  wire::TensorMessage tensor(const std::vector<std::int64_t>& shape,
                             DataType dtype = DataType::kFp32) {
    std::size_t size = item_bytes(dtype);
    for (const std::int64_t each : shape) size *= static_cast<std::size_t>(each);
    return header(shape, static_cast<std::int32_t>(dtype), room(size));
  }
  // With so many bytes of elements, whatever the shape takes.
  wire::TensorMessage sized(const std::vector<std::int64_t>& shape, std::size_t size,
                            std::int32_t dtype = 1) {
    return header(shape, dtype, room(size));
  }
  template <class Element>
  wire::TensorMessage with(const std::vector<std::int64_t>& shape, DataType dtype,
                           const std::vector<Element>& elements) {
    const MutableByteSpan bytes = room(elements.size() * sizeof(Element));
    std::memcpy(bytes.data(), elements.data(), bytes.size());
    return header(shape, static_cast<std::int32_t>(dtype), bytes);
  }
  wire::TensorMessage lengths(const std::vector<std::int64_t>& values) {
    return with({static_cast<std::int64_t>(values.size())}, DataType::kInt64, values);
  }
  // [1, 1, 3, 3], zeros but for these.
  template <class Element>
  wire::TensorMessage bias_of(DataType dtype,
                              std::initializer_list<std::pair<std::size_t, Element>> elements) {
    std::vector<Element> all_of_it(9);
    for (const auto& [place, element] : elements) all_of_it[place] = element;
    return with({1, 1, 3, 3}, dtype, all_of_it);
  }
  // [1, 4, 3, 8] in shared memory.
  static wire::TensorMessage shared(std::string_view name, std::uint64_t offset,
                                    std::uint64_t byte_size) {
    wire::TensorMessage tensor_message = header({1, 4, 3, 8}, 1, {});
    tensor_message.content = wire::TensorMessage::Content::kSharedMemory;
    tensor_message.region = {name, offset, byte_size};
    return tensor_message;
  }
  wire::TensorMessage stored(const std::string& handle, const std::vector<std::int64_t>& shape = {},
                             std::int32_t dtype = 0) {
    wire::TensorMessage tensor_message = header(shape, dtype, {});
    tensor_message.content = wire::TensorMessage::Content::kStored;
    tensor_message.stored = texts_.emplace_back(handle);
    return tensor_message;
  }
  static wire::TensorMessage chunked(std::uint64_t byte_size) {
    wire::TensorMessage tensor_message = header({1, 4, 3, 8}, 1, {});
    tensor_message.content = wire::TensorMessage::Content::kChunked;
    tensor_message.chunked_bytes = byte_size;
    return tensor_message;
  }

  std::array<ByteSpan, wire::kInputs> elements() const {
    std::array<ByteSpan, wire::kInputs> all_of_them;
    for (std::size_t i = 0; i < wire::kInputs; ++i) {
      if (message.tensors[i]) all_of_them[i] = message.tensors[i]->data;
    }
    return all_of_them;
  }

 private:
  static wire::TensorMessage header(const std::vector<std::int64_t>& shape, std::int32_t dtype,
                                    ByteSpan data) {
    wire::TensorMessage made;
    made.dtype = dtype;
    made.shape = shape;
    made.content = wire::TensorMessage::Content::kData;
    made.data = data;
    return made;
  }
  MutableByteSpan room(std::size_t size) {
    Bytes& bytes = memory_.emplace_back(Bytes::allocate(size));
    if (size > 0) std::memset(bytes.data(), 0, size);
    return bytes.span();
  }

  std::deque<Bytes> memory_;
  std::deque<std::string> texts_;
};

// The status that a check throws; OK if it throws none.
template <class Check>
Status status_thrown(Check check) {
  try {
    check();
  } catch (const RequestError& error) {
    return error.status();
  }
  return {};
}

constexpr const char* kPeer = "ipv4:127.0.0.1:5000";
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace attnserve::requests
