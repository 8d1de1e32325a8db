// Loaded models: what is known of them, their graphs, and the choice between these.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "engine/session.h"

namespace attnserve::engine {

enum class Kind : std::uint8_t { kCore, kLayer, kTransformer };
enum class Mask : std::uint8_t { kBidirectional, kCausal, kCross };
std::string_view name_of(Kind kind);  // "core"

// What the control plane has read from model.json and checked. A value.
struct ModelFacts {
  std::string name;
  std::int64_t version = 1;
  Kind kind = Kind::kCore;
  DataType dtype = DataType::kFp32;
  std::int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1, value_head_dim = 1;
  Mask mask = Mask::kBidirectional;
  std::optional<std::int64_t> window, window_right;
  bool bottom_right = false;
  double scale = 1.0;
  double softcap = 0.0;        // 0: none
  std::vector<float> sinks;    // [num_heads], -inf: none; of a loaded model never empty
  std::int64_t embed_dim = 0;  // layer
  std::optional<std::int64_t> context_dim;  // layer with cross-attention
  std::int64_t pad_token_id = 0;            // transformer
  std::int64_t hidden_size = 0;             // transformer
};

struct VariantFacts {
  std::string name;
  std::string path;       // of the ONNX file
  bool quadratic = true;  // holds the scores of all queries and keys while it runs
  bool native = false;    // needs the operators of attnserve-kernels
};

// Names of variants to prefer up to a length, best first; nullopt: any length.
struct Pick {
  std::optional<std::int64_t> up_to;
  std::vector<std::string> variants;
};

// The variant that reads and writes pages of KV sessions. Nothing but Decode runs it.
constexpr std::string_view kPagedVariant = "paged";

class Variant {
 public:
  VariantFacts facts;
  std::unique_ptr<Session> session;
  const std::string& name() const { return facts.name; }
  bool paged() const { return facts.name == kPagedVariant; }
};

// One version of a model, ready to run. Immutable; requests hold it while they need it.
class Model {
 public:
  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  ModelFacts facts;
  std::vector<std::unique_ptr<Variant>> variants;  // at least one
  std::vector<Pick> picks;                         // for the provider in use
  bool on_cuda = false;
  std::string version_text;  // facts.version as text

  // The first variant that takes and gives these; nullptr: none. As `choose`, never a paged one.
  const Variant* find(std::span<const std::string_view> inputs,
                      std::span<const std::string_view> outputs) const;
  const Variant* named(std::string_view name) const;
  // The preferred variant that takes what is given and gives what is wanted.
  // `length` the longer of Sq and Sk; `forced` the variant asked for by name; empty: any. Throws
  // RequestError NOT_FOUND "variant: ..." or FAILED_PRECONDITION "... cannot do this: ...".
  const Variant& choose(std::string_view forced, std::span<const std::string_view> inputs,
                        std::span<const std::string_view> outputs, std::int64_t length) const;
};
using ModelPtr = std::shared_ptr<const Model>;

std::string name_of(const Model& model, const Variant& variant);  // "causal/1 native"

// Loads every variant. Throws std::runtime_error "PATH: does not load: REASON".
std::shared_ptr<Model> load_model(const std::shared_ptr<Runtime>& runtime, ModelFacts facts,
                                  std::vector<VariantFacts> variants, std::vector<Pick> picks,
                                  const SessionOptions& options);

// All loaded models by name and version. Any thread.
class ModelStore {
 public:
  // An empty version is the highest. Throws RequestError: NOT_FOUND with what there is instead, or
  // UNAVAILABLE for what was unloaded, or FAILED_PRECONDITION for what does not load.
  ModelPtr get(std::string_view name, std::string_view version) const;
  // Have these versions of a model and no others. With none, requests are told the reason; without
  // one, that it is unloaded.
  void put(const std::string& name, std::vector<ModelPtr> models, std::string reason = {});

 private:
  struct Loaded;
  std::shared_ptr<const Loaded> now() const;
  mutable std::mutex mutex_;  // guards now_, held for the copy of a pointer alone
  std::shared_ptr<const Loaded> now_;
};

// Bytes that a variant takes while it runs, estimated, beside `tensor_bytes` of what comes in and
// goes out. The largest size_t if it is more.
std::size_t working_bytes(const Model& model, const Variant& variant, std::int64_t batch,
                          std::int64_t num_heads, std::int64_t query_len, std::int64_t key_len,
                          std::size_t tensor_bytes);

}  // namespace attnserve::engine
