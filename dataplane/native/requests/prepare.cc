#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/copy.h"
#include "requests/attend.h"
#include "requests/elements.h"
#include "requests/plan.h"
#include "requests/tensor_spec.h"

namespace attnserve::requests {
namespace {

using engine::Feed;
using wire::Input;

constexpr std::size_t index(Input input) { return static_cast<std::size_t>(input); }
constexpr std::size_t index(Feed feed) { return static_cast<std::size_t>(feed); }

// The elements of each input where the caller put them, by wire::Input.
using Sources = std::array<ByteSpan, wire::kInputs>;

Sources sources_of(PreparedAttend& prepared, const Sources& sent, const Context& context,
                   std::string_view peer) {
  Sources sources;
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    const std::optional<TensorSpec>& spec = prepared.plan.specs[at];
    if (!spec) continue;
    sources[at] = elements_of(*spec, sent[at], context.regions, peer, prepared.regions);
  }
  if (prepared.plan.output_region) {
    prepared.output_region = view_of(*prepared.plan.output_region, context.regions, peer);
  }
  return sources;
}

MutableByteSpan room(PreparedAttend& prepared, std::size_t size) {
  prepared.copies.push_back(Bytes::allocate(size));
  return prepared.copies.back().span();
}

std::byte* copied(PreparedAttend& prepared, ByteSpan elements) {
  const MutableByteSpan copy = room(prepared, elements.size());
  copy_bytes(copy.data(), elements.data(), elements.size());
  return copy.data();
}

// The elements where the caller put them, at whatever address: the engine copies where it must, and
// copies those of requests that run together anyway. Kernels do not write to what they are fed.
Tensor in_place(const TensorSpec& spec, ByteSpan elements) {
  return {spec.dtype, spec.shape, const_cast<std::byte*>(elements.data())};
}

// As in_place, but so that the elements can be looked at.
Tensor readable(PreparedAttend& prepared, const TensorSpec& spec, ByteSpan elements) {
  Tensor tensor = in_place(spec, elements);
  if (!tensor.aligned()) tensor.data = copied(prepared, elements);
  return tensor;
}

// What kernels trust once it is checked, while the caller's memory may change after that.
Tensor trusted(PreparedAttend& prepared, const TensorSpec& spec, ByteSpan elements) {
  return spec.region ? Tensor{spec.dtype, spec.shape, copied(prepared, elements)}
                     : readable(prepared, spec, elements);
}

bool all_take(const AttendPlan& plan, Feed feed) {
  const std::string_view name = name_of(feed);
  return plan.variant->session->takes(name) &&
         (plan.diagnosis == nullptr || plan.diagnosis->session->takes(name));
}

// A boolean bias: the mask of graphs that take one, otherwise a bias of 0 and -infinity.
void feed_mask(PreparedAttend& prepared, Tensor mask) {
  const AttendPlan& plan = prepared.plan;
  auto& feeds = prepared.work.feeds;
  check_mask("bias", mask);
  if (all_take(plan, Feed::kMask)) {
    feeds[index(Feed::kMask)] = mask;
    return;
  }
  Tensor bias{plan.model->facts.dtype, mask.shape, nullptr};
  bias.data = room(prepared, bias.byte_size()).data();
  bias_of_mask(mask, bias.dtype, bias.data);
  feeds[index(Feed::kBias)] = bias;
}

void feed_inputs(PreparedAttend& prepared, const Sources& sources) {
  const AttendPlan& plan = prepared.plan;
  auto& feeds = prepared.work.feeds;
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    const std::optional<TensorSpec>& spec = plan.specs[at];
    if (!spec) continue;
    switch (static_cast<Input>(at)) {
      case Input::kKeyLengths:
      case Input::kPrefixLengths:
        feeds[at] = trusted(prepared, *spec, sources[at]);
        check_lengths(name_of(static_cast<Input>(at)), feeds[at], plan.dims.key_len);
        break;
      case Input::kCuSeqlensQ:
      case Input::kCuSeqlensK:
        feeds[at] = trusted(prepared, *spec, sources[at]);
        check_starts(
            name_of(static_cast<Input>(at)), feeds[at],
            static_cast<Input>(at) == Input::kCuSeqlensQ ? plan.dims.query_len : plan.dims.key_len);
        break;
      case Input::kBias:
        if (spec->dtype == DataType::kBool) {
          feed_mask(prepared, readable(prepared, *spec, sources[at]));
          break;
        }
        feeds[at] = readable(prepared, *spec, sources[at]);
        check_added("bias", feeds[at]);
        break;
      case Input::kSinks:
        feeds[at] = readable(prepared, *spec, sources[at]);
        check_added("sinks", feeds[at]);
        break;
      default:
        feeds[at] = in_place(*spec, sources[at]);
    }
  }
  Tensor& query = feeds[index(Input::kQuery)];
  if (query.data != nullptr && plan.query_factor != 1.0) {
    const ByteSpan elements = sources[index(Input::kQuery)];
    query.data = room(prepared, elements.size()).data();
    scale_elements(query.dtype, elements, static_cast<float>(plan.query_factor),
                   {query.data, elements.size()});
  }
}

Tensor one_element(DataType dtype, const Shape& shape, void* element) {
  return {dtype, shape, static_cast<std::byte*>(element)};
}

// The same length for each sequence, in `place` if there is room.
Tensor equal_lengths(PreparedAttend& prepared, std::int64_t length,
                     PreparedAttend::Defaults::Lengths& place) {
  const std::int64_t count = prepared.plan.dims.sequences();
  const auto size = static_cast<std::size_t>(count);
  std::int64_t* lengths = place.data();
  if (size > place.size()) {
    lengths = reinterpret_cast<std::int64_t*>(room(prepared, size * sizeof *lengths).data());
  }
  std::fill_n(lengths, size, length);
  return {DataType::kInt64, {count}, reinterpret_cast<std::byte*>(lengths)};
}

// Which nothing writes to.
Tensor own_sinks(const engine::Model& model) {
  const std::vector<float>& sinks = model.facts.sinks;
  return {DataType::kFp32,
          {static_cast<std::int64_t>(sinks.size())},
          reinterpret_cast<std::byte*>(const_cast<float*>(sinks.data()))};
}

// What the graphs take besides the request's tensors.
void feed_defaults(PreparedAttend& prepared) {
  const AttendPlan& plan = prepared.plan;
  auto& feeds = prepared.work.feeds;
  auto& defaults = prepared.defaults;
  if (plan.diagnosis != nullptr) {
    defaults.top_k = plan.wanted.top_k;
    defaults.distances = plan.wanted.mass_by_distance;
    feeds[index(Feed::kTopK)] = one_element(DataType::kInt64, {1}, &defaults.top_k);
    feeds[index(Feed::kDistances)] = one_element(DataType::kInt64, {1}, &defaults.distances);
  }
  if (!plan.specs[index(Input::kKeyLengths)]) {
    // Distances are counted from the weights up to each sequence's length.
    const bool counted = plan.diagnosis == nullptr && plan.wanted.mass_by_distance != 0;
    if (counted || takes(plan, Feed::kKeyLengths)) {
      feeds[index(Feed::kKeyLengths)] =
          equal_lengths(prepared, plan.dims.key_len, defaults.key_lengths);
    }
  }
  if (!plan.specs[index(Input::kPrefixLengths)] && takes(plan, Feed::kPrefixLengths)) {
    feeds[index(Feed::kPrefixLengths)] = equal_lengths(prepared, 0, defaults.prefix_lengths);
  }
  if (plan.dims.packed > 0 && !plan.specs[index(Input::kCuSeqlensK)]) {
    feeds[index(Feed::kCuSeqlensK)] = feeds[index(Feed::kCuSeqlensQ)];
  }
  if (feeds[index(Feed::kMask)].data == nullptr && takes(plan, Feed::kMask)) {
    feeds[index(Feed::kMask)] = one_element(DataType::kBool, {1, 1, 1, 1}, &defaults.mask);
  }
  if (feeds[index(Feed::kBias)].data == nullptr && takes(plan, Feed::kBias)) {
    feeds[index(Feed::kBias)] = one_element(plan.model->facts.dtype, {1, 1, 1, 1}, &defaults.bias);
  }
  if (feeds[index(Feed::kSinks)].data == nullptr && takes(plan, Feed::kSinks)) {
    feeds[index(Feed::kSinks)] = own_sinks(*plan.model);
  }
  if (takes(plan, Feed::kSoftcap)) {
    defaults.softcap = softcap_feed(plan);
    feeds[index(Feed::kSoftcap)] = one_element(DataType::kFp32, {1}, &defaults.softcap);
  }
}

}  // namespace

std::unique_ptr<PreparedAttend> prepare(AttendPlan plan, const Sources& elements,
                                        const Context& context, std::string_view peer) {
  auto prepared = std::make_unique<PreparedAttend>();
  prepared->plan = std::move(plan);
  const Sources sources = sources_of(*prepared, elements, context, peer);
  feed_inputs(*prepared, sources);
  feed_defaults(*prepared);
  const AttendPlan& checked = prepared->plan;
  engine::AttendWork& work = prepared->work;
  work.model = checked.model;
  work.variant = checked.variant;
  work.diagnosis = checked.diagnosis;
  work.wanted = checked.wanted;
  work.dims = checked.dims;
  work.key = checked.key;
  work.joinable = joinable(checked.specs, checked.dims);
  return prepared;
}

void PreparedAttend::check_intact() const {
  for (const sessions::RegionView& region : regions) region.check_intact();
  if (output_region) output_region->check_intact();
}

}  // namespace attnserve::requests
