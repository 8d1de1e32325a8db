#include "requests/sizes.h"

#include <string>

#include "base/status.h"
#include "base/text.h"
#include "engine/padded_queries.h"
#include "requests/refusal.h"
#include "requests/tensor_spec.h"

namespace attnserve::requests {
namespace {

void check(std::string_view what, Wide given, std::size_t allowed, std::string_view option) {
  if (given <= allowed) return;
  throw RequestError(Code::kResourceExhausted,
                     text(what, " size: its tensors take ", wide_text(given),
                          " bytes; allowed: ", allowed, " (", option, ")"));
}

std::uint64_t aligned(std::uint64_t offset) {
  return (offset + (kAlignment - 1)) / kAlignment * kAlignment;
}

std::vector<std::size_t> byte_sizes_of(const std::vector<wire::ResultSpec>& results) {
  std::vector<std::size_t> sizes;
  sizes.reserve(results.size());
  for (const wire::ResultSpec& result : results) sizes.push_back(result.byte_size);
  return sizes;
}

}  // namespace

void check_request_bytes(Wide total, const Limits& limits) {
  check("request", total, limits.max_request_bytes, "--max-request-mib");
}

void check_response_bytes(Wide total, const Limits& limits) {
  check("response", total, limits.max_response_bytes, "--max-response-mib");
}

std::size_t checked_request_bytes(const TensorSpecs& specs, const Limits& limits) {
  Wide total = 0;
  for (const std::optional<TensorSpec>& spec : specs) {
    if (spec) total += spec->byte_size;
  }
  check_request_bytes(total, limits);
  return static_cast<std::size_t>(total);
}

Results checked_results(const engine::Model& model, const Shape* layer_output,
                        const engine::Dims& dims, const engine::Wanted& wanted,
                        const Limits& limits) {
  const DataType own = model.facts.dtype;
  const std::int64_t batch = dims.batch, heads = dims.num_heads, queries = dims.query_len;
  const Shape rows{batch, heads, queries};
  const Shape output = layer_output != nullptr
                           ? *layer_output
                           : Shape{batch, heads, queries, model.facts.value_head_dim};
  const Shape heaviest{batch, heads, queries, wanted.top_k};
  Results results;
  results.specs.reserve(wire::kOutputs);
  Wide total = 0;
  const auto add = [&](bool asked, wire::Output name, DataType dtype, const Shape& shape) {
    if (!asked) return;
    Wide bytes = item_bytes(dtype);
    for (const std::int64_t size : shape.sizes()) bytes = times(bytes, size);
    total = plus(total, bytes);
    results.specs.push_back({name, dtype, shape, static_cast<std::size_t>(bytes)});
  };
  using enum wire::Output;
  add(wanted.output, kOutput, own, output);
  add(wanted.weights, kWeights, own, {batch, heads, queries, dims.key_len});
  add(wanted.entropy, kEntropy, DataType::kFp32, rows);
  add(wanted.top_k != 0, kTopKIndices, DataType::kInt64, heaviest);
  add(wanted.top_k != 0, kTopKWeights, DataType::kFp32, heaviest);
  add(wanted.mass_per_key, kMassPerKey, DataType::kFp32, {batch, heads, dims.key_len});
  add(wanted.mass_by_distance != 0, kMassByDistance, DataType::kFp32,
      {dims.sequences(), heads, wanted.mass_by_distance});
  add(wanted.log_sum_exp, kLogSumExp, DataType::kFp32, rows);
  check_response_bytes(total, limits);
  results.byte_size = static_cast<std::size_t>(total);
  return results;
}

std::size_t checked_working_bytes(const engine::Model& model, const engine::Variant& variant,
                                  const engine::Dims& dims, std::size_t tensor_bytes,
                                  const Limits& limits) {
  const std::size_t needed = engine::working_bytes(model, variant, dims.batch, dims.num_heads,
                                                   dims.query_len, dims.key_len, tensor_bytes);
  if (needed > limits.max_working_bytes) {
    throw RequestError(Code::kResourceExhausted,
                       text("lengths: B=", dims.batch, ", H=", dims.num_heads, ", Sq=",
                            dims.query_len, ", Sk=", dims.key_len, " would take about ", needed,
                            " bytes of working memory with variant ", quoted(variant.name()),
                            "; allowed: ", limits.max_working_bytes, " (--max-working-mib)"));
  }
  return needed;
}

std::size_t without_padding_bytes(const engine::Model& model, const TensorSpecs& specs,
                                  const engine::Dims& dims) {
  const auto& key_lengths = specs[static_cast<std::size_t>(wire::Input::kKeyLengths)];
  const auto& bias = specs[static_cast<std::size_t>(wire::Input::kBias)];
  const engine::ModelFacts& facts = model.facts;
  if (facts.kind != engine::Kind::kLayer || facts.context_dim || !key_lengths || !bias ||
      bias->dtype != DataType::kBool) {
    return 0;
  }
  return static_cast<std::size_t>(engine::shape_without_padding(bias->shape, dims).elements());
}

Region checked_output_region(const wire::RegionMessage& message,
                             std::span<const std::size_t> byte_sizes) {
  Region region = region_of("output_region", message);
  const std::uint64_t needed = offsets(byte_sizes).back();
  if (region.byte_size < needed) {
    refuse("output_region.byte_size", std::to_string(region.byte_size),
           text(needed, " or more, for this answer"));
  }
  return region;
}

Region checked_output_region(const wire::RegionMessage& message,
                             const std::vector<wire::ResultSpec>& results) {
  return checked_output_region(message, byte_sizes_of(results));
}

std::vector<std::uint64_t> offsets(std::span<const std::size_t> byte_sizes) {
  std::vector<std::uint64_t> starts;
  starts.reserve(byte_sizes.size() + 1);
  std::uint64_t end = 0;
  for (const std::size_t byte_size : byte_sizes) {
    starts.push_back(aligned(end));
    end = starts.back() + byte_size;
  }
  starts.push_back(end);
  return starts;
}

std::vector<std::uint64_t> offsets(const std::vector<wire::ResultSpec>& results) {
  return offsets(byte_sizes_of(results));
}

}  // namespace attnserve::requests
