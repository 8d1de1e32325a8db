#include "engine/model.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <utility>

#include "base/fault_table.h"
#include "base/status.h"
#include "base/text.h"
#include "engine/private_files.h"

namespace attnserve::engine {
namespace {

using Names = std::span<const std::string_view>;

// Variants for packed sequences compute nothing else.
constexpr std::string_view kPacked = "cu_seqlens_q";

bool lacks_starts(const Variant& variant, Names inputs) {
  return variant.session->takes(kPacked) && std::ranges::find(inputs, kPacked) == inputs.end();
}

bool can(const Variant& variant, Names inputs, Names outputs) {
  const Session& session = *variant.session;
  if (lacks_starts(variant, inputs)) return false;
  return std::ranges::all_of(inputs, [&](auto name) { return session.takes(name); }) &&
         std::ranges::all_of(outputs, [&](auto name) { return session.gives(name); });
}

// All variants, those first that are picked for a length. Costs an allocation: for a model of
// several variants no more than looking at their names does.
std::vector<const Variant*> preferred(const Model& model, std::int64_t length) {
  std::vector<const Variant*> order;
  order.reserve(model.variants.size());
  const auto pick = std::ranges::find_if(
      model.picks, [&](const Pick& row) { return !row.up_to || length <= *row.up_to; });
  if (pick != model.picks.end()) {
    for (const std::string& name : pick->variants) {
      const Variant* variant = model.named(name);
      if (variant != nullptr && std::ranges::find(order, variant) == order.end()) {
        order.push_back(variant);
      }
    }
  }
  for (const auto& variant : model.variants) {
    if (std::ranges::find(order, variant.get()) == order.end()) order.push_back(variant.get());
  }
  std::erase_if(order, [](const Variant* variant) { return variant->paged(); });
  return order;
}

std::string joined(const std::vector<std::string>& parts, std::string_view separator) {
  std::string whole;
  for (const std::string& part : parts) {
    if (!whole.empty()) whole += separator;
    whole += part;
  }
  return whole;
}

// What is in `asked` and no candidate has, sorted; each once.
template <class Has>
std::vector<std::string> missing(Names asked, const std::vector<const Variant*>& candidates,
                                 Has has) {
  std::set<std::string> names;
  for (const std::string_view name : asked) {
    if (std::ranges::none_of(candidates, [&](auto* variant) { return has(*variant, name); })) {
      names.emplace(name);
    }
  }
  return {names.begin(), names.end()};
}

std::string lacking(const std::vector<const Variant*>& candidates, Names inputs, Names outputs) {
  const auto taken = missing(inputs, candidates, [](const Variant& variant, auto name) {
    return variant.session->takes(name);
  });
  const auto given = missing(outputs, candidates, [](const Variant& variant, auto name) {
    return variant.session->gives(name);
  });
  std::vector<std::string> parts;
  if (!taken.empty()) parts.push_back(text("it takes no ", joined(taken, ", ")));
  if (!given.empty()) parts.push_back(text("it gives no ", joined(given, ", ")));
  if (std::ranges::all_of(candidates, [&](auto* each) { return lacks_starts(*each, inputs); })) {
    parts.push_back(text("it needs ", kPacked));
  }
  if (parts.empty()) return "no single variant takes and gives all of it";
  return joined(parts, "; ");
}

}  // namespace

std::string_view name_of(Kind kind) {
  switch (kind) {
    case Kind::kCore:
      return "core";
    case Kind::kLayer:
      return "layer";
    case Kind::kTransformer:
      break;
  }
  return "transformer";
}

std::string name_of(const Model& model, const Variant& variant) {
  return text(model.facts.name, "/", model.version_text, " ", variant.name());
}

const Variant* Model::find(Names inputs, Names outputs) const {
  const auto found = std::ranges::find_if(
      variants, [&](auto& each) { return !each->paged() && can(*each, inputs, outputs); });
  return found == variants.end() ? nullptr : found->get();
}

const Variant* Model::named(std::string_view name) const {
  const auto found =
      std::ranges::find_if(variants, [&](auto& each) { return each->name() == name; });
  return found == variants.end() ? nullptr : found->get();
}

const Variant& Model::choose(std::string_view forced, Names inputs, Names outputs,
                             std::int64_t length) const {
  std::vector<const Variant*> candidates = preferred(*this, length);
  if (!forced.empty()) {
    std::erase_if(candidates, [&](const Variant* variant) { return variant->name() != forced; });
  }
  const auto what = [&] { return text("model ", facts.name, " version ", version_text); };
  if (candidates.empty()) {
    std::vector<std::string> known;
    for (const auto& variant : variants) {
      if (!variant->paged()) known.push_back(variant->name());
    }
    throw RequestError(Code::kNotFound, text("variant: given ", quoted(forced), "; ", what(),
                                             " has: ", joined(known, ", ")));
  }
  for (const Variant* variant : candidates) {
    if (can(*variant, inputs, outputs)) return *variant;
  }
  const std::string which =
      forced.empty() ? what() : text("variant ", quoted(forced), " of ", what());
  throw RequestError(Code::kFailedPrecondition,
                     text(which, " cannot do this: ", lacking(candidates, inputs, outputs)));
}

std::shared_ptr<Model> load_model(const std::shared_ptr<Runtime>& runtime, ModelFacts facts,
                                  std::vector<VariantFacts> variants, std::vector<Pick> picks,
                                  const SessionOptions& options) {
  auto model = std::make_shared<Model>();
  model->version_text = text(facts.version);
  model->facts = std::move(facts);
  if (model->facts.sinks.empty()) {
    model->facts.sinks.assign(static_cast<std::size_t>(model->facts.num_heads),
                              -std::numeric_limits<float>::infinity());
  }
  model->picks = std::move(picks);
  model->on_cuda = options.cuda;
  const FaultScope faults;
  PrivateFiles files;
  for (VariantFacts& described : variants) {
    auto variant = std::make_unique<Variant>();
    variant->facts = std::move(described);
    try {
      variant->session = Session::load(runtime, variant->facts.path, options);
      files.take_over(std::filesystem::path(variant->facts.path).parent_path());
      if (faults.broken()) throw std::runtime_error("a file was cut short while it was read");
    } catch (const std::exception& error) {
      throw std::runtime_error(text(variant->facts.path, ": does not load: ", error.what()));
    }
    model->variants.push_back(std::move(variant));
  }
  return model;
}

namespace {

// a * b, or the largest number if it is more.
std::size_t times(std::size_t a, std::size_t b) {
  std::size_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<std::size_t>::max() : product;
}

std::size_t plus(std::size_t a, std::size_t b) {
  std::size_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<std::size_t>::max() : sum;
}

// ONNX Runtime's CPU kernels hold the scores of all queries and keys several times over while they
// run: masked, scaled and softmaxed copies. Peak memory grew by 0.8 to 2.2 times the scores with
// `fused` and by 4.8 to 5.3 times with `reference`, weights in the answer, at 2048 and 4096
// positions (8 heads of 64, FP32); rounded up.
constexpr std::size_t kScoreCopies = 6;

// `blocked` holds some copies of a block of scores at a time, and its tensors in FP32 besides;
// `native` some tiles per thread. Rounded up from docs/kernels.md.
constexpr std::size_t kBlockBytes = std::size_t{128} << 20;
constexpr std::size_t kTileBytes = std::size_t{16} << 20;

// A block of `blocked` has so many bytes of scores, or as many as so many queries have if that is
// more; and what blocks that grow take of them where nothing is reused: 8.5 sizes, 4 copies.
constexpr std::size_t kBlockScores = std::size_t{16} << 20;
constexpr std::size_t kFewestQueries = 16;
constexpr std::size_t kGrowingCopies = 34;

}  // namespace

std::size_t working_bytes(const Model& model, const Variant& variant, std::int64_t batch,
                          std::int64_t num_heads, std::int64_t query_len, std::int64_t key_len,
                          std::size_t tensor_bytes) {
  // Scores are FP32 for every dtype on the CPU.
  std::size_t scores = sizeof(float);
  for (const std::int64_t size : {batch, num_heads, query_len, key_len}) {
    scores = times(scores, static_cast<std::size_t>(size));
  }
  if (variant.facts.quadratic) return times(kScoreCopies, scores);
  if (variant.facts.native) return plus(kTileBytes, times(2, tensor_bytes));
  // Twice: FP16 tensors are computed in FP32; and the blocks are put together at the end.
  const std::size_t linear = plus(kBlockBytes, times(4, tensor_bytes));
  // CUDA's arena does not reuse what a smaller block had, where keys grow from block to block: in
  // 16 steps, of which all together take 8.5 times as much as the last, and of each some copies.
  const bool growing_blocks = model.on_cuda && model.facts.mask == Mask::kCausal &&
                              !model.facts.window && variant.name().starts_with("blocked");
  if (!growing_blocks) return linear;
  const std::size_t queries = static_cast<std::size_t>(std::max<std::int64_t>(query_len, 1));
  const std::size_t fewest = times(kFewestQueries, scores / queries);
  return plus(linear, times(kGrowingCopies, std::min(scores, std::max(kBlockScores, fewest))));
}

}  // namespace attnserve::engine
